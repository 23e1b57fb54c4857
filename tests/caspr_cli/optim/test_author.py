"""``AuthorCASPR`` against an independent transcription of the authors' code."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from references.author import author_weights

from caspr_cli.optim.author import AuthorCASPR


def weights_of(shape: tuple[int, ...], gradients: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    p = torch.nn.Parameter(torch.linspace(-1, 1, steps=int(np.prod(shape)), dtype=torch.float64).reshape(shape))
    optimizer = AuthorCASPR([p], **options)
    found = []
    for G in gradients:
        p.grad = G.clone()
        optimizer.step()
        found.append(p.detach().clone())
    return found


def drawn(shape: tuple[int, ...], steps: int, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    rows = torch.logspace(0, -2, shape[0], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))
    return [scale * rows * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


@pytest.mark.parametrize(
    ("shape", "scale", "options"),
    [
        ((6, 4), 1.0, {"interval": 3, "start_step": 7, "block_size": 8}),
        ((6, 4), 1e-3, {"interval": 3, "start_step": 7, "block_size": 8}),  # the first statistics weigh a lot
        ((7, 10), 1.0, {"interval": 2, "start_step": 5, "block_size": 4}),  # blocks, and padded ones
        ((5, 5), 1.0, {"interval": 4, "start_step": 3, "block_size": 5}),  # identity roots at first
        ((4, 9), 1.0, {"interval": 2, "start_step": 4, "block_size": 6, "betas": (0.95, 0.9), "weight_decay": 0.1}),
        ((6, 4), 3000.0, {"interval": 3, "start_step": 7, "block_size": 8}),  # all roots are refused
        ((6,), 1.0, {}),
        ((6, 4), 1.0, {"block_size": 64}),  # defaults: 20 and 101
    ],
)
def test_it_follows_the_authors_code(shape: tuple[int, ...], scale: float, options: dict[str, Any]) -> None:
    gradients = drawn(shape, 12 if "start_step" in options else 125, scale)
    start = np.linspace(-1, 1, int(np.prod(shape))).reshape(shape)
    wanted = author_weights(start, [G.numpy() for G in gradients], lr=0.01, **options)
    for mine, theirs in zip(weights_of(shape, gradients, lr=0.01, **options), wanted, strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs, rtol=0, atol=1e-11)


def test_a_convolution_is_the_matrix_of_its_output_channels() -> None:
    gradients = drawn((4, 3, 2, 2), 8)
    flat = [G.reshape(4, 12) for G in gradients]
    options: dict[str, Any] = {"interval": 2, "start_step": 3}
    for conv, matrix in zip(
        weights_of((4, 3, 2, 2), gradients, **options), weights_of((4, 12), flat, **options), strict=True
    ):
        assert torch.equal(conv.reshape(4, 12), matrix)


def test_a_group_without_preconditioning_is_that_of_vectors() -> None:
    gradients = drawn((6, 4), 10)
    p = torch.nn.Parameter(torch.zeros(6, 4, dtype=torch.float64))
    q = torch.nn.Parameter(torch.zeros(24, dtype=torch.float64))
    groups: list[dict[str, Any]] = [{"params": [p], "precondition": False}, {"params": [q]}]
    both = AuthorCASPR(groups, start_step=2, interval=2)
    for G in gradients:
        p.grad, q.grad = G.clone(), G.reshape(24).clone()
        both.step()
    assert torch.equal(p.detach().reshape(24), q.detach())
    assert "L" not in both.state[p]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_and_roots_of_short_types_are_float32_and_stay_so_in_a_checkpoint(dtype: torch.dtype) -> None:
    """A loaded optimizer goes on bit for bit; and the step is that of float32 to the digits of the type."""
    options: dict[str, Any] = {"interval": 2, "start_step": 2, "lr": 0.01}
    p, q, exact = (torch.nn.Parameter(torch.zeros(6, 4, dtype=t)) for t in (dtype, dtype, torch.float32))
    one, other, wanted = AuthorCASPR([p], **options), AuthorCASPR([q], **options), AuthorCASPR([exact], **options)
    gradients = [G.to(dtype) for G in drawn((6, 4), 8, 50.0)]  # whose squares are no zeros in float16
    for step, G in enumerate(gradients):
        p.grad, exact.grad = G.clone(), G.float()
        one.step()
        wanted.step()
        if step > 3:
            q.grad = G.clone()
            other.step()
            assert torch.equal(p, q)
        elif step == 3:
            q.data.copy_(p.data)
            other.load_state_dict(copy.deepcopy(one.state_dict()))
            for name in ("L", "R", "L_root", "R_root"):
                assert other.state[q][name].dtype == torch.float32
                assert torch.equal(other.state[q][name], one.state[p][name])
    torch.testing.assert_close(p.detach().float(), exact.detach(), rtol=0, atol=0.003)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_an_empty_matrix_is_left_alone(shape: tuple[int, ...]) -> None:
    assert weights_of(shape, [torch.zeros(shape, dtype=torch.float64)] * 3, interval=1, start_step=1)[-1].shape == shape


@pytest.mark.parametrize("bad", [{"lr": -1}, {"betas": (1.0, 0.9)}, {"interval": 0}, {"block_size": 0}, {"eps": -1e-8}])
def test_options_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        AuthorCASPR([torch.nn.Parameter(torch.zeros(2, 2))], **bad)
