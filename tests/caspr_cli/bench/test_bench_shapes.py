import math

import pytest

from caspr_cli.bench.shapes import PRESETS, parse_shapes, parse_size, scaled_transformer
from caspr_cli.recipe.errors import ConfigError


def test_counts_ranks_and_presets_are_read() -> None:
    assert parse_shapes("2*3x4, 5 ,6x7x8").shapes == ((3, 4), (3, 4), (5,), (6, 7, 8))
    assert parse_shapes("small,9").shapes == (*PRESETS["small"], (9,))
    assert (parse_shapes("transformer").name, parse_shapes("3x4").name) == ("transformer", "own")
    assert parse_shapes("2*3x4,5").parameters == 29


def test_the_transformer_is_the_one_of_the_documentation() -> None:
    shapes = PRESETS["transformer"]
    matrices = [shape for shape in shapes if len(shape) == 2]
    assert sum(map(math.prod, matrices)) == 4 * (1536 * 512 + 512 * 512 + 2 * 2048 * 512) + 4096 * 512 == 14_680_064
    assert [shape for shape in matrices if shape == (4096, 512)] == [(4096, 512)]
    assert sorted(s for s, *rest in shapes if not rest) == sorted(4 * ([512] * 4 + [1536, 512, 2048, 512]))


def test_small_has_matrices_and_convolutions() -> None:
    assert [PRESETS["small"].count(shape) for shape in ((64, 64), (64, 64, 3, 3))] == [200, 200]


@pytest.mark.parametrize("size", ["300k", "2M", "14M", "1.5B"])
def test_a_size_is_met_within_a_width_step(size: str) -> None:
    wanted, found = parse_size(size), scaled_transformer(size)
    assert found.parameters == pytest.approx(wanted, rel=0.2 if wanted < 1e6 else 0.06)
    assert found.name == f"transformer-{size}"


def test_the_preset_is_its_own_size() -> None:
    exact = str(sum(map(math.prod, PRESETS["transformer"])))
    assert scaled_transformer(exact).shapes == PRESETS["transformer"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4*15y6x512", "cannot read '4*15y6x512'"),
        ("3x4,", "cannot read ''"),
        ("3x", "cannot read '3x'"),
        ("-3x4", "cannot read '-3x4'"),
        ("0*3x4", "'0*3x4' holds nothing"),
        ("3x0", "'3x0' holds nothing"),
        ("3x4,transfomer", "Did you mean transformer?"),
    ],
)
def test_what_cannot_be_read_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_shapes(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["14Q", "M", "0", "-3M", ""])
def test_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="--params: cannot read"):
        scaled_transformer(text)
