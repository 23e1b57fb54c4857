"""``caspr-verify cost``: what does a step cost, how does that grow, and what would it be for large models?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from caspr_cli.recipe.errors import ConfigError
from caspr_cli.report.answer import Answer
from caspr_cli.theory import cost_shown as shown
from caspr_cli.theory.cost_cases import LAYERS, RANKED, Found, measured
from caspr_cli.theory.cost_runs import Dealt, Model, Run, Say
from caspr_cli.theory.decoders import Assumed, Scaled

QUESTION = (
    "What does a step of CASPR cost, how does that grow, and what would it be for models of 1B to 70B parameters?"
)
HOLDS = {
    "state": "bytes of state are those of the formula (within 0.1 %, which are counters)",
    "products": "the products that a step calls have the FLOPs of the formula, exactly",
    "ranks": "no rank has more than its part and one block, refreshed",
}


def answer(
    *,
    quick: bool = False,
    seed: int = 0,
    model: str = "c4_lm",
    batch: int | None = None,
    tokens: float = 4e6,
    efficiency: float = 0.7,
    mfu: float = 0.4,
    float32: float = 67,
    bfloat16: float = 989,
    memory: float = 3.35,
    network: float = 50,
    say: Say = lambda text: None,
) -> Answer:
    """FLOPs, bytes and seconds of a step, predicted from shapes, and measured where that runs here.

    Args:
        quick: small layers: seconds.
        seed: changes nothing; numbers are the same for any.
        model, batch: the task whose model is costed, at its sample scale, and samples in its step.
        tokens: in a step of the large models.
        efficiency: the part of peak FLOPs and bytes that products and passes reach on a GPU.
        mfu: the part of bfloat16 peak FLOPs that training reaches.
        float32, bfloat16: peak TFLOP/s of a GPU without sparsity.
        memory: TB/s of a GPU's memory.
        network: GB/s of each GPU's link to other nodes. Defaults: the data sheets of NVIDIA's H100 SXM, and of the
            DGX H100, which has a link of 400 Gb/s for each of its eight.

    Raises:
        ConfigError: no such task, or a number that is not above 0.
    """
    assumed = Assumed(tokens, efficiency, mfu, float32, bfloat16, memory, network)
    for name, value in vars(assumed).items():
        if not 0 < value < math.inf or (name in ("efficiency", "mfu") and value > 1):
            limits = "above 0 and at most 1" if name in ("efficiency", "mfu") else "above 0"
            raise ConfigError(f"--{name} {value:g}: should be {limits}")
    found = measured(quick, model, batch, assumed, say)
    return Answer(
        name="cost",
        question=QUESTION,
        words=tuple(words(found)),
        sheets=shown.sheets(found),
        figures=shown.figures(found),
        holds=tuple((text, held) for text, held in zip(HOLDS.values(), _held(found), strict=True)),
    )


def _held(found: Found) -> Iterator[bool]:
    """In the order of HOLDS."""
    runs = (*found.widths, *found.blocks, *found.intervals, *found.orders)
    states = [(r.state, r.work.state) for r in runs] + [(found.model.state, found.model.work.state)]
    yield all(abs(is_ / said - 1) < 1e-3 for is_, said in states)
    yield abs(found.called - 1) < 1e-9
    yield all(one.most <= one.bound * (1 + 1e-9) for one in found.ranks)


# ---- what is said ------------------------------------------------------------------------------------------------


def words(found: Found) -> Iterator[str]:
    yield _here_in_words(found)
    yield _options_in_words(found)
    yield _model_in_words(found.model)
    yield _ranks_in_words(found.ranks)
    yield _scale_in_words(found)


def _here_in_words(found: Found) -> str:
    said = ", ".join(f"{r.ratio:.2f} at width {r.width}" for r in found.widths)
    a, b = found.widths[-2:]
    power = math.log(b.milliseconds / a.milliseconds) / math.log(b.width / a.width)
    exact = math.log(sum(b.predicted.values()) / sum(a.predicted.values())) / math.log(b.width / a.width)
    parts = ", ".join(f"{name} {100 * ms / b.milliseconds:.0f} %" for name, ms in b.measured.items())
    return (
        "On one thread of this CPU a step is predicted from shapes, the rate of a product and that of a copy. "
        f"Predicted over measured: {said}. Between the last two the time of a layer grows as width to the power "
        f"{power:.2f} (predicted {exact:.2f}), with its parameters as width to the power 2. At width {b.width} a "
        f"layer takes {b.milliseconds:.3g} ms: {parts}."
    )


def _options_in_words(found: Found) -> str:
    def said(runs: Sequence[Run], name: str) -> str:
        values = ("Shampoo" if r.options[name] == math.inf else r.options[name] for r in runs)
        times = (f"{r.milliseconds:.3g} ({sum(r.predicted.values()):.3g})" for r in runs)
        return ", ".join(f"{value}: {time}" for value, time in zip(values, times, strict=True))

    by = {r.options["order"]: r for r in found.orders}
    caspr, shampoo = by[2], by[math.inf]
    return (
        f"What options change, milliseconds of a layer of width {found.orders[0].width}, measured and in brackets "
        f"predicted. Block size {said(found.blocks, 'block_size')}. Interval {said(found.intervals, 'interval')}. "
        f"Order {said(found.orders, 'order')}. CASPR's application takes "
        f"{caspr.measured['apply'] / shampoo.measured['apply']:.2f} times Shampoo's (FLOPs: "
        f"{caspr.work.apply / shampoo.work.apply:.2f}), its whole step "
        f"{caspr.milliseconds / shampoo.milliseconds:.2f} times; state is {caspr.state / shampoo.state:.3f} times as "
        "large."
    )


def _model_in_words(model: Model) -> str:
    flops = model.work.products + model.work.roots
    return (
        f"The model of {model.task}, as `debug=plan` costs it: {model.parameters:,} parameters, "
        f"{model.work.parameters:,.0f} of them preconditioned, {model.state / 1e6:.3g} MB of state "
        f"({model.state / model.work.parameters:.1f} bytes for each of these), {flops:.3g} FLOPs a step against "
        f"{model.training:.3g} of a batch: {100 * flops / (flops + model.training):.1f} % of the whole."
    )


def _ranks_in_words(ranks: Sequence[Dealt]) -> str:
    said = ", ".join(f"{one.ranks}: {one.speedup:.1f}" for one in ranks)
    last = ranks[-1]
    return (
        f"Divided over ranks, {LAYERS} layers of width {RANKED} ({last.blocks} blocks): the longest step of the "
        f"busiest rank is shorter by {said}, where blocks are dealt out longest first. Each rank receives "
        f"{last.received / 1e6:.3g} MB a step, however many there are."
    )


def _scale_in_words(found: Found) -> str:
    plain = [s for s in found.scale if s.variant == found.scale[0].variant]
    tuned = [s for s in found.scale if s.variant != found.scale[0].variant]

    def shares(rows: Sequence[Scaled], mode: str) -> str:
        kept = [s for s in rows if s.mode == mode]
        return ", ".join(f"{s.decoder.name} on {s.gpus:,} {100 * s.share:.1f} %" for s in kept)

    replicated, divided = found.scale[0].mode, found.scale[1].mode
    large = max(plain, key=lambda s: s.share)
    parts = {name: value for name, value in vars(large.seconds).items() if value}
    first = max(parts, key=lambda name: parts[name])
    room = [s for s in plain if s.mode == replicated and not s.fits]
    names = ", ".join(dict.fromkeys(s.decoder.name for s in room)) or "none"
    return (
        f"On paper, with {found.assumed.tokens:.0e} tokens a step and H100s, the share of a training step is, "
        f"{plain[0].variant}: with {divided} {shares(plain, divided)}; with {replicated} {shares(plain, replicated)}. "
        f"With {tuned[0].variant}: {shares(tuned, divided)}; {shares(tuned, replicated)}. The largest of these "
        f"({large.decoder.name} on {large.gpus:,}, {large.mode}) spends most on {first}, {parts[first]:.3g} of "
        f"{large.seconds.total:.3g} s. Weights, gradients and state do not fit into "
        f"{found.assumed.machine().room / 1e9:.0f} GB with {replicated}: {names}."
    )
