"""Sets of parameter shapes: presets, what a user writes, and a transformer of a given size. No torch."""

import math
import re
from dataclasses import dataclass

from caspr_cli.common.errors import nearest
from caspr_cli.recipe.errors import ConfigError

Shape = tuple[int, ...]

LAYERS = 4
WIDTH = 512  # of the preset
UNITS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9}
STEP = 8  # widths that --params chooses are multiples of it


@dataclass(frozen=True)
class ShapeSet:
    name: str
    shapes: tuple[Shape, ...]

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


def layer(width: int) -> tuple[Shape, ...]:
    """Return the matrices of a transformer's layer: attention in and out, MLP up and down; 12 width^2 numbers."""
    return (3 * width, width), (width, width), (4 * width, width), (width, 4 * width)


def transformer(width: int) -> tuple[Shape, ...]:
    """Return four layers (matrices, their biases and two norms each) and an output layer.

    The matrices hold 56 width^2 numbers, the vectors 52 width.
    """
    norms = ((width,),) * 4  # weight and bias of two
    biases = tuple((rows,) for rows, _ in layer(width))
    return (*layer(width), *norms, *biases) * LAYERS + ((8 * width, width),)


def _llama(width: int, hidden: int, keys: int, layers: int) -> tuple[tuple[Shape, ...], int]:
    """Return the matrices of all layers: query, key, value, output; gate, up, down; and how many numbers the rest has.

    Keys and values have as many columns as ``keys``: ``width`` unless heads share them.
    """
    attention = (width, width), (keys, width), (keys, width), (width, width)
    matrices = (*attention, (hidden, width), (hidden, width), (width, hidden)) * layers
    return matrices, (2 * 32000 + 2 * layers + 1) * width


# Models that --model names: the matrices that are preconditioned, and how many numbers the rest has. Llamas are those
# of arXiv:2401.02385 (TinyLlama), arXiv:2302.13971 and arXiv:2307.09288.
MODELS = {
    "gpt2-small": (layer(768) * 12, (50257 + 1024) * 768 + (13 * 12 + 2) * 768),
    "gpt2-1.5b": (layer(1600) * 48, (50257 + 1024) * 1600 + (13 * 48 + 2) * 1600),
    "llama-1.1b": _llama(2048, 5632, 256, 22),
    "llama-7b": _llama(4096, 11008, 4096, 32),
    "llama-70b": _llama(8192, 28672, 1024, 80),
}
PRESETS: dict[str, tuple[Shape, ...]] = {
    "medium": transformer(WIDTH // 2),
    "transformer": transformer(WIDTH),
    "small": ((64, 64),) * 200 + ((64, 64, 3, 3),) * 200,
}


def parse_shapes(text: str) -> ShapeSet:
    """Return the set that ``--shapes`` names: comma-separated ``[COUNT*]SIZExSIZE...`` or names of presets.

    Raises ConfigError for a part that cannot be read.
    """
    parts = [part.strip() for part in text.split(",")]
    shapes = tuple(shape for part in parts for shape in _part(part))
    return ShapeSet(text if text in PRESETS else "own", shapes)


def _part(part: str) -> tuple[Shape, ...]:
    if part in PRESETS:
        return PRESETS[part]
    match = re.fullmatch(r"(?:(\d+)\s*\*\s*)?(\d+(?:x\d+)*)", part)
    if match is None:
        hint = nearest(part, PRESETS) or f" (presets: {', '.join(PRESETS)})"
        raise ConfigError(f"--shapes: cannot read '{part}': write COUNT*ROWSxCOLUMNS, as in 4*1536x512.{hint}")
    count, shape = int(match[1] or 1), tuple(map(int, match[2].split("x")))
    if count < 1 or min(shape) < 1:
        raise ConfigError(f"--shapes: '{part}' holds nothing: counts and sizes are at least 1")
    return (shape,) * count


def parse_size(text: str) -> int:
    """Return ``14M``, ``1.5B``, ``300k`` or ``14000000`` as a number. Raises ConfigError if it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmbg]?)", text.strip().lower())
    size = round(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1:
        raise ConfigError(f"--params: cannot read '{text}': a number of parameters is written as in 14M, 300k or 1.5B")
    return size


def scaled_transformer(text: str) -> ShapeSet:
    """Return the preset ``transformer`` in the width that comes nearest to the parameters in ``--params``."""
    size = parse_size(text)
    width = (math.sqrt(52**2 + 4 * 56 * size) - 52) / (2 * 56)
    return ShapeSet(f"transformer-{text.strip()}", transformer(max(STEP, STEP * round(width / STEP))))
