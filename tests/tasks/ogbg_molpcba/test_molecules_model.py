"""The graph network."""

import pytest
import torch
import torch.nn.functional as F
import yaml

from caspr_cli.tasks.ogbg_molpcba.data import Graph, batch_of
from caspr_cli.tasks.ogbg_molpcba.graphs import ATOM_SIZES, BOND_SIZES
from caspr_cli.tasks.ogbg_molpcba.model import GraphNetwork


def random_graphs(count=4, tasks=5, seed=0):
    draw = torch.Generator().manual_seed(seed)

    def features(rows, sizes):
        return torch.stack([torch.randint(size, (rows,), generator=draw) for size in sizes], 1).to(torch.uint8).numpy()

    graphs = []
    for i in range(count):
        nodes, edges = i + 1, 2 * i  # the first has no edge
        ends = torch.randint(nodes, (edges, 2), generator=draw).to(torch.uint16).numpy()
        labels = torch.randint(-1, 2, (tasks,), generator=draw).to(torch.int8).numpy()
        graphs.append(Graph(features(nodes, ATOM_SIZES), ends, features(edges, BOND_SIZES), labels))
    return graphs


def small(tasks=5, width=8, steps=3, dropout=0.0):
    torch.manual_seed(0)
    return GraphNetwork(tasks, width, steps, dropout).double()


def by_hand(model, graph):
    """Logits of one graph, node by node and edge by edge, from the weights alone."""

    def update(layer, *arguments):
        x = layer.dense.weight @ torch.cat(arguments) + layer.dense.bias
        x = (x - x.mean()) / (x.var(correction=0) + 1e-6).sqrt() * layer.norm.weight + layer.norm.bias
        return F.relu(x)

    def embed(layer, x):
        return layer.weight @ torch.tensor(x).double() + layer.bias

    nodes = [embed(model.node_embedding, x) for x in graph.nodes]
    edges = [embed(model.edge_embedding, x) for x in graph.bonds]
    ends = [(int(a), int(b)) for a, b in graph.edges]
    u = torch.zeros(5, dtype=torch.double)
    for step in model.steps:
        edges = [update(step.edge, x, nodes[a], nodes[b], u) for x, (a, b) in zip(edges, ends, strict=True)]
        zero = torch.zeros(8, dtype=torch.double)
        sent = [sum((x for x, (a, _) in zip(edges, ends, strict=True) if a == i), zero) for i in range(len(nodes))]
        received = [sum((x for x, (_, b) in zip(edges, ends, strict=True) if b == i), zero) for i in range(len(nodes))]
        nodes = [update(step.node, x, s, r, u) for x, s, r in zip(nodes, sent, received, strict=True)]
        u = update(step.globals, sum(nodes, zero), sum(edges, zero), u)
    return model.decoder.weight @ u + model.decoder.bias


@torch.no_grad()
def test_logits_are_those_worked_out_by_hand():
    model, graphs = small().eval(), random_graphs()
    for p in model.parameters():  # biases, too
        p.copy_(torch.randn(p.shape, dtype=p.dtype) / 3)
    logits = model(batch_of(graphs))
    for row, graph in zip(logits, graphs, strict=True):
        torch.testing.assert_close(row, by_hand(model, graph))


def test_initial_weights():
    torch.manual_seed(0)
    model = GraphNetwork(128, 256, 2, 0.1)
    for name, p in model.named_parameters():
        if "norm" in name:
            assert (p == name.endswith("weight")).all()
        elif name.endswith("bias"):
            assert (p == 0).all()
        else:
            std = p.shape[1] ** -0.5
            assert p.std().item() == pytest.approx(std, rel=0.05), name
            assert p.abs().max().item() <= 2 * std / 0.8796


def test_paper_scale_has_the_number_of_parameters_of_algoperf(pytestconfig):
    task = yaml.safe_load((pytestconfig.rootpath / "conf/scale/ogbg_molpcba/paper.yaml").read_text())["task"]
    w, n = task["width"], task["steps"]
    with torch.device("meta"):
        model = GraphNetwork(128, w, n, task["dropout"])
    # edges and nodes see three vectors and the globals, globals two and themselves; each update has a bias and a norm
    first = 2 * (3 * w + 128) * w + (2 * w + 128) * w
    other = 2 * 4 * w * w + 3 * w * w
    embeddings, decoder = (9 + 1 + 3 + 1) * w, (w + 1) * 128
    count = sum(p.numel() for p in model.parameters())
    assert count == 3_554_176 == embeddings + first + (n - 1) * other + n * 3 * 3 * w + decoder
    assert max(p.numel() for p in model.parameters()) == 1024 * 256
