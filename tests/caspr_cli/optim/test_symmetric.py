"""Packed symmetric matrices, and products of which one triangle is computed."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from references.stream import random_stream
from torch import Tensor

from caspr_cli.optim.symmetric import (
    LEAST_ROWS,
    MOST_PANELS,
    add_gram,
    pack,
    packed_length,
    panels,
    product,
    trace,
    unpack,
)

SIZES = st.integers(1, 700)
EDGES = [1, 2, 127, 128, 255, 256, 257, 384, 511, 512, 513, 700, 1024]  # where the number of panels changes, and beside


def batch(K: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.stack(random_stream(*shape, steps=K, seed=seed))


def symmetric(K: int, d: int) -> Tensor:
    X = batch(K, d, d)
    return X + X.mT


@given(SIZES)
@settings(max_examples=40, deadline=None)
def test_packing_loses_nothing(d: int) -> None:
    S = symmetric(2, d)
    packed = pack(S)
    assert packed.shape == (2, packed_length(d))
    assert torch.equal(unpack(packed, d), S)
    torch.testing.assert_close(trace(packed, d), S.diagonal(dim1=1, dim2=2).sum(1), rtol=1e-12, atol=1e-12)
    assert torch.equal(unpack(packed, d, torch.float32), S.float())
    assert torch.equal(pack(unpack(packed, d)), packed)


@pytest.mark.parametrize("d", EDGES)
def test_what_is_above_the_panels_is_not_looked_at(d: int) -> None:
    S = symmetric(1, d)
    spoilt = S.clone()
    for rows in panels(d):
        spoilt[:, rows, rows.stop :] = torch.nan
    assert torch.equal(pack(spoilt), pack(S))


@given(st.integers(1, 5000))
def test_panels_cover_the_rows_in_order(d: int) -> None:
    cut = panels(d)
    assert [rows.start for rows in cut] == [0] + [rows.stop for rows in cut[:-1]]
    assert cut[-1].stop == d
    assert len(cut) <= MOST_PANELS
    heights = [rows.stop - rows.start for rows in cut]
    assert max(heights) - min(heights) <= 1
    assert len(cut) == 1 or min(heights) >= LEAST_ROWS


@given(st.integers(1, 5000))
def test_packed_is_five_eighths_at_best(d: int) -> None:
    """More than the lower triangle with its diagonal, never more than the square."""
    assert 0.62 < packed_length(d) / d**2 <= 1
    assert packed_length(d) >= d * (d + 1) // 2
    assert packed_length(4 * d + 4 * LEAST_ROWS) / (4 * d + 4 * LEAST_ROWS) ** 2 == 5 / 8


@example(1024, 20, 0.1)  # of here on high panels are made in halves
@example(1031, 3, 1.0)
@given(SIZES, st.integers(1, 40), st.sampled_from([1.0, 0.1, -0.5, 0.0]))
@settings(max_examples=25, deadline=None)
def test_a_gram_matrix_is_added(d: int, r: int, weight: float) -> None:
    S, X = symmetric(2, d), batch(2, d, r, seed=1)
    packed = pack(S)
    add_gram(packed, X, weight)
    torch.testing.assert_close(unpack(packed, d), S + weight * X @ X.mT, rtol=0, atol=1e-14 * (10 + 10 * r))


@given(SIZES, st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_a_symmetric_product_is_the_product(d: int, r: int) -> None:
    """X C X^T with C symmetric: the two factors differ, the product is symmetric, and made so to the last bit."""
    X, C = batch(2, d, r, seed=2), symmetric(2, r)
    found = product(X @ C, X)
    torch.testing.assert_close(found, X @ C @ X.mT, rtol=0, atol=1e-13 * (10 + r * r))
    for rows in panels(d):  # within a panel both triangles are computed
        assert torch.equal(found[:, rows, : rows.start], found[:, : rows.start, rows].mT)


@pytest.mark.parametrize("d", EDGES)
def test_a_product_of_transposed_factors(d: int) -> None:
    """As in the rotation of statistics: neither factor lies in memory as it is read."""
    S, Q = symmetric(1, d), batch(1, d, d, seed=3)
    torch.testing.assert_close(product(Q.mT, (S @ Q).mT), Q.mT @ S @ Q, rtol=0, atol=1e-13 * (10 + d * d))
