"""A small folder of images."""

from collections.abc import Callable
from pathlib import Path

import pytest
from written import write_folder

from caspr_cli.recipe.schema import Source
from caspr_cli.tasks.registry import Images, ImagesConf


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "pets")


@pytest.fixture
def conf(folder: Path) -> Callable[..., ImagesConf]:
    """Recipes over ``folder``."""

    def make(**changes: object) -> ImagesConf:
        given = {"data": Source.files, "images": Images.folder, "root": str(folder), "size": 8, "batch_size": 4}
        return ImagesConf(**{"name": "images", **given, **changes})  # type: ignore[arg-type]

    return make
