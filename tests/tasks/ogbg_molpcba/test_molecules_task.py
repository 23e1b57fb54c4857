"""Batches, loss and metric."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from torch.utils.data import DataLoader
from torch_geometric.data import Batch, Data
from written import batch_of

from caspr_cli.tasks.ogbg_molpcba.graphs import MISSING
from caspr_cli.tasks.ogbg_molpcba.metric import MeanAveragePrecision, average_precision

# ---- batches ------------------------------------------------------------------------------------------------------


def test_a_batch_is_what_torch_geometric_makes_of_its_graphs(task):
    graphs = [task.dataset("train")[i] for i in range(7)]
    plain = [
        Data(
            x=torch.tensor(g.nodes),
            edge_index=torch.tensor(g.edges.astype(np.int64).T.copy()),
            edge_attr=torch.tensor(g.bonds),
            y=torch.tensor(g.labels)[None],
        )
        for g in graphs
    ]
    expected, found = Batch.from_data_list(plain), task.collate(graphs)
    assert isinstance(found, Batch)
    assert set(found.keys()) == set(expected.keys())
    for key in expected.keys():  # noqa: SIM118 (a Batch is no mapping)
        assert torch.equal(found[key], expected[key]), key
        assert found[key].dtype == expected[key].dtype
    assert found.num_graphs == expected.num_graphs == task.units(found) == 7
    assert found.to("meta").x.device.type == "meta"


def test_batches_hold_no_part_of_the_mapped_files(task):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of tensors that share memory with what must not be written
        batch = next(iter(DataLoader(task.dataset("train"), 1, collate_fn=task.collate)))
    batch.x.add_(1)


# ---- loss ---------------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_over_observed_cells(task):
    model, batch = task.model(), batch_of(task, 12)
    model.eval()
    p = model(batch).double().sigmoid()
    direct = [
        -(p[b, t] if batch.y[b, t] == 1 else 1 - p[b, t]).log()
        for b in range(12)
        for t in range(5)
        if batch.y[b, t] != MISSING
    ]
    assert 12 < len(direct) < 60
    torch.testing.assert_close(task.loss(model, batch), torch.stack(direct).mean().float())
    batch.y.fill_(MISSING)
    batch.y[0, 0] = 1  # a single cell is its own mean
    torch.testing.assert_close(task.loss(model, batch), -F.logsigmoid(model(batch)[0, 0]))


def test_a_batch_with_nothing_observed_gives_zero_and_no_nan(task):
    model, batch = task.model(), batch_of(task, 3)
    batch.y.fill_(MISSING)
    loss = task.loss(model, batch)
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in model.parameters())
    metric = task.metrics()
    task.evaluate(model, batch, metric)
    task.evaluate(model, batch_of(task, 12), metric)
    assert all(value.isfinite() for value in metric.compute().values())


# ---- metric -------------------------------------------------------------------------------------------------------


def scored(rows, tasks, seed, levels=None):
    """Logits that know something of the labels (``levels``: that many values, so that they tie), a third missing."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 2, (rows, tasks), generator=draw).to(torch.int8)
    logits = torch.randn(rows, tasks, generator=draw) + labels
    if levels:
        logits = (logits * levels / 6).round()
    return logits, labels


def by_sklearn(logits, labels):
    found = []
    for t in range(labels.shape[1]):
        seen = labels[:, t] != MISSING
        truth = labels[seen, t].numpy()
        if 0 < truth.sum(dtype=int) < len(truth):
            found.append(average_precision_score(truth, logits[seen, t].numpy()))
    return np.mean(found)


@pytest.mark.parametrize(("rows", "levels"), [(300, None), (300, 5), (300, 1), (20_000, None), (20_000, 200)])
def test_metric_is_that_of_scikit_learn_whatever_the_batches(rows, levels):
    logits, labels = scored(rows, 6, seed=rows, levels=levels)
    labels[:, 4] = labels[:, 4].clamp(max=0)  # no positive one
    labels[:, 5] = MISSING
    cells = labels != MISSING
    losses = F.binary_cross_entropy_with_logits(logits.double(), labels.clamp(min=0).double(), reduction="none")
    for size in (rows, 77):
        metric = MeanAveragePrecision(6)
        for a, b in zip(logits.split(size), labels.split(size), strict=True):
            metric.update(a, b)
        found = metric.compute()
        assert found["map"].item() == pytest.approx(by_sklearn(logits, labels), abs=1e-6)
        assert found["loss"].item() == pytest.approx(losses[cells].mean().item(), rel=1e-6)


def test_large_logits_are_not_made_equal():
    # beyond 17 the sigmoid of a float32 is 1
    logits, labels = torch.tensor([40.0, 30.0, 20.0, -300.0]), torch.tensor([1, 0, 1, 0])
    assert average_precision(logits, labels).item() == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(torch.zeros(4), labels).item() == pytest.approx(0.5)


def test_a_label_without_both_classes_has_no_score():
    logits = torch.arange(3.0)
    assert average_precision(logits, torch.tensor([1, 1, MISSING])) is None
    assert average_precision(logits, torch.tensor([0, MISSING, 0])) is None
    assert average_precision(logits, torch.full((3,), MISSING)) is None
    metric = MeanAveragePrecision(1)
    metric.update(logits[:, None], torch.ones(3, 1, dtype=torch.int8))
    found = metric.compute()
    assert found["loss"].isfinite()
    assert found["map"].isnan()


def test_metric_that_was_gathered_over_processes_has_tensors_for_lists():
    logits, labels = scored(90, 4, seed=3)
    metric = MeanAveragePrecision(4)
    metric.update(logits, labels)
    metric.logits, metric.labels = torch.cat(metric.logits), torch.cat(metric.labels)
    assert metric.compute()["map"].item() == pytest.approx(by_sklearn(logits, labels), abs=1e-6)
