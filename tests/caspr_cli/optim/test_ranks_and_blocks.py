"""Tensors of every rank, how they merge to matrices, and how long axes are cut in blocks."""

import pytest
import torch
from references.drive import bare_updates, relative_error, run, turns_of
from references.kronecker import precondition
from references.optimizer import merged_shape, reference_weights
from references.stream import random_stream, statistics

from caspr_cli.optim import CASPR

BETA = 0.9


def reshaped(tensors, *shape):
    return [tensor.reshape(shape) for tensor in tensors]


@pytest.mark.parametrize(
    ("shape", "merge", "merged"),
    [
        ((2, 3, 4), "matrix", (2, 12)),
        ((4, 3, 3, 3), "matrix", (4, 27)),  # a convolution kernel [out, in, height, width]
        ((1, 3, 4), "matrix", (3, 4)),
        ((3, 1, 4), "matrix", (3, 4)),
        ((3, 4, 1), "matrix", (3, 4)),
        ((1, 3, 2, 1, 2), "matrix", (3, 4)),
        ((1, 5), "matrix", (1, 5)),
        ((5, 1), "matrix", (5, 1)),
        ((2, 4, 8), "square", (8, 8)),
        ((2, 2, 2), "square", (2, 4)),  # 2 | 4 and 4 | 2 tie: the first
        ((6, 2, 2, 2), "square", (6, 8)),
        ((2, 3, 2, 2), "square", (6, 4)),
        ((3, 4), "square", (3, 4)),
    ],
)
def test_merging_is_preconditioning_the_reshaped_tensor(shape, merge, merged):
    gradients = random_stream(*shape, steps=3, seed=2)
    assert merged_shape(shape, merge) == merged
    update = bare_updates(CASPR, gradients, merge=merge, eps=1e-4, beta=BETA, precondition_1d=True)[-1]
    matrices = reshaped(gradients, *merged)
    expected = precondition(matrices[-1], statistics(matrices, "ema", BETA), 1e-4, "relative", 2)
    assert update.shape == shape
    assert relative_error(update.reshape(merged), expected) < 1e-9


def test_one_parameter_in_many_equals_the_parameter_alone():
    """Blocks of one shape may be computed together; that changes nothing for any of them."""
    shapes = [(3, 4), (3, 4), (4, 3), (3, 4), (5,), (2, 3, 2), (7, 4), ()]
    streams = [random_stream(*shape, steps=8, seed=20 + i) for i, shape in enumerate(shapes)]
    options = {"interval": 2, "start_step": 3, "block_size": 4, "lr": 0.1, "betas": (0.9, 0.95)}
    parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for shape in shapes]
    optimizer = CASPR(parameters, **options)
    weights = []
    for gradients in zip(*streams, strict=True):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        weights.append([parameter.detach().clone() for parameter in parameters])
    for index, (shape, gradients) in enumerate(zip(shapes, streams, strict=True)):
        turns = turns_of(optimizer, parameters[index])
        expected = reference_weights(torch.zeros(shape), gradients, turns=turns, **options)
        for step, w in enumerate(expected):
            assert relative_error(weights[step][index], w) < 1e-9


@pytest.mark.parametrize(
    ("shape", "merge", "graft"),
    [((0,), "matrix", "adam"), ((0, 3), "square", "none"), ((3, 0), "none", "adam"), ((2, 0, 3), "matrix", "none"),
     ((2, 0, 3), "square", "adam")],
)  # fmt: skip
def test_an_empty_tensor_is_no_obstacle(shape, merge, graft):
    """It moves nothing, and its neighbour moves as if alone."""
    empty = torch.nn.Parameter(torch.zeros(shape))
    other = torch.nn.Parameter(torch.zeros(3, 4))
    gradients = random_stream(3, 4, steps=3, seed=11, dtype=torch.float32)
    options = {"interval": 1, "start_step": 1, "merge": merge, "graft": graft, "precondition_1d": True}
    optimizer = CASPR([empty, other], lr=0.1, **options)
    expected = run(CASPR, torch.zeros(3, 4), gradients, lr=0.1, **options)
    for gradient, weight in zip(gradients, expected, strict=True):
        empty.grad, other.grad = torch.zeros(shape), gradient
        optimizer.step()
        assert torch.equal(other.detach(), weight)
    assert empty.shape == shape


@pytest.mark.parametrize("merge", ["matrix", "square", "none"])
def test_memory_layout_does_not_matter(merge):
    """A transposed parameter and a channels-last kernel move like their contiguous copies."""
    gradients = random_stream(4, 3, steps=3, seed=12)
    parameter = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64).mT)
    assert not parameter.is_contiguous()
    kernels = random_stream(4, 3, 2, 2, steps=3, seed=13)
    kernel = torch.nn.Parameter(kernels[0].clone().contiguous(memory_format=torch.channels_last))
    options = {"interval": 1, "start_step": 1, "lr": 0.1, "merge": merge}
    optimizer = CASPR([parameter, kernel], **options)
    expected = run(CASPR, torch.zeros(4, 3, dtype=torch.float64), gradients, **options)
    expected_kernel = run(CASPR, kernels[0], kernels, **options)
    for step in range(3):
        parameter.grad = gradients[step].mT.contiguous().mT
        kernel.grad = kernels[step].contiguous(memory_format=torch.channels_last)
        optimizer.step()
        assert relative_error(parameter.detach(), expected[step]) < 1e-12
        assert relative_error(kernel.detach(), expected_kernel[step]) < 1e-12
    assert not parameter.is_contiguous()
    assert kernel.is_contiguous(memory_format=torch.channels_last)


def test_gradients_are_left_as_they_were():
    gradient = random_stream(3, 4, steps=1, seed=14)[0]
    parameter = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    for maximize in (False, True):
        optimizer = CASPR([parameter], interval=1, start_step=1, weight_decay=0.1, maximize=maximize)
        parameter.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(parameter.grad, gradient)
