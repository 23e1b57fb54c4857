"""Loss and metrics."""

import math

import pytest
import torch
from torch.utils.data import DataLoader
from written import batch_of

from caspr_cli.tasks.ud_pos.data import PADDING, UNKNOWN, UNSEEN, UNTAGGED
from caspr_cli.tasks.ud_pos.metric import Accuracy
from caspr_cli.tasks.ud_pos.task import Tagging


def arguments(batch):
    return batch["words"], batch["spellings"], batch["spelled"]


def test_loss_is_the_mean_cross_entropy_of_the_words(task):
    model, batch = task.model().eval(), batch_of(task, 5)
    logs = model(*arguments(batch)).log_softmax(-1)
    words, tags = batch["words"], batch["tags"]
    direct = [-logs[b, t, tags[b, t]] for b, t in (words != PADDING).nonzero().tolist()]
    torch.testing.assert_close(task.loss(model, batch), torch.stack(direct).mean())
    assert task.units(batch) == len(direct) == sum(len(task.dataset("train")[i][0]) for i in range(5))
    assert len(direct) < words.numel()


def test_training_hides_words_as_often_as_they_are_rare(conf):
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, words, spellings, spelled):
            seen.append(words)
            return torch.zeros(*words.shape, 3, requires_grad=True)

    words = torch.tensor([[2, 3, UNKNOWN, PADDING]]).repeat(20_000, 1)
    counts = torch.tensor([[1, 9, 0, 0]]).repeat(20_000, 1)
    batch = {"words": words, "counts": counts, "tags": torch.zeros_like(words)}
    task = Tagging(conf(word_dropout=1.0), seed=0)
    torch.manual_seed(0)
    task.loss(Spy(), batch)
    assert (seen[0] == UNKNOWN).double().mean(0).tolist() == pytest.approx([1 / 2, 1 / 10, 1, 0], abs=0.01)
    torch.manual_seed(0)
    task.loss(Spy(), batch)
    assert torch.equal(seen[1], seen[0])  # from torch's generator alone
    task.loss(Spy().eval(), batch)
    Tagging(conf(word_dropout=0.0), seed=0).loss(Spy(), batch)
    assert torch.equal(seen[2], words)
    assert torch.equal(seen[3], words)


def test_metric_by_hand():
    metric = Accuracy()
    # class 1 has probability 3/4 everywhere; two words of it, one of class 0, one unseen, one untagged, one padding
    logits = torch.tensor([0.0, math.log(3)]).expand(2, 3, 2)
    tags = torch.tensor([[1, 1, 0], [UNSEEN, UNTAGGED, UNTAGGED]])
    words = torch.tensor([[5, UNKNOWN, UNKNOWN], [UNKNOWN, 5, PADDING]])
    metric.update(logits, tags, words)
    found = {name: value.item() for name, value in metric.compute().items()}
    loss = (2 * math.log(4 / 3) + math.log(4)) / 3
    assert found == pytest.approx({"loss": loss, "accuracy": 2 / 4, "unknown_accuracy": 1 / 3})


def test_no_unknown_words_and_no_words():
    metric = Accuracy()
    metric.update(torch.zeros(1, 2, 3), torch.tensor([[0, 1]]), torch.tensor([[4, 5]]))
    assert metric.compute()["accuracy"] == 0.5
    assert metric.compute()["unknown_accuracy"].isnan()
    metric.update(torch.zeros(1, 1, 3), torch.tensor([[UNSEEN]]), torch.tensor([[4]]))
    assert metric.compute()["loss"].item() == pytest.approx(math.log(3))
    assert metric.compute()["accuracy"].item() == pytest.approx(1 / 3)


def test_a_tag_that_training_has_not(conf, root):
    path = root / "xx_small-ud-dev.conllu"
    path.write_text(path.read_text().replace("ADJ", "SYM"))
    task = Tagging(conf(), seed=0)
    task.prepare()
    batch, metric = batch_of(task, 10, "validation"), task.metrics()
    assert (batch["tags"] == UNSEEN).any()
    task.evaluate(task.model(), batch, metric)
    found = metric.compute()
    assert found["loss"].isfinite()
    assert metric.words == task.units(batch) > metric.scored


def test_train_flops_are_those_of_a_mean_batch(task):
    model = task.model()
    batches = [task._batch_flops(batch) for batch in DataLoader(task.dataset("train"), 4, collate_fn=task.collate)]
    assert min(batches) < task.train_flops(model) < max(batches)
    assert task.train_flops(model) == pytest.approx(sum(batches) / len(batches), rel=0.2)


def test_describe_data(task):
    found = task.describe_data()
    assert (found["name"], found["tags"], found["vocab_size"]) == ("xx_small", 4, 7 + 2)
    assert (found["splits"]["train"]["sentences"], found["splits"]["train"]["unknown"]) == (40, 0.0)
    assert found["splits"]["test"]["unknown"] > 0.1
