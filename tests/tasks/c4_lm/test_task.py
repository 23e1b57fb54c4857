"""Loss, metrics and what the runner asks of the task."""

import gzip
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import tasks
from caspr_cli.recipe.schema import C4LMConf
from tasks.base import DataError
from tasks.c4_lm.task import C4LM, Perplexity


@pytest.fixture
def task(conf):
    task = tasks.load(conf(), seed=0)
    task.prepare()
    return task


def batch_of(task, count, split="train"):
    data = task.dataset(split)
    return torch.stack([data[i] for i in range(count)])


def test_loss_is_the_mean_cross_entropy_of_the_next_token(task):
    model, batch = task.model(), batch_of(task, 3)
    logs = model(batch[:, :-1]).log_softmax(-1)
    direct = [-logs[b, t, batch[b, t + 1]] for b in range(3) for t in range(16)]
    torch.testing.assert_close(task.loss(model, batch), torch.stack(direct).mean())
    assert task.units(batch) == 3 * 16
    assert task.unit == "tokens"


def test_loss_falls(task):
    torch.manual_seed(0)
    model, batch = task.model(), batch_of(task, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    start = task.loss(model, batch).item()
    for _ in range(20):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    assert task.loss(model, batch).item() < start - 1


@torch.no_grad()
def test_metric_is_the_direct_value_whatever_the_batches(conf, shards):
    # plain ASCII, so that no window cuts a character in two and all targets decode
    with gzip.open(shards / "c4-validation.00000-of-00001.json.gz", "wt") as file:
        file.writelines(json.dumps({"text": f"Document number {i} of the shard."}) + "\n" for i in range(30))
    task = C4LM(conf(), seed=0)
    torch.manual_seed(0)
    model, data = task.model().eval(), task.dataset("validation")
    everything = batch_of(task, len(data), "validation")
    logits, targets = model(everything[:, :-1]), everything[:, 1:]
    nats = F.cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), reduction="sum").item()
    text = task._corpus.tokenizer.decode(targets.flatten().tolist())  # leaves out the ends of documents
    for size in (1, 3, len(data)):
        metric = task.metrics()
        for batch in DataLoader(data, size):
            task.evaluate(model, batch, metric)
        found = {name: value.item() for name, value in metric.compute().items()}
        loss = nats / targets.numel()
        assert found["loss"] == pytest.approx(loss, rel=1e-6)
        assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-6)


def test_bits_per_byte_by_hand():
    # two tokens of 3 and 1 bytes and an end of document, each given probability 1/4: 6 bits over 4 bytes
    metric = Perplexity(torch.tensor([0, 1, 3, 2]))
    metric.update(torch.zeros(1, 3, 4), torch.tensor([[2, 1, 0]]))
    found = metric.compute()
    assert found["bits_per_byte"].item() == pytest.approx(1.5)
    assert found["loss"].item() == pytest.approx(math.log(4))
    assert found["perplexity"].item() == pytest.approx(4)
    metric.reset()
    metric.update(torch.zeros(1, 1, 4), torch.tensor([[1]]))
    assert metric.compute()["bits_per_byte"].item() == pytest.approx(2)


def test_metric_sums_are_double_and_summed_over_ranks():
    metric = Perplexity(torch.ones(4, dtype=torch.long))
    for state in ("nats", "tokens", "bytes"):
        assert getattr(metric, state).dtype == torch.float64
        assert metric._reductions[state] is not None
    metric.half()  # a model's precision must not reach the sums
    assert metric.nats.dtype == torch.float64
    assert not metric.state_dict()


def test_preconditioned_are_the_matrices_of_the_blocks(task):
    model = task.model()
    plain, parameters = task.plain(model), dict(model.named_parameters())
    assert plain == {"embedding.weight": "embedding"} | {name: "norm" for name in parameters if "norm" in name}
    assert len(parameters) - len(plain) == 6 * 2


def test_train_flops_agree_with_torchs_counter(task):
    model = task.model()
    # only the kernel that spells attention out is seen by torch's counter on a CPU; it skips nothing
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        task.loss(model, batch_of(task, 4)).backward()
    assert task.train_flops(model) == counter.get_total_flops()


def test_model_follows_torchs_seed(conf):
    states = []
    for seed in (0, 1):  # the task's own seed has no part in it
        torch.manual_seed(7)
        states.append(C4LM(conf(), seed).model().state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_describe_data(task, library):
    found = task.describe_data()
    assert found["name"] == "c4"
    assert found["source"] == "files"
    assert found["hash"] == task._corpus.directory.name
    assert found["vocab_size"] <= 300
    assert found["splits"]["train"]["documents"] == 60
    assert set(found["splits"]["test"]) == {"documents", "tokens", "bytes"}
    assert "python" not in found
    sample = C4LM(C4LMConf(vocab_size=300, sequence=8), seed=0).describe_data()
    assert sample["python"]


def test_a_second_process_need_not_prepare(conf, task):
    other = C4LM(conf(), seed=0)
    assert torch.equal(other.dataset("test")[0], task.dataset("test")[0])


@pytest.mark.parametrize(
    "change",
    [{"vocab_size": 256}, {"heads": 3}, {"heads": 16}, {"dropout": 1.0}, {"layers": 0}, {"sequence": 0}],
)
def test_impossible_shapes_name_their_key(conf, change):
    with pytest.raises(DataError, match=rf"^task\.{next(iter(change))}: "):
        C4LM(conf(**change), seed=0)
