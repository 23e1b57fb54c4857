from __future__ import annotations

import gzip
import json
import random

import pytest
from running import Runner


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    home = tmp_path_factory.mktemp("home")
    corpus = home / "corpus"
    corpus.mkdir()
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 6))) for _ in range(200)]

    def write(name: str, documents: int) -> None:
        with gzip.open(corpus / name, "wt", encoding="utf8") as file:
            for _ in range(documents):
                file.write(json.dumps({"text": " ".join(draw.choices(words, k=100))}) + "\n")

    write("c4-train.00000-of-00001.json.gz", 20)  # 20 steps are a little more than one epoch
    write("c4-validation.00000-of-00001.json.gz", 8)
    return Runner(home, tmp_path_factory.mktemp("cache"))
