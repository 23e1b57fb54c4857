"""Inverse roots of statistics that eigensolvers find hard."""

import pytest
import torch
from torch import Tensor

from caspr_cli.optim import CASPR
from caspr_cli.optim.probe import diagnose
from caspr_cli.optim.roots import eigendecomposition, eigh_root


def one_tap_in(taps: int, channels: int, rank: int, dtype: torch.dtype) -> Tensor:
    """The statistic of a convolution of which one tap in ``taps`` sees an input: zeros around a full block."""
    torch.manual_seed(0)
    X = torch.zeros(channels * taps, rank, dtype=torch.float64)
    X[taps // 2 :: taps] = torch.randn(channels, rank, dtype=torch.float64)
    return (X @ X.mT).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("taps", "channels", "rank"), [(1, 96, 400), (2, 288, 5), (9, 16, 400), (9, 64, 5), (9, 128, 5), (9, 128, 400)]
)
def test_zeros_between_do_not_stop_the_solver(taps: int, channels: int, rank: int, dtype: torch.dtype) -> None:
    S = one_tap_in(taps, channels, rank, dtype)
    values, Q = eigendecomposition(S[None])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(Q[0] * values[0] @ Q[0].mT, S, rtol=0, atol=tolerance * float(S.max()))
    torch.testing.assert_close(values[0].double(), torch.linalg.eigvalsh(S.double()), rtol=0,
                               atol=tolerance * float(S.max()))  # fmt: skip


def low_rank(seed: int) -> Tensor:
    """The statistic of few gradients of which most rows are zero, for some seeds of which MKL returns NaN."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(192, generator=generator)[:88]
    rank = int(torch.randint(2, 12, (1,), generator=generator))
    X, noise = torch.zeros(192, rank), torch.randn(88, rank, generator=generator)
    X[rows] = noise * (torch.rand(88, rank, generator=generator) > 0.3) * torch.logspace(1.7, -4, rank)
    return X @ X.T


@pytest.mark.parametrize("seed", [17, 20, 25, 69, 97, 107, 164])
def test_eigenvalues_that_the_solver_did_not_find_are_found(seed: int) -> None:
    """There it fails, or returns NaN, for one such matrix in eight."""
    S = low_rank(seed)
    values, Q = eigendecomposition(S[None])
    atol = 2e-5 * float(S.diagonal().max())
    torch.testing.assert_close(values[0].double(), torch.linalg.eigvalsh(S.double()), rtol=0, atol=atol)
    torch.testing.assert_close(Q[0] * values[0] @ Q[0].mT, S, rtol=0, atol=atol)


def test_one_matrix_of_a_batch_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the library here does with it."""
    S, calls = torch.stack([torch.eye(3), 2 * torch.eye(3)]), list[Tensor]()
    decompose = torch.linalg.eigh

    def broken(S: Tensor, **options: str) -> tuple[Tensor, Tensor]:
        calls.append(S)
        values, Q = decompose(S, **options)
        if len(calls) == 1:
            values[1, 0] = torch.nan
        return values, Q

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    values, _ = eigendecomposition(S)
    assert torch.equal(values[0], torch.ones(3))
    torch.testing.assert_close(values[1], torch.full((3,), 2.0))
    assert torch.equal(calls[1][0], S[0])
    assert not torch.equal(calls[1][1], S[1])


@pytest.mark.parametrize("p", [2, 4])
def test_the_root_is_that_of_float64(p: int) -> None:
    S = one_tap_in(9, 32, 400, torch.float32)
    found = eigh_root(S[None], lambda largest: 1e-4 * largest, p).A[0].double()
    block = S[4::9, 4::9].double()  # the zeros come out as (eps lambda_max)^(-1/p), and mix with nothing
    values, Q = torch.linalg.eigh(block)
    damping = 1e-4 * values[-1]
    expected = torch.eye(len(S), dtype=torch.float64) * damping ** (-1 / p)
    expected[4::9, 4::9] = Q @ torch.diag((values + damping) ** (-1 / p)) @ Q.mT
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.max()))


def test_a_convolution_on_one_pixel_trains() -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(64, 96, 3, padding=1)
    optimizer = CASPR(conv.parameters(), lr=1e-2, interval=2, start_step=1)
    x, y = torch.randn(32, 64, 1, 1), torch.randn(32, 96, 1, 1)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (conv(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.isfinite(values).all() for values in diagnose(optimizer).values())
