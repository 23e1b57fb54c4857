"""The methods that the runner calls on every task, on small data in its real format."""

import io
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from written import SMALL, recipe

from caspr_cli import tasks
from caspr_cli.optim import CASPR
from caspr_cli.recipe.schema import Source
from caspr_cli.tasks.base import SPLITS, DataError, Task
from caspr_cli.tasks.metrics import Means

UNITS = {"c4_lm": "tokens", "ud_pos": "words", "ogbg_molpcba": "graphs", "resnet": "images", "vit": "images"}
# What is preconditioned of each model, and how many parameters that are; of the others, some with their reasons.
CHOSEN = {
    "c4_lm": (r"blocks\.\d\.(attention\.(query|key|value|output)|up|down)\.weight", 12),
    "ud_pos": (r"blocks\.\d\.(attention\.(query|key|value|output)|up|down)\.weight|spelling\.filters\.weight", 13),
    "ogbg_molpcba": (r".*dense\.weight|(node|edge)_embedding\.weight", 8),
    "resnet": (r"conv1\.weight|layer\d\.\d\.(conv\d|downsample\.0)\.weight", 12),
    "vit": (r"blocks\.\d\.(attention\.(query|key|value|output)|up|down)\.weight|patches\.weight", 13),
}
REASONS = {
    "c4_lm": {"embedding.weight": "embedding", "norm.weight": "norm"},
    "ud_pos": {"head.weight": "head", "embedding.weight": "embedding", "spelling.embedding.weight": "embedding"},
    "ogbg_molpcba": {"decoder.weight": "head", "decoder.bias": "bias", "steps.0.edge.norm.weight": "norm"},
    "resnet": {"fc.weight": "head", "fc.bias": "bias", "layer2.0.downsample.1.weight": "norm", "bn1.bias": "norm"},
    "vit": {"class_token": "class token", "position": "position embedding", "head.weight": "head",
            "patches.bias": "bias", "norm.weight": "norm"},
}  # fmt: skip
# FLOPs of the gradient by the input, which torch's counter counts as nobody asks for it: 2 x images x what is convolved
INPUT = {"resnet": 2 * 4 * 4 * 4 * 4 * 3 * 7 * 7, "vit": 2 * 4 * 2 * 2 * 16 * 3 * 4 * 4}
IMPOSSIBLE = {
    "c4_lm": [{"vocab_size": 256}, {"heads": 3}, {"heads": 16}],
    "ud_pos": [{"heads": 3}, {"width": 17, "heads": 1}],
    "resnet": [{"depth": 20}, {"stem": 3}],
    "vit": [{"patch": 5}, {"heads": 3}],
}

Load = Callable[..., Task]


@pytest.fixture(params=SMALL)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def load(name: str, tmp_path: Path) -> Load:
    root = SMALL[name][0](tmp_path / "data")

    def make(seed: int = 0, **changes: Any) -> Task:
        return tasks.load(recipe(name, root, **changes), seed)

    return make


@pytest.fixture
def task(load: Load) -> Task:
    found = load()
    found.prepare()
    torch.manual_seed(0)
    return found


def samples(task: Task, split: Any = "train", count: int | None = None) -> list[Any]:
    data: Any = task.dataset(split)
    return [data[i] for i in range(len(data) if count is None else count)]


def flat(value: Any) -> list[Any]:
    """The numbers of a sample or a batch."""
    if isinstance(value, (list, tuple)):
        return [flat(part) for part in value]
    if isinstance(value, dict) or hasattr(value, "to_dict"):
        parts = value if isinstance(value, dict) else value.to_dict()
        return [flat(parts[key]) for key in sorted(parts)]
    found: list[Any] = torch.as_tensor(value).tolist()
    return found


def scalars(metric: Any) -> dict[str, float]:
    return {key: value.item() for key, value in metric.compute().items()}


def test_a_data_set_has_an_end_and_goes_to_other_processes(task: Task) -> None:
    for split in SPLITS:
        data: Any = task.dataset(split)
        pickled = pickle.dumps(data)
        assert task.unit == "words" or len(pickled) < 1000  # sentences are not in the cache
        again = pickle.loads(pickled)
        assert [flat(sample) for sample in data] == [flat(sample) for sample in again]
        with pytest.raises(IndexError):
            data[len(data)]


def test_a_second_process_need_not_prepare_and_has_the_same_data(task: Task, load: Load) -> None:
    other = load(seed=1)
    for split in SPLITS:
        assert flat(samples(other, split)) == flat(samples(task, split))
    assert flat(other.collate(samples(other))) == flat(task.collate(samples(task)))
    assert other.describe_data() == task.describe_data()


def test_what_is_said_of_the_data(name: str, task: Task) -> None:
    found = json.loads(json.dumps(task.describe_data()))
    assert found["source"] == "files"
    assert re.fullmatch("[0-9a-f]{16}", found["hash"])
    assert task.unit == UNITS[name]
    for split in SPLITS:
        units = task.units(task.collate(samples(task, split)))
        said = found["splits"][split][task.unit]
        # windows leave out what does not fill one, and long sentences are cut in training alone
        assert 0 <= said - units <= (16 if name == "c4_lm" else 0)


def test_initial_weights_depend_on_torchs_seed_alone(task: Task, load: Load) -> None:
    states = []
    for seed, torchs in ((0, 7), (1, 7), (0, 8)):
        torch.manual_seed(torchs)
        states.append(load(seed).model().state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert not all(torch.equal(value, states[2][key]) for key, value in states[0].items())
    learned = {key for key, _ in task.model().named_parameters()}
    assert {key for key in states[0] if ".bn" not in key and "downsample.1" not in key and key[:2] != "bn"} <= learned


def test_loss_falls_under_caspr(task: Task) -> None:
    model, batch = task.model(), task.collate(samples(task, count=12))
    plain = task.plain(model)
    chosen = [p for key, p in model.named_parameters() if key not in plain]
    others = [p for key, p in model.named_parameters() if key in plain]
    groups = [{"params": chosen}, {"params": others, "precondition": False}]
    optimizer = CASPR(groups, lr=2e-2, interval=2, start_step=2)
    start = task.loss(model, batch).item()
    for _ in range(30):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    assert task.loss(model, batch).item() < 0.7 * start


@torch.no_grad()
def test_metrics_are_the_same_whatever_the_batches_and_ranks(task: Task) -> None:
    model, data = task.model().double().eval(), samples(task, "validation")
    whole = task.collate(data)
    expected = None
    for size in (len(data), 1, 3):
        ranks: Any = [task.metrics(), task.metrics()]
        for i, batch in enumerate(DataLoader(data, size, collate_fn=task.collate)):  # type: ignore[arg-type]
            task.evaluate(model, batch, ranks[i % 2])
        if size < len(data):
            ranks[0].merge_state(ranks[1])
        found = scalars(ranks[0])
        expected = expected or found
        assert found == pytest.approx(expected, rel=1e-6, nan_ok=True)
        assert found["loss"] == pytest.approx(task.loss(model, whole).item(), rel=1e-6)


def test_sums_of_metrics_are_double_and_in_no_checkpoint(task: Task) -> None:
    metric: Any = task.metrics()
    assert isinstance(metric, Means)
    metric.half()  # a model's precision must not reach the sums
    sums = list(dict.fromkeys(state for _, *pair in metric.means for state in pair))
    assert {getattr(metric, state).dtype for state in sums} == {torch.float64}
    assert not metric.state_dict()
    # torchmetrics adds up over ranks what comes first, second, ... on each: a set has another order in each process
    assert list(metric._reductions)[: len(sums)] == sums


def test_what_is_preconditioned(name: str, task: Task) -> None:
    model = task.model()
    plain, parameters = task.plain(model), dict(model.named_parameters())
    pattern, count = CHOSEN[name]
    assert set(parameters) - set(plain) == {key for key in parameters if re.fullmatch(pattern, key)}
    assert len(parameters) - len(plain) == count
    assert plain | REASONS[name] == plain
    assert all(plain[key] == "norm" for key in plain if "norm" in key)


def test_train_flops_agree_with_torchs_counter(name: str, load: Load) -> None:
    size = {"ud_pos": 40, "ogbg_molpcba": 12}.get(name, 4)  # there the whole training split, whose mean counts
    for changes in ({}, {"characters": False}) if name == "ud_pos" else ({},):
        task = load(batch_size=size, **changes)
        model, batch = task.model(), task.collate(samples(task, count=size))
        # only the kernel that spells attention out is seen by torch's counter on a CPU
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            task.loss(model, batch).backward()
        assert task.train_flops(model) == pytest.approx(counter.get_total_flops() + INPUT.get(name, 0), rel=1e-9)


def test_dropout_acts_in_training_alone(name: str, load: Load) -> None:
    if name == "resnet":
        pytest.skip("has no dropout")
    task = load(dropout=0.5)
    model, batch = task.model(), task.collate(samples(task, count=8))
    parts = (task.loss(model.train(training), batch).item() for training in (True, True, False, False))
    one, other, still, same = parts
    if name != "vit":  # whose head is zero
        assert one != other
    assert still == same
    torch.manual_seed(0)
    plain = load(dropout=0.0)
    fresh = plain.model()
    fresh.load_state_dict(model.state_dict())
    assert plain.loss(fresh.eval(), batch).item() == still


def test_bfloat16_autocast_stays_close(task: Task) -> None:
    model, batch = task.model().eval(), task.collate(samples(task, count=8))
    with torch.autocast("cpu", torch.bfloat16):
        rough = task.loss(model, batch)
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, task.loss(model, batch), rtol=0.05, atol=0.02)


@pytest.mark.parametrize(("of", "change"), [(of, change) for of, changes in IMPOSSIBLE.items() for change in changes])
def test_impossible_keys_are_named(of: str, change: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=rf"^task\.{next(iter(change))}: "):
        tasks.load(recipe(of, None, **change), 0)


@pytest.mark.parametrize("of", ["c4_lm", "ud_pos", "ogbg_molpcba"])
def test_without_a_network_it_says_what_to_do_instead(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = ConnectionError("Couldn't reach it on the Hub\nand a page of more")
    monkeypatch.setattr(datasets, "load_dataset", Mock(side_effect=gone))
    limits = {"train_documents": 5, "eval_documents": 2} if of == "c4_lm" else {}
    with pytest.raises(DataError) as caught:
        tasks.load(recipe(of, None, data=Source.hub, **limits), 0).prepare()
    first, *more = str(caught.value).splitlines()
    assert first == "the Hugging Face hub cannot be reached (Couldn't reach it on the Hub)"
    assert 1 <= len(more) <= 2
    assert more[0].startswith("take task.data=sample ")
    assert "task.data=files task.root=DIR" in more[0]


# ---- the cache -----------------------------------------------------------------------------------------------------

CACHED = [name for name in SMALL if name != "ud_pos"]  # a treebank is read anew


def directory_of(task: Any) -> Path:
    found: Path = task.data.directory
    return found


def other_array() -> bytes:
    """An array file of a shape that no data set has."""
    content = io.BytesIO()
    np.save(content, np.zeros((1, 2, 3, 4, 5), np.uint8))
    return content.getvalue()


def read_all(task: Task) -> None:
    task.prepare()
    for split in SPLITS:
        task.dataset(split)
    task.metrics()


@pytest.mark.parametrize("name", CACHED)
def test_what_is_built_is_built_once(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    load().prepare()
    monkeypatch.setattr("caspr_cli.tasks.cache.building", lambda _: pytest.fail("built again"))
    monkeypatch.setattr("caspr_cli.tasks.c4_lm.tokens.building", lambda _: pytest.fail("built again"))
    read_all(load())


@pytest.mark.parametrize("name", CACHED)
def test_a_damaged_cache_says_what_to_delete(load: Load) -> None:
    directory = directory_of(load())
    for path in sorted(directory.iterdir()):
        whole = path.read_bytes()
        expected = f"{path}: damaged; delete {directory} and start again"
        others = [other_array()] if path.suffix == ".npy" else []
        for content in (whole[:-7], b"", *others):
            path.write_bytes(content)
            with pytest.raises(DataError) as caught:
                read_all(load())
            assert str(caught.value) == expected
        if path.name != "meta.json":  # without which all is built anew
            path.unlink()
            with pytest.raises(DataError, match="damaged; delete"):
                read_all(load())
        path.write_bytes(whole)
    read_all(load())
