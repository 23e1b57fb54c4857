"""``caspr-bench``: measure what an optimizer costs. Imports torch only when it measures."""

from __future__ import annotations

import argparse
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caspr_cli import __version__
from caspr_cli.bench.shapes import MODELS, PRESETS, ShapeSet, parse_shapes, scaled_transformer
from caspr_cli.common.errors import Parser, UserError, one_of, positive
from caspr_cli.common.exits import INTERRUPTED, OK
from caspr_cli.common.files import write_output
from caspr_cli.common.format import SECONDS_BETWEEN_LINES, Progress, count, finite, milliseconds, terminal_width
from caspr_cli.common.streams import console_script
from caspr_cli.recipe import compose
from caspr_cli.recipe.configs import scales
from caspr_cli.recipe.schema import OPTIMIZERS, KroneckerConf, Recipe
from caspr_cli.tasks.registry import TASKS

if TYPE_CHECKING:
    from caspr_cli.bench.baselines import Settings
    from caspr_cli.bench.measure import Row
    from caspr_cli.bench.ranks import RanksRow

# Without Muon, whose products in bfloat16 take ten seconds a step on a CPU that has no instructions for them.
DEFAULT = ("caspr", "shampoo", "adamw", "soap", "muon")
OTHERS = tuple(name for name in OPTIMIZERS if name not in DEFAULT)
KRONECKER = tuple(name for name, conf in OPTIMIZERS.items() if issubclass(conf, KroneckerConf))  # share their work
PARTS = ("statistics", "roots", "apply", "communication")
DTYPES = ("float32", "bfloat16", "float16", "float64")
TOKENS = 4096  # in a training step, where nothing else is said
PLOTS = Path("outputs/bench")

EXAMPLES = """\
  caspr-bench                                       five optimizers; two minutes
  caspr-bench --optim caspr,adamw --params 2M       two; less than a minute
  caspr-bench --shapes "4*1536x512,200*64x64x3x3"   your own shapes
  caspr-bench --task c4_lm --scale paper            a task's model
  caspr-bench --optim caspr_sum,caspr:graft=rms    modes of one engine
  caspr-bench --ranks 1,2,4                         on 1, 2 and 4 processes
  caspr-bench --model gpt2-1.5b --scale 8,1024      on many GPUs, predicted"""

LEGEND = """\
median      time of a step at the optimizer's own interval, like p99 and mean; the chart shows the median
no refresh  a step that refreshes no roots or bases; floor: its matrix products alone; x floor: their ratio
x adamw     median / that of fused AdamW
split       parts of the median step: statistics, roots, apply, and the rest (momentum, graft, weights)
B/param     bytes of optimizer state for each parameter
share       part of a training step, predicted: mean / (mean + {train} of forward and backward for {batch})"""

RANKS_LEGEND = """\
mean      time of a step at the optimizer's own interval, until the slowest rank is done; speedup: ratio of the means
split     parts of the mean step, each on the rank where it is longest; communication: waiting for others' updates
state     on the rank that keeps most: moments, which all keep, and factors, which are statistics and roots
received  bytes that a rank gets in a step, its own part included; x: as a multiple of the weights"""

SCALE_LEGEND = """\
group     GPUs that share the work, as the optimizer chooses; under fully_shard all of them
blocks    of the GPU that has most; balance: FLOPs of the busiest over the average
factors   statistics and roots of that GPU; state: with moments; buffers: for what travels
received  bytes that a GPU gets in a step; x: as a multiple of the updates
predicted compute and exchange, at {efficiency:.0%} of the data sheet and if nothing overlapped: {float32:g} TFLOP/s \
in float32, {bfloat16:g} in bfloat16 (caspr: all but statistics and roots), {memory:g} TB/s of memory; {node:g} GB/s \
within a node of 8, {network:g} GB/s a link beyond
dealing   CPU time on this machine to choose owners, once a run: the one number that is measured"""


def ranks(text: str) -> list[int]:
    return sorted({positive(part.strip()) for part in text.split(",")})


def parser() -> Parser:
    made = Parser(
        "caspr-bench",
        usage="caspr-bench [options]",
        description=f"Measure what a step of an optimizer costs. Nothing is trained.\n\n{EXAMPLES}",
        epilog="exits    0 done   2 bad usage   130 interrupted",
    )
    made.add_argument("--version", action="version", version=f"caspr-bench {__version__}")

    def flag(name: str, metavar: str, text: str, to: Any = made, **more: Any) -> None:
        to.add_argument(f"--{name}", metavar=metavar, help=text, **more)

    what, png = made.add_mutually_exclusive_group(), made.add_mutually_exclusive_group()
    shapes = f"comma-separated COUNT*SIZExSIZE..., or a preset: {', '.join(PRESETS)}"
    flag("shapes", "LIST", f"{shapes} (default: medium; with --ranks transformer)", to=what)
    flag("params", "N", "a transformer with about N parameters: 300k, 14M, 1.5B", to=what)
    flag("task", "NAME", f"a task's model: {', '.join(TASKS)}", to=what)
    flag("model", "NAME", f"a step on many GPUs, predicted: {', '.join(MODELS)}")
    flag("scale", "NAME", "of --task (default: sample); or numbers of GPUs, of --model (default: 8,64,1024)")
    flag("gpu", "NAME", "of --model: h100 (default), h200 or a100", default="h100")
    flag("ranks", "LIST", "numbers of processes that share a step", type=ranks)
    names = f"{', '.join(DEFAULT)} (the default), {', '.join(OTHERS)}"
    flag("optim", "LIST", f"what to measure: {names}; or a mode: caspr:order=3:graft=rms")
    flag("interval", "N", "steps between two refreshes of roots or bases (default: 10)", type=positive, default=10)
    flag("block-size", "N", "longest side of a block in caspr and shampoo (default: 1024)", type=positive, default=1024)
    given = "an option of caspr and shampoo, in all rows; may be repeated: --set order=3"
    flag("set", "KEY=VALUE", given, action="append", default=[], dest="given")
    batch = f"tokens in a training step, to predict a share of it (default: {TOKENS}; a task has its own)"
    flag("batch", "N", batch, type=positive)
    rounds = "number of rounds; every optimizer makes one step in each (default: 10)"
    flag("rounds", "N", rounds, type=positive, default=10)
    dtype = f"type of weights and gradients: {', '.join(DTYPES)} (default: float32)"
    flag("dtype", "TYPE", dtype, choices=DTYPES, default="float32")
    flag("device", "NAME", "cpu (the default) or cuda", choices=("cpu", "cuda"), default="cpu")
    flag("threads", "N", "threads on a CPU; with --ranks, threads of each rank (default: 1)", type=positive)
    flag("json", "FILE", "the rows as a list; - for standard output, with nothing else on it")
    flag("png", "FILE", f"the chart (default: {PLOTS}/<what was measured>.png)", type=Path, to=png)
    png.add_argument("--no-png", action="store_true", help="no chart")
    return made


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the parsed command line. What needs torch is not checked yet. Raises UserError."""
    args: argparse.Namespace = parser().parse_args(argv)
    chosen = args.optim or ("caspr" if args.ranks or args.model else ",".join(DEFAULT))
    words = [name.strip().partition(":") for name in chosen.split(",")]
    args.optim = [one_of("--optim", name, OPTIMIZERS) + colon + own for name, colon, own in words]
    if others := [name for name, colon, _ in words if colon and name not in KRONECKER]:
        raise UserError(f"--optim {others[0]}: takes no options here; {', '.join(KRONECKER)} do")
    if args.model:
        one_of("--model", args.model, MODELS)
        if args.task or args.params:
            raise UserError("--model: has shapes of its own, so leave out --task and --params")
        try:
            args.scale = ranks(args.scale or "8,64,1024")
        except argparse.ArgumentTypeError as error:
            raise UserError(f"--scale of --model: {error}") from error
    if (args.ranks or args.model) and (others := [name for name, *_ in words if name not in KRONECKER]):
        raise UserError(f"--optim {others[0]}: does not share its work among ranks; {', '.join(KRONECKER)} do")
    args.shapes = args.shapes or ("transformer" if args.ranks else "medium")
    if args.scale and not (args.task or args.model):
        raise UserError("--scale: needs --task NAME, or --model NAME")
    if args.ranks and args.model:
        raise UserError("--ranks: measures a step, and --model does not")
    if args.batch and args.task:
        raise UserError("--batch: a task has a batch of its own")
    return args


def recipe_of(task: str, scale: str) -> Recipe:
    """Return the recipe of a task in one of its scales. Raises UserError if there is no such task or scale."""
    from caspr_cli.recipe.composer import Composer  # here, because it imports Hydra

    one_of("--task", task, TASKS)
    one_of("--scale", scale, scales(task))
    return compose.freeze(Composer().config([f"task={task}", f"scale={scale}"]))


def writable(path: Path) -> Path:
    """Return the path after making its directory, so that a mistake is found before minutes of measuring.

    Raises UserError if nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot write there: {error.strerror}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: cannot write there: {'it is a directory' if path.is_dir() else 'not permitted'}")
    return path


def run(args: argparse.Namespace) -> None:
    """Measure, print, and write what was asked for. Raises UserError."""
    target = writable(Path(args.json)) if args.json and args.json != "-" else None
    what: ShapeSet | Recipe = scaled_transformer(args.params) if args.params else parse_shapes(args.shapes)
    if args.task:
        what = recipe_of(args.task, args.scale or "sample")
    steps = not args.ranks and not args.model
    name = what.name if isinstance(what, ShapeSet) else f"{what.task.name}-{what.scale}"
    png = writable(args.png or PLOTS / f"{name}.png") if steps and not args.no_png else None
    progress = Progress(sys.stderr, SECONDS_BETWEEN_LINES)
    progress.say("importing torch")
    try:
        from caspr_cli.bench import baselines

        settings = baselines.Settings(args.interval, args.block_size, baselines.parse_given(args.given, args.optim))
        if args.model:
            rows, lines, chart = _scale(args, settings)
        else:
            rows, lines, chart = _steps(args, settings, what, progress.say, draw=png is not None)
    finally:
        progress.clear()
    listed = json.dumps(finite(list(map(asdict, rows)), infinities=False), indent=2, allow_nan=False) + "\n"
    for kind, path, content in (("json", target, listed), ("png", png, chart)):
        if path:
            write_output(path, content)
            lines.append(f"{kind:<11} {path}")
    if steps:
        lines += next_commands(args)
    print("\n".join(lines), file=sys.stderr if args.json == "-" else sys.stdout)
    if args.json == "-":
        print(listed, end="")


Made = tuple[Sequence[Any], list[str], bytes]  # rows of a JSON file, lines to print, and a chart


def _steps(
    args: argparse.Namespace, settings: Settings, what: ShapeSet | Recipe, log: Callable[[str], None], *, draw: bool
) -> Made:
    from caspr_cli.bench import figure, measure, ranks
    from caspr_cli.bench.workload import Machine

    machine = Machine(args.dtype, args.device, args.threads)
    if args.ranks:
        shared = ranks.measured_ranks(what, args.optim, args.ranks, settings, machine, rounds=args.rounds, log=log)
        return shared, list(ranks_report(shared)), b""
    tokens = args.batch or TOKENS
    rows = measure.measured(what, args.optim, settings, machine, tokens=tokens, rounds=args.rounds, log=log)
    lines = list(report(rows, "its own batch" if args.task else f"{tokens:,} tokens"))
    return rows, lines, figure.png(figure.draw(rows)) if draw else b""


def _scale(args: argparse.Namespace, settings: Settings) -> Made:
    from caspr_cli.theory.scale import GPUS, on_paper

    gpu = GPUS[one_of("--gpu", args.gpu, GPUS)]
    rows = [row for name in args.optim for row in on_paper(args.model, args.scale, gpu, name, settings)]
    heads = ["GPUs", "mode", "group", "blocks", "balance", "factors GB", "state GB", "buffers GB", "received GB", "x",
             "compute ms", "exchange ms", "dealing s"]  # fmt: skip
    cells = [
        [
            *map(str, (row.gpus, row.mode, row.group, row.blocks)),
            f"{row.balance:.2f}",
            *(f"{x / 1e9:.2f}" for x in (row.factor_bytes, row.state_bytes, row.buffer_bytes, row.received_bytes)),
            f"{row.received_ratio:.2f}",
            *(milliseconds(1e3 * x) for x in (row.compute_seconds, row.exchange_seconds)),
            f"{row.dealing_seconds:.2f}",
        ]
        for row in rows
    ]
    title = f"caspr-bench {__version__}  {args.model}, {', '.join(args.optim)}, predicted for {gpu.name}, not measured"
    legend = hanging(SCALE_LEGEND.format(**vars(gpu.rates), node=gpu.node / 1e9), 10)
    shown = fitting([heads, *cells], [0, 0, 0, 6, 3, 4, 1, 2, 5, 0, 0, 0, 7])
    return rows, [title, *shown, "", *legend], b""


def report(rows: list[Row], batch: str) -> Iterator[str]:
    """Yield the table, the meaning of its columns, the roots, and the machine."""
    first = rows[0]
    yield f"caspr-bench {__version__}  {first.set}, {first.parameters:,} parameters, {first.dtype}; times in ms"
    heads = ["optimizer", "median", "p99", "mean", "no refresh", "floor", "x floor", "x adamw",
             "statistics", "roots", "apply", "rest", "B/param", "share"]  # fmt: skip
    cells = [
        [
            row.optimizer,
            *map(milliseconds, (row.median_ms, row.p99_ms, row.mean_ms, row.step_ms, row.floor_ms)),
            *map(ratio, (row.floor_ratio, row.adamw_ratio)),
            *map(milliseconds, (row.statistics_ms, row.roots_ms, row.apply_ms, row.rest_ms)),
            f"{row.state_bytes_per_parameter:.1f}",
            f"{100 * row.share:.1f} %",
        ]
        for row in rows
    ]
    yield from fitting([heads, *cells], [0, 0, 5, 2, 4, 6, 7, 0, 3, 3, 3, 3, 1, 1])
    yield ""
    yield from hanging(LEGEND.format(train=f"{milliseconds(first.train_ms)} ms", batch=batch), 12)
    for row in rows:
        if row.refresh_ms is not None:
            ours, lapack = map(milliseconds, (row.refresh_ms, row.lapack_ms))
            times = f"{ours} ms, {ratio(row.refresh_ratio)} x LAPACK's eigendecompositions"
            same = f"as many matrices of the same sizes ({lapack} ms)"
            yield f"roots       of {row.optimizer}, all at once: {times} of {same}"
    versions = ", ".join(f"{name} {value}" for name, value in first.versions.items())
    yield f"machine     {first.device}, threads {first.threads}; {versions}"


def ranks_report(rows: list[RanksRow]) -> Iterator[str]:
    """Yield the table of shared steps, and the meaning of its columns."""
    first = rows[0]
    machine = f"{count(first.threads, 'thread')} a rank on {first.device}, {os.cpu_count()} cores"
    size = f"{first.parameters:,} parameters, {first.dtype}"
    yield f"caspr-bench {__version__}  {first.set}, {size}; times in ms, {machine}"
    heads = ["optimizer", "ranks", "median", "mean", "speedup", *PARTS, "state MB", "factors MB", "received MB", "x"]
    cells = [
        [
            row.optimizer,
            str(row.ranks),
            *map(milliseconds, (row.median_ms, row.mean_ms)),
            f"{row.speedup:.2f}",
            *map(milliseconds, (row.statistics_ms, row.roots_ms, row.apply_ms, row.communication_ms)),
            *(f"{n / 1e6:.1f}" for n in (row.state_bytes, row.factor_bytes, row.bytes_received)),
            f"{row.bytes_received / row.weight_bytes:.2f}",
        ]
        for row in rows
    ]
    yield from fitting([heads, *cells], [0, 0, 3, 0, 0, 2, 2, 2, 2, 1, 4, 1, 3])
    yield ""
    yield from hanging(RANKS_LEGEND, 10)


def fitting(cells: list[list[str]], spare: list[int]) -> Iterator[str]:
    """Yield the lines of a table. Where the terminal is narrow, the columns with the highest ``spare`` are left out."""
    from caspr_cli.report.render import lines, sheet

    yield from lines(sheet(cells[0], cells[1:], spare=spare), terminal_width(), more="a wider terminal or --json")


def hanging(legend: str, indent: int) -> Iterator[str]:
    """Yield the lines of a legend, wrapped below their texts."""
    for line in legend.splitlines():
        yield from textwrap.wrap(line, terminal_width(), subsequent_indent=" " * indent, break_on_hyphens=False)


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def next_commands(args: argparse.Namespace) -> list[str]:
    if args.task:
        scale = f" scale={args.scale}" if args.scale else ""
        entry, *own = args.optim[0].split(":")
        train = " ".join([f"caspr-train task={args.task}{scale} optim={entry}", *(f"optim.{word}" for word in own)])
        found = [train, f"{train} debug=plan"]
    else:
        other = "transformer" if args.shapes == "small" else "small"
        found = ["caspr-bench --task c4_lm --scale paper", f"caspr-bench --shapes {other}"]
    found += ["caspr-bench --interval 50"] if args.interval == 10 else []
    return [f"{'next' if k == 0 else '':<11} {line}" for k, line in enumerate(found)]


@console_script
def main() -> int:
    try:
        run(parse(sys.argv[1:]))
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return INTERRUPTED
    return OK


if __name__ == "__main__":
    sys.exit(main())
