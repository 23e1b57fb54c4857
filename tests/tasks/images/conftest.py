"""A cache of its own for each test, and a small folder of images."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from caspr_cli.recipe.schema import Images, ImagesConf, Source

CLASSES = ("cat", "dog", "emu")


def write_image(path: Path, shade: int, size: tuple[int, int] = (8, 8)) -> None:
    """A grey of this shade, with a little noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(shade).integers(0, 5, (size[1], size[0], 3))
    Image.fromarray((shade + noise).astype(np.uint8)).save(path)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's arrays go."""
    monkeypatch.setenv("CASPR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "images"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes with 10 training and 2 test images each, PNG and JPEG, of 8 x 8 pixels."""
    root = tmp_path / "pets"
    for label, name in enumerate(CLASSES):
        for i in range(10):
            write_image(root / "train" / name / f"{i}.{'png' if i % 2 else 'jpg'}", 80 * label + i)
        for i in range(2):
            write_image(root / "test" / name / f"{i}.png", 80 * label + 20 + i)
    return root


@pytest.fixture
def conf(folder: Path) -> Callable[..., ImagesConf]:
    """Recipes over ``folder``."""

    def make(**changes: object) -> ImagesConf:
        given = {"data": Source.files, "images": Images.folder, "root": str(folder), "size": 8, "batch_size": 4}
        return ImagesConf(**{"name": "images", **given, **changes})  # type: ignore[arg-type]

    return make
