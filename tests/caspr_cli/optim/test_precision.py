"""float32, bfloat16 and float16 parameters against the float64 formula."""

import math
import threading

import pytest
import torch
from references.drive import bare_updates, relative_error
from references.kronecker import precondition
from references.stream import random_stream, statistics

from caspr_cli.optim import CASPR, step
from caspr_cli.optim import statistics as statistics_module
from caspr_cli.optim.precision import full_precision

BETA = 0.9


def conditioned_stream(rows, columns, condition, seed, dtype):
    """Gradients whose singular values spread evenly in logarithm over ``condition``, in the given precision."""
    count = min(rows, columns)
    left = torch.linalg.qr(random_stream(rows, count, steps=1, seed=seed)[0])[0]
    right = torch.linalg.qr(random_stream(columns, count, steps=1, seed=seed + 1)[0])[0]
    values = torch.logspace(0, -math.log10(condition), count, dtype=torch.float64)
    mixes = random_stream(count, count, steps=5, seed=seed + 2)
    return [((left * values) @ mix @ (right * values).mT).to(dtype) for mix in mixes]


def expected_updates(gradients, eps, order):
    """The float64 formula on exactly the gradients that the optimizer saw."""
    exact = [gradient.double() for gradient in gradients]
    return [
        precondition(exact[t - 1], statistics(exact[:t], "ema", BETA), eps, "relative", order)
        for t in range(1, len(exact) + 1)
    ]


@pytest.mark.parametrize(
    ("condition", "eps", "bound", "order"),
    [
        (1.0, 1e-2, 1e-5, 1),
        (100.0, 1e-2, 1e-5, math.inf),
        (10.0, 1e-4, 2e-4, 2),
        (100.0, 1e-4, 2e-4, 3),
        (100.0, 1e-6, 5e-3, 2),
        (1.0, 1e-6, 5e-3, math.inf),
    ],
)
def test_float32_update_is_as_near_as_the_condition_allows(condition, eps, bound, order):
    """The damped statistics have condition at most 1 + 1/eps; float32 has 1e-7 of it."""
    gradients = conditioned_stream(12, 10, condition, seed=1, dtype=torch.float32)
    updates = bare_updates(CASPR, gradients, eps=eps, beta=BETA, order=order)
    for update, expected in zip(updates, expected_updates(gradients, eps, order), strict=True):
        assert update.dtype == torch.float32
        assert relative_error(update, expected) < bound


@pytest.mark.parametrize("order", [1, 2, math.inf])
def test_float64_factors_of_a_float32_parameter_leave_its_rounding_alone(order):
    gradients = conditioned_stream(12, 10, 100.0, seed=2, dtype=torch.float32)
    updates = bare_updates(CASPR, gradients, eps=1e-8, beta=BETA, factor_dtype=torch.float64, order=order)
    for update, expected in zip(updates, expected_updates(gradients, 1e-8, order), strict=True):
        assert update.dtype == torch.float32
        assert relative_error(update, expected) < 1e-6


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_parameters_have_float32_factors(dtype, bound):
    """U is off by the rounding of the result to the parameter's type, no more: half a unit in the last place."""
    gradients = random_stream(6, 8, steps=5, seed=3, dtype=dtype)
    updates = bare_updates(CASPR, gradients, eps=1e-4, beta=BETA)
    for update, expected in zip(updates, expected_updates(gradients, 1e-4, 2), strict=True):
        assert update.dtype == dtype
        assert relative_error(update, expected) < bound


def test_the_callers_matmul_precision_is_kept_and_not_used():
    gradients = random_stream(16, 16, steps=3, seed=7, dtype=torch.float32)
    expected = bare_updates(CASPR, gradients)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            updates = bare_updates(CASPR, gradients)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    for u, u_expected in zip(updates, expected, strict=True):
        assert relative_error(u, u_expected) < 1e-6


def test_two_threads_at_once_put_the_callers_precision_back():
    """One that is inside meanwhile keeps full precision, and the last one out finds what the caller had chosen."""
    backend = torch.backends.mkldnn.matmul
    before, backend.fp32_precision = backend.fp32_precision, "bf16"
    first, second = threading.Event(), threading.Event()
    seen = []

    def other():
        with full_precision("cpu"):
            first.set()
            second.wait(60)
            seen.append(backend.fp32_precision)

    try:
        thread = threading.Thread(target=other)
        with full_precision("cpu"):
            thread.start()
            assert first.wait(60)
        second.set()
        thread.join()
        assert seen == ["ieee"]
        assert backend.fp32_precision == "bf16"
    finally:
        backend.fp32_precision = before


def rounded(X: torch.Tensor, bits: int) -> torch.Tensor:
    """Return X with so many bits after the first, to nearest, as tensor cores read their inputs."""
    mantissa, exponent = torch.frexp(X)
    return torch.ldexp((mantissa * 2 ** (bits + 1)).round() / 2 ** (bits + 1), exponent)


def error_of_statistics(monkeypatch, condition, bits):
    """The error of U after 20 gradients of which the statistics see this many bits."""
    if bits:
        whole = statistics_module.add_gram
        monkeypatch.setattr(statistics_module, "add_gram", lambda S, X, weight: whole(S, rounded(X, bits), weight))
    gradients = [
        g for seed in range(4) for g in conditioned_stream(48, 32, condition, seed=10 + seed, dtype=torch.float32)
    ]
    updates = bare_updates(CASPR, gradients, eps=1e-6, beta=0.9)
    exact = [gradient.double() for gradient in gradients]
    return relative_error(updates[-1], precondition(exact[-1], statistics(exact, "ema", 0.9), 1e-6, "relative", 2))


@pytest.mark.parametrize(("condition", "most"), [(10.0, 1e-4), (1e4, 1e-3)])
def test_statistics_in_tf32_are_as_good_as_their_condition_allows(condition, most, monkeypatch):
    plain = error_of_statistics(monkeypatch, condition, 0)
    with monkeypatch.context() as patch:
        tf32 = error_of_statistics(patch, condition, 10)
    with monkeypatch.context() as patch:
        bfloat16 = error_of_statistics(patch, condition, 7)
    assert plain < tf32 < most < bfloat16


def test_tf32_is_for_statistics_alone(monkeypatch):
    seen = {}

    def noting(name, whole):
        def call(*args, **kwargs):
            backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
            seen[name] = [backend.fp32_precision for backend in backends]
            return whole(*args, **kwargs)

        return call

    for name in ("accumulate", "refresh", "precondition"):
        monkeypatch.setattr(step, name, noting(name, getattr(step, name)))
    before = torch.backends.cuda.matmul.fp32_precision
    for chosen in (False, True):
        bare_updates(CASPR, random_stream(4, 3, steps=2, seed=0), eps=1e-4, beta=0.9, statistics_tf32=chosen)
        products = "tf32" if chosen else "ieee"
        assert seen == {"accumulate": [products, "ieee"], "refresh": ["ieee"] * 2, "precondition": ["ieee"] * 2}
        assert torch.backends.cuda.matmul.fp32_precision == before
