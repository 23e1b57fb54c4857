"""What holds for every gradient: scale, rotation, transposition, zero."""

import pytest
import torch
from pairs import pairs
from references.drive import BARE, bare_updates, relative_error, run
from references.kronecker import precondition
from references.stream import random_stream, statistics

from caspr_cli.optim import CASPR, FullAdagrad, Shampoo

# Vectors are preconditioned too, and every axis of a tensor stays an axis or merges.
KINDS = [
    ((5,), CASPR, {}),
    ((4, 3), CASPR, {"block_size": 2}),
    ((3, 2, 4), Shampoo, {"merge": "none"}),
    ((3, 2, 4), CASPR, {"merge": "square", "exponent": 1.0}),
    ((2, 3, 2, 2), CASPR, {"merge": "none"}),
    ((2, 3, 2, 2), Shampoo, {"exponent": 1.0}),
    *(((4, 3), CASPR, {"axes": axes}) for axes in ("first", "last", "row")),
    ((2, 3), FullAdagrad, {}),
]
SCALED = pairs({"kind": KINDS, "scale": [1e-20, 3.0, 1e20], "statistics": ["ema", "accumulate"]})


@pytest.mark.parametrize(("kind", "scale", "statistics"), [tuple(row.values()) for row in SCALED])
def test_scale_of_the_gradients_does_not_matter(kind, scale, statistics):
    shape, optimizer, options = kind
    gradients = random_stream(*shape, steps=3, seed=1)
    options = {"eps": 1e-3, "statistics": statistics} | options
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        plain = bare_updates(optimizer, [g.to(dtype) for g in gradients], **options)
        scaled = bare_updates(optimizer, [(scale * g).to(dtype) for g in gradients], **options)
        for u, u_scaled in zip(plain, scaled, strict=True):
            assert relative_error(u_scaled, u) < bound


@pytest.mark.parametrize("row", [0, 1, 2, 7, 15, 16])
@pytest.mark.parametrize(
    "options",
    [
        {"solver": "eigh"}, {"solver": "newton"}, {"axes": "first"}, {"axes": "last"}, {"axes": "row"},
        {"measured": 1.0}, {"measured": 1.0, "solver": "newton", "apply_dtype": torch.bfloat16},
    ],
)  # fmt: skip
def test_a_row_that_never_has_a_gradient_stays(options, row):
    """To the last bit, wherever it is: a decomposition alone would mix it with others by rounding."""
    gradients = random_stream(17, 3, steps=3, seed=9, dtype=torch.float32)
    for gradient in gradients:
        gradient[row] = 0
    for update in bare_updates(CASPR, gradients, **options):
        assert torch.equal(update[row], torch.zeros(3))
        assert torch.isfinite(update).all()


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, "ema"), (torch.float64, "accumulate")])
def test_gradients_that_grow_by_forty_orders_within_one_run(dtype, kind):
    """The later gradients outweigh the earlier by 1e80 in the statistics: U is that of the last alone."""
    first, last = random_stream(4, 3, steps=2, seed=3)
    options = {"eps": 1e-3, "statistics": kind, "damping": "relative"}
    update = bare_updates(CASPR, [(1e-20 * first).to(dtype), (1e20 * last).to(dtype)], **options)[-1]
    # After zero gradients the weight of the last in the average is (1 - beta) / (1 - beta^2).
    expected = bare_updates(CASPR, [0 * first, last], **options)[-1]
    assert relative_error(update, expected) < (1e-9 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_old_roots_take_gradients_thirty_orders_larger(dtype):
    """The roots of the first step are used in the second: an immense U, whose length the graft sets right."""
    first, last = random_stream(4, 3, steps=2, seed=13)
    gradients = [(1e-15 * first).to(dtype), (1e15 * last).to(dtype)]
    update = bare_updates(CASPR, gradients, interval=2, graft="sgd", eps=1e-3, beta=0.9)[-1]
    u = precondition(last, statistics([first], "ema", 0.9), 1e-3, "relative", 2)
    expected = 1e15 * u * torch.linalg.vector_norm(last) / torch.linalg.vector_norm(u)
    assert relative_error(update, expected) < (1e-9 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize(
    ("dtype", "graft"),
    [(torch.float32, "adam"), (torch.float64, "rmsprop"), (torch.float32, "sgd"), (torch.float32, "none")],
)
def test_gradients_that_shrink_by_forty_orders_stay_finite_and_small(dtype, graft):
    first, last = random_stream(4, 3, steps=2, seed=4)
    options = {**BARE, "betas": (0.0, 0.9), "graft": graft, "lr": 1.0}
    weights = run(
        CASPR, torch.zeros(4, 3, dtype=dtype), [(1e20 * first).to(dtype), (1e-20 * last).to(dtype)], **options
    )
    moved = (weights[1] - weights[0]).norm()
    assert torch.isfinite(weights[1]).all()
    # Where 1e40 is no number the first step is left out, and the second has the length of Adam's first: an entry of
    # about 1e-20 over a graft_eps of 1e-8, twelve times.
    assert moved <= 1e-11 * (1 + weights[0].abs().max())


@pytest.mark.parametrize(("scale", "dtype"), [(1e-20, torch.float32), (1e20, torch.float32), (1e20, torch.float64)])
def test_sgd_graft_has_the_length_of_the_gradient_at_any_scale(scale, dtype):
    """The squares in ||G||_F leave float32's range at 1e20 and 1e-20; the length itself does not."""
    gradient = random_stream(4, 3, steps=1, seed=5)[0]
    update = bare_updates(CASPR, [(scale * gradient).to(dtype)], graft="sgd")[0]
    length = torch.linalg.vector_norm(update.double()).item()
    assert length == pytest.approx(scale * torch.linalg.vector_norm(gradient).item(), rel=1e-5)


@pytest.mark.parametrize(("graft", "scale"), [("adam", 1e-30), ("adam", 1e30), ("rmsprop", 1e-20), ("rmsprop", 1e20)])
def test_diagonal_grafts_are_finite_at_any_scale(graft, scale):
    gradients = [scale * g for g in random_stream(4, 3, steps=3, seed=6, dtype=torch.float32)]
    for update in bare_updates(CASPR, gradients, graft=graft):
        assert torch.isfinite(update).all()
