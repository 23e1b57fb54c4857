from typing import Any

import pytest
import torch

from caspr_cli.bench.ranks import joined


@pytest.mark.parametrize(("kind", "count"), [("cuda", 4), ("cuda", 1), ("cpu", 4)])
def test_each_rank_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch, kind: str, count: int) -> None:
    """Before anything is sent: what torch sends of Python's objects goes by the current device."""
    calls: list[Any] = []
    monkeypatch.setattr("torch.cuda.set_device", calls.append)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *a, **k: calls.append((a, k["device_id"])))
    own = torch.device("cuda", 3) if kind == "cuda" else torch.device("cpu")
    assert joined(kind, 3, count, "store") == own
    meeting = [(("nccl",), own)] if kind == "cuda" else [(("gloo",), None)]
    assert calls == [own] * (kind == "cuda") + meeting * (count > 1)
