import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist

from caspr_cli.optim.shard import Barrier
from caspr_cli.runs.record import FAILED, PREEMPTED, Record
from caspr_cli.training import ranks, worker
from caspr_cli.training.ranks import HungError, LostError, answering, wait_for_first

# As gloo, the store and NCCL say it.
WAITED = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv operation"
)
GONE = [
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:31938: Connection reset by peer",
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:19657.",
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    "ncclInternalError: Internal check failed.\nLast error:\nSocket recv failed while polling for opId=0x7f",
    "NCCL communicator was aborted on rank 3.",
    "NCCL communicator was aborted after a previous error",
    "ncclRemoteError: A call failed.\nLast error:\nsocketProgress: Connection closed by remote peer node7<41234>",
]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "SECONDS_TO_COMPARE", 0.0)


def raising(record: Record, message: str, world: int = 2) -> None:
    with answering(record, 0, world, 5.0):
        raise RuntimeError(message)


# What an operation hears of gloo when another one between the same two ranks has timed out.
CLOSED = "Application timeout caused pair closure"
# NCCL's watchdog, in two releases.
ABORTED = (
    "NCCL communicator was aborted on rank 0. Original reason for failure was: [Rank 0] Watchdog caught collective "
    "operation timeout: WorkNCCL(SeqNum=41, OpType=ALLREDUCE, Timeout(ms)=1800000) ran for 1805695 milliseconds before "
    "timing out."
)
GAVE_UP = (
    "Some NCCL operations have failed or timed out. Due to the asynchronous nature of CUDA kernels, subsequent GPU "
    "operations might run on corrupted/incomplete data."
)


LATE = ["NCCL operation timed out", "WorkNCCL(SeqNum=3) timed out in blocking wait.", "Work timed out during finalize"]


@pytest.mark.parametrize("message", [WAITED, CLOSED, ABORTED, GAVE_UP, *LATE])
def test_a_rank_that_does_not_answer_is_named(tmp_path: Path, message: str) -> None:
    with pytest.raises(HungError, match=r"^rank 1 did not answer for 5 s \(trainer.timeout\)$"):
        raising(Record(tmp_path), message)
    (tmp_path / ".waited.2").touch()
    with pytest.raises(HungError, match=r"^rank 1, 3 did not answer"):
        raising(Record(tmp_path), WAITED, world=4)
    (tmp_path / ".waited.1").touch()
    with pytest.raises(HungError, match="no rank heard of the others"):
        raising(Record(tmp_path), WAITED, world=2)


@pytest.mark.parametrize("message", GONE)
def test_a_rank_that_is_gone_is_no_failure_of_this_one(tmp_path: Path, message: str) -> None:
    with pytest.raises(LostError):
        raising(Record(tmp_path), message)


# As CUDA and NCCL say it, and whether the run may go on elsewhere. (An illegal access may be the program's own.)
BROKEN = {
    "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be reported at some other call": True,
    "CUDA error: uncorrectable NVLink error detected during the execution": True,
    "CUDA error: CUDA-capable device(s) is/are busy or unavailable": True,
    "NCCL error in: NCCLUtils.cpp:93, unhandled cuda error\nncclUnhandledCudaError: Call to CUDA function failed.\n"
    "Last error:\nCuda failure 214 'uncorrectable ECC error encountered'": True,
    "GPU 0000:3b:00.0: GPU has fallen off the bus": True,
    "CUDA error: device-side assert triggered": False,
    "CUDA error: an illegal memory access was encountered": False,
    "CUDA error: unspecified launch failure": False,
    "CUBLAS_STATUS_EXECUTION_FAILED when calling cublasSgemm": False,
}


@pytest.mark.parametrize(("message", "broken"), BROKEN.items(), ids=str)
def test_a_broken_gpu_interrupts_a_run_and_a_faulty_program_fails(tmp_path: Path, message: str, broken: bool) -> None:
    state, text = worker._cause(Record(tmp_path), RuntimeError(message))
    assert state == (PREEMPTED if broken else FAILED)
    assert text.startswith("a GPU is broken or gone: " if broken else f"RuntimeError: {message}")
    assert not broken or "\n" not in text
    outer = ValueError("in the loader")
    outer.__cause__ = RuntimeError(message)
    assert worker._cause(Record(tmp_path), outer)[0] == (PREEMPTED if broken else FAILED)


def test_what_is_this_ranks_own_stays(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        raising(Record(tmp_path), "mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)")
    with pytest.raises(RuntimeError, match="Timed out waiting"):
        raising(Record(tmp_path), WAITED, world=1)


def test_the_first_rank_is_waited_for_at_the_end(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.write("status.json", {"state": "running"})
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(HungError, match=r"^rank 0 did not answer for 0.1 s \(trainer.timeout\)$"):
            wait_for_first(record, 1, 2, 0.1)
        record.write("status.json", {"state": "done"})
        wait_for_first(record, 1, 2, 0.1)
    finally:
        signal.signal(signal.SIGTERM, before)


def leaves(rank: int, store: str, how: str) -> Barrier:
    """Rank 0 meets the other one, and is gone or hangs."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    meeting = Barrier((0, 1))
    dist.barrier()
    if rank == 0:
        if how == "hangs":
            time.sleep(60)
        os._exit(0)
    return meeting


@contextmanager
def left_alone(tmp_path: Path, how: str) -> Iterator[tuple[Record, Barrier]]:
    """Run as rank 1 of two. Only the connection shows that the other is gone: no launcher is its parent here."""
    record, store = Record(tmp_path), str(tmp_path / "store")
    record.write("status.json", {"state": "running"})
    other = multiprocessing.get_context("spawn").Process(target=leaves, args=(0, store, how))
    other.start()
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield record, leaves(1, store, how)
    finally:
        signal.signal(signal.SIGTERM, before)
        other.kill()
        other.join()
        dist.destroy_process_group()


@pytest.mark.release
def test_the_first_rank_dies_at_the_end_on_another_machine(tmp_path: Path) -> None:
    with left_alone(tmp_path, "gone") as (record, _), pytest.raises(LostError, match="rank 0 is gone"):
        wait_for_first(record, 1, 2, 60)


@pytest.mark.release
@pytest.mark.parametrize("how", ["gone", "hangs"])
def test_a_rank_that_is_lost_while_state_is_gathered_cuts_the_run_off(tmp_path: Path, how: str) -> None:
    with left_alone(tmp_path, how) as (record, meeting), pytest.raises(HungError), answering(record, 1, 2, 60):
        meeting.wait(1)
