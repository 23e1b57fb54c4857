"""Loss, metrics and what the runner asks of the task."""

import math

import pytest
import torch

from caspr_cli.tasks.c4_lm.metric import Perplexity
from caspr_cli.tasks.c4_lm.task import C4LM
from caspr_cli.tasks.registry import C4LMConf


def test_loss_is_the_mean_cross_entropy_of_the_next_token(conf):
    task = C4LM(conf(), seed=0)
    model, data = task.model(), task.dataset("train")
    batch = torch.stack([data[i] for i in range(3)])
    logs = model(batch[:, :-1]).log_softmax(-1)
    direct = [-logs[b, t, batch[b, t + 1]] for b in range(3) for t in range(16)]
    torch.testing.assert_close(task.loss(model, batch), torch.stack(direct).mean())
    assert task.units(batch) == 3 * 16


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


def test_describe_data(conf, library):
    task = C4LM(conf(), seed=0)
    found = task.describe_data()
    assert (found["name"], found["hash"]) == ("c4", task.data.directory.name)
    assert found["splits"]["train"]["documents"] == 60
    assert "python" not in found
    assert C4LM(C4LMConf(vocab_size=300, sequence=8), seed=0).describe_data()["python"]
