import gzip
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from recorded import run, write

from caspr_cli.common.errors import UserError
from caspr_cli.recipe import compose
from caspr_cli.recipe.schema import CasprConf, Recipe, SearchConf
from caspr_cli.report import pack as packs
from caspr_cli.report import records, terminal
from caspr_cli.report.compare import tables
from caspr_cli.report.export import as_json
from caspr_cli.report.model import Run
from caspr_cli.runs.launch import plan
from caspr_cli.runs.record import Record
from caspr_cli.tasks.registry import C4LMConf


def test_a_record_is_read_whole(tmp_path: Path) -> None:
    made = run("caspr", 3, 3.9, optim__order=float("inf"))
    path = write(made, tmp_path / "c4_lm/caspr/ab/seed3")
    (read,) = records.find([tmp_path]).runs
    assert read.path == str(path)
    assert read.config["optim.betas"] == [0.9, 0.95]
    assert read.config["optim.order"] == float("inf")
    assert (read.seed, read.state, read.final, read.test) == (3, "done", 3.9, 4.0)
    assert read.curve == made.curve
    assert (read.result, read.provenance) == (made.result, made.provenance)


def test_places_that_are_no_records_are_passed_over_and_none_counts_twice(tmp_path: Path) -> None:
    path = write(run(), tmp_path / "a/seed0")
    write(run(), tmp_path / ".sweep/seed0")
    write(run(), path / "checkpoints/inner")
    found = records.find([tmp_path, path, tmp_path / "a"])
    assert [each.path for each in found.runs] == [str(path)]
    assert found.warnings == []
    pack = tmp_path / "one.jsonl.gz"
    pack.write_bytes(packs.pack(found.runs, [tmp_path]))
    assert len(records.find([pack, pack]).runs) == 1


LEFT_OUT = [  # what is in the file; what is said
    ("config.yaml", None, "missing"),
    ("config.yaml", "a: 1\nb: @x", "line 2: is not valid YAML"),
    ("config.yaml", "- 1", "has no task.name"),
    ("config.yaml", f"a: {'1' * 5000}", "is not valid YAML"),
    ("config.yaml", "[" * 20_000, "is not valid YAML"),
    ("config.yaml", "a: !!timestamp x", "is not valid YAML"),
    ("config.yaml", "#" * 1_000_001, "has more than 1 MB"),
    ("status.json", '{"sta', "is not valid JSON"),
    ("status.json", "[]", "status is not a mapping"),
    ("status.json", f'{{"a": {"[" * 400 + "]" * 400}}}', "a is nested too deeply"),
    ("status.json", Path, "cannot be read (Is a directory)"),
    ("result.json", None, "missing or damaged, though the run is done"),
    ("result.json", f"{{}}{' ' * 1_000_001}", "has more than 1 MB"),
]
COUNTED = [
    ("provenance.json", "{", "is not valid JSON: where the run came from is not known"),
    ("provenance.json", '{"code": "abc"}', "code is not a mapping: where the run came from is not known"),
    ("metrics.jsonl", Path, "cannot be read (Is a directory): the run has no curve"),
    *(
        ("metrics.jsonl", f'{line}\n{{"step": 1, "val/loss": 2.0}}\n', "line 1 cannot be read: left out of the curve")
        for line in (
            '{"val/loss": x}',
            '{"step": 1e999, "val/loss": 2.0}',
            f'{{"step": {10**400}, "val/loss": 2.0}}',
            '{"step": 1, "val/loss": "low"}',
            '["val/loss"]',
            "[" * 100_000 + '"val/loss"',
        )
    ),
]


@pytest.mark.parametrize(("name", "content", "said"), LEFT_OUT + COUNTED)
def test_what_cannot_be_read_is_a_warning_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str | type[Path] | None, said: str
) -> None:
    monkeypatch.setattr(records, "LONGEST_JSON", 1_000_000)
    write(run(seed=0), tmp_path / "good/seed0")
    file = write(run(seed=1), tmp_path / "bad/seed1") / name
    file.unlink()
    if content is Path:
        file.mkdir()
    elif isinstance(content, str):
        file.write_text(content, encoding="utf8")
    found = records.find([tmp_path])
    counts = (name, content, said) in COUNTED
    assert [each.seed for each in found.runs] == ([1, 0] if counts else [0])
    assert found.warnings == [f"{file}: {said}{'' if counts else ': left out'}"]
    with pytest.raises(UserError, match="nowhere: no such file or directory"):
        records.find([tmp_path / "nowhere"])


def test_a_record_that_has_just_begun_is_new_and_a_line_half_written_is_no_matter(tmp_path: Path) -> None:
    path = write(run(state="running"), tmp_path / "a/seed0")
    (path / "status.json").unlink()
    with (path / "metrics.jsonl").open("a", encoding="utf8") as file:
        file.write('{"step": 400, "val/loss": 3.')
    found = records.find([tmp_path])
    assert [(each.state, len(each.curve), each.final) for each in found.runs] == [("new", 3, None)]
    assert found.warnings == []


def test_a_validation_written_twice_counts_once_and_what_is_not_finite_is_none(tmp_path: Path) -> None:
    path = write(run(curve=[(200, 1.0, 5.0), (100, None, 6.0), (200, 9.0, 5.5)]), tmp_path / "a/seed0")
    with (path / "metrics.jsonl").open("a", encoding="utf8") as file:
        file.write('{"step": 300, "val/loss": NaN}\n{"step": 400, "val/loss": null}\n')
    (read,) = records.find([tmp_path]).runs
    assert [(p.step, p.seconds, p.value) for p in read.curve] == [
        (100, None, 6.0), (200, 9.0, 5.5), (300, None, None), (400, None, None),
    ]  # fmt: skip


def test_a_run_whose_process_has_gone_is_cut_off_and_not_running(tmp_path: Path) -> None:
    """As far as that can be known: of a process on this machine."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    states = []
    for host, process in ((socket.gethostname(), gone.pid), (socket.gethostname(), os.getpid()), ("other", gone.pid)):
        one = run("caspr", 0, None, state="running")
        path = tmp_path / f"{host}{process}"
        write(replace(one, status=one.status | {"host": host, "pid": process, "step": None}), path)
        (found,) = records.find([path]).runs
        states.append(found.state)
        assert "None" not in "".join(terminal.listing([found], 200))
    assert states == ["cut off", "running", "running"]


def test_what_is_too_large_to_be_squared_twice_counts_as_not_finite(tmp_path: Path) -> None:
    """Its spread would be infinite, and the row's numbers no JSON; a run that ended so is one that diverged."""
    for seed, value in enumerate((4.0, 4.1, 1e308, -1e51, 1e49)):
        write(run(seed=seed, final=value), tmp_path / f"a/seed{seed}")
    runs = records.find([tmp_path]).runs
    assert [each.final for each in runs] == [4.0, 4.1, None, None, 1e49]
    assert [each.test for each in runs] == [4.1, 4.1 + 0.1, None, None, 1e49]
    assert [each.curve[-1].value for each in runs] == [4.0, 4.1, None, None, 1e49]
    assert json.loads(as_json(tables(runs)))[0]["n"] == 3


def test_texts_are_read_as_they_can_be_written(tmp_path: Path) -> None:
    """On one line, as LaTeX's comments and Markdown's tables need it, and of letters that UTF-8 has."""
    made = run(state="failed", optim__note="a\n  b\x1b[31m c", provenance={"python": "3\n11"})
    made.status["error"] = "first \ud800\n    second"
    path = write(made, tmp_path / "a/seed0")
    (read,) = records.find([tmp_path]).runs
    assert read.config["optim.note"] == "a b\ufffd[31m c"
    assert read.provenance["python"] == "3 11"
    assert read.provenance["code"]["diff"] == "- a\n+ b\n"
    assert read.status["error"] == "first \ufffd\n    second"
    pack = tmp_path / "p.jsonl.gz"
    pack.write_bytes(packs.pack([read], [tmp_path]))
    assert records.find([pack]).runs[0].status["error"] == read.status["error"]
    os.rename(path, os.fsencode(path) + b"\xff")
    packs.pack(records.find([tmp_path / "a"]).runs, [tmp_path])


# ---- packed ------------------------------------------------------------------------------------------------------


def study(root: Path) -> list[Path]:
    made = [run(optim, seed, 4 + 0.1 * seed + (optim == "adamw")) for optim in ("caspr", "adamw") for seed in range(3)]
    made.append(run("caspr", 3, state="failed", optim__order=float("inf")))
    return [write(each, root / each.path) for each in made]


def test_a_pack_says_what_the_directories_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study(tmp_path / "all")
    there = records.find([tmp_path / "all"]).runs
    (tmp_path / "p.jsonl.gz").write_bytes(packs.pack(there, [tmp_path / "all"]))
    back = records.find([tmp_path / "p.jsonl.gz"]).runs

    assert as_json(tables(back)) == as_json(tables(there))
    assert [each.path for each in back] == [
        f"{tmp_path}/p.jsonl.gz:{Path(r.path).relative_to(tmp_path / 'all')}" for r in there
    ]
    monkeypatch.setattr(time, "time", lambda: 86400.0)  # gzip's header has one
    assert packs.pack(back[::-1], [tmp_path / "p.jsonl.gz"]) == (tmp_path / "p.jsonl.gz").read_bytes()


def test_records_that_are_packed_one_by_one_keep_places_of_their_own(tmp_path: Path) -> None:
    roots = study(tmp_path / "all")
    (tmp_path / "p.jsonl.gz").write_bytes(packs.pack(records.find(roots).runs, roots))
    assert packs.unpack(packs.read(tmp_path / "p.jsonl.gz"), tmp_path / "after") == (len(roots), 0)


def test_a_pack_keeps_private_things_to_itself(tmp_path: Path) -> None:
    cut = run("caspr", status_error=None)
    cut.status["error"] = "process 77 on somewhere (since 2026) is gone; see /home/someone/outputs/log.txt, val/loss"
    cut.provenance["note"] = "https://example.org/a/b"
    write(cut, tmp_path / "c4_lm/caspr/ab/seed0")
    text = gzip.decompress(packs.pack(records.find([tmp_path]).runs, [tmp_path])).decode()
    for private in ("/home", "someone/", "somewhere", "/usr/bin", "/data/secret", str(tmp_path), "- a\\n+ b", '"pid"'):
        assert private not in text, private
    entry = json.loads(text.splitlines()[1])
    assert entry["path"] == "c4_lm/caspr/ab/seed0"
    assert entry["provenance"]["code"]["diff_sha256"] == "feedfeedfeedfeed"
    assert entry["provenance"]["command"] == ["<path>", "optim=adamw", "task.root=<path>"]
    assert entry["provenance"]["note"] == "https://example.org/a/b"
    assert "val/loss" in entry["status"]["error"]
    assert entry["curve"][0] == [100, 10.0, 5.0]


def test_settings_that_differ_in_a_path_or_hold_the_name_of_the_host_stay(tmp_path: Path) -> None:
    """Else two rows would be one, or an optimizer would be called <host>."""
    for seed, teacher in enumerate(("/somebody/a.pt", "/somebody/b.pt", "/somebody/a.pt")):
        made = run("somewhere", seed=seed, optim__teacher=teacher, task__root=f"/data/{seed}")
        write(made, tmp_path / f"c4_lm/somewhere/{seed}/seed{seed}")
    text = gzip.decompress(packs.pack(records.find([tmp_path]).runs, [tmp_path])).decode()
    found = [json.loads(line)["config"] for line in text.splitlines()[1:]]
    a, b, again = (config["optim.teacher"] for config in found)
    assert a == again != b
    assert re.fullmatch("<path [0-9a-f]{8}>", a)
    assert "somebody" not in text
    assert {(config["optim.name"], config["task.root"]) for config in found} == {("somewhere", "<path>")}


def test_a_config_of_another_program_hides_no_records(tmp_path: Path) -> None:
    write(run(), tmp_path / "outputs/c4_lm/adamw/ab/seed0")
    (tmp_path / "config.yaml").write_text("model: x\n")
    found = records.find([tmp_path])
    assert len(found.runs) == 1
    assert found.warnings == [f"{tmp_path / 'config.yaml'}: has no task.name: left out"]


def spoilt(part: str, key: str, value: object) -> bytes:
    """A pack of two records, one of them damaged in the file alone."""
    first, good, bad = gzip.decompress(packs.pack([run(seed=0), run(seed=1)], [])).decode().splitlines()
    entry = json.loads(bad)
    entry[part] = entry[part] | {key: value} if key else value
    return gzip.compress("\n".join([first, good, json.dumps(entry)]).encode())


@pytest.mark.parametrize(
    ("part", "key", "value", "said"),
    [
        ("config", "optim.lr", 10**400, "optim.lr is neither text, list nor a number in range"),
        ("config", "task.name", ["c4_lm"], "task.name is not text"),
        ("config", "task.name", "", "has no task.name"),
        ("config", "task.target.value", math.inf, "task.target.value is not a number"),
        ("config", "seed", "x", "seed is not an integer"),
        ("config", "optim.lr.first", 1, "optim.lr is a value and a group"),
        ("status", "host", 7, "host is not text"),
        ("result", "final", None, ", though the run is done"),
        ("result", "final", [4.0], "final is not a mapping of numbers"),
        ("result", "final", {"val/loss": "low"}, "final is not a mapping of numbers"),
        ("result", "seconds", "long", "seconds is not a number"),
        ("result", "target", [4.5], "target is not a mapping"),
        ("result", "target", {"value": 4.5, "step": 9, "seconds": "x"}, "target.seconds is not a number"),
        ("provenance", "code", "abc", "code is not a mapping"),
        ("provenance", "command", "caspr-train", "command is not a list"),
        ("provenance", "attempts", ["x"], "attempts is not a list of mappings"),
        ("provenance", "data", {"hash": ["a"]}, "data.hash is not text"),
        ("provenance", "device", {"threads": "two"}, "device.threads is not an integer"),
        ("config", "", {}, "has no task.name"),
        ("config", "", [], "config is not a mapping"),
        ("status", "", None, "status is not a mapping"),
        ("result", "", {}, "has no result, though the run is done"),
        ("result", "final", {"val/loss": math.nan}, "final is not a mapping of numbers"),
        ("curve", "", [[1, 2.0]], ""),
        ("curve", "", [["1", None, 2.0]], "a validation has other values than numbers"),
        ("curve", "", [[1, None, "x"]], "a validation has other values than numbers"),
        ("path", "", 3, ""),
    ],
)
def test_a_pack_is_looked_at_like_directories(tmp_path: Path, part: str, key: str, value: object, said: str) -> None:
    pack = tmp_path / "x.jsonl.gz"
    pack.write_bytes(spoilt(part, key, value))
    with pytest.raises(UserError) as caught:
        records.find([pack])
    assert str(caught.value).startswith(f"{pack}: line 3 is not a record")
    assert str(caught.value).endswith(said)


HEAD = b'{"caspr-report": "records", "version": 1}\n'


@pytest.mark.parametrize(
    ("content", "said"),
    [  # mtime is fixed: each process of the tests must write the same bytes
        pytest.param(gzip.compress(b"[" * 100_000, mtime=0), "cannot be read", id="brackets first"),
        pytest.param(gzip.compress(HEAD + b"[" * 100_000, mtime=0), "line 2 is not a record", id="brackets second"),
        pytest.param(b"hello", "cannot be read", id="text"),
        pytest.param(gzip.compress(b"", mtime=0), "line 1: is not what caspr-report pack of this version", id="empty"),
        pytest.param(gzip.compress(b'{"a": 1}\n', mtime=0), "line 1: is not what caspr-report pack", id="no head"),
        pytest.param(gzip.compress(HEAD + b'{"path": "x"}\n', mtime=0), "line 2 is not a record", id="no record"),
        pytest.param(gzip.compress(HEAD, mtime=0)[:-12], "cannot be read", id="cut off"),
    ],
)
def test_a_file_that_is_no_pack_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x.jsonl.gz").write_bytes(content)
    with pytest.raises(UserError, match=said) as caught:
        records.find([tmp_path / "x.jsonl.gz"])
    assert str(caught.value).startswith(str(tmp_path / "x.jsonl.gz"))


@pytest.mark.parametrize(("line", "said"), [(b"[" * 1000, "a line of more than 1 MB"), (b"", "more than 2 MB")])
def test_a_pack_that_inflates_without_end_is_refused_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, said: str
) -> None:
    monkeypatch.setattr(packs, "LONGEST_LINE", 1_000_000)
    monkeypatch.setattr(packs, "MOST", 2_000_000)
    whole = gzip.decompress(packs.pack([run()], [])).splitlines()[1] + b"\n"
    file = tmp_path / "x.jsonl.gz"
    file.write_bytes(gzip.compress(HEAD + (line or whole) * (3_000_000 // len(line or whole))))
    assert file.stat().st_size < 50_000
    with pytest.raises(UserError) as caught:
        records.find([file])
    assert str(caught.value) == f"{file}: refused: it has {said} when it is uncompressed"


# ---- speed -------------------------------------------------------------------------------------------------------


@pytest.mark.release
def test_a_thousand_records_would_be_compared_in_five_seconds(tmp_path: Path) -> None:
    for k in range(250):
        optim, trial, seed = ("caspr", "shampoo", "adamw", "muon", "soap")[k % 5], k // 5 % 10, k // 50
        made = run(optim, seed, 4 + 0.001 * (k * 7919 % 101), optim__lr=1e-3 * (trial + 1))
        write(made, tmp_path / f"{k}/seed{seed}", training_lines=400)
    start = time.process_time()
    (table,) = tables(records.find([tmp_path]).runs)
    assert time.process_time() - start < 5 / 4
    assert sum(len(trial.runs) for row in table.rows for trial in row.trials) == 250


# ---- unpacked ----------------------------------------------------------------------------------------------------


def test_what_is_unpacked_says_the_same_and_is_done_for_the_runner(tmp_path: Path) -> None:
    """Through the recipe's own reader: its name is that of its directory, so that the runner finds and skips it."""
    compose.register_schemas()
    search = SearchConf("lr", 6, {"optim.lr": {"log": [1e-3, 0.1]}})
    recipe = Recipe(task=C4LMConf(), optim=CasprConf(order=math.inf, lr=0.02), search=search, trial=3, seed=4)
    recipe.output_dir = str(tmp_path / "before")
    record = Record.of(recipe)
    record.path.mkdir(parents=True)
    record.config.write_text(compose.save(recipe))
    record.write("result.json", {"final": {"step": 9, "val/loss": 2.5}, "target": {"value": None}, "seconds": 3.0})
    record.write("status.json", {"state": "done", "host": "h", "pid": 7})
    record.metrics.write_text('{"step": 9, "train/loss": 1.0}\n{"step": 9, "val/loss": 2.5, "time/seconds": 3.0}\n')
    runs = records.find([tmp_path / "before"]).runs
    pack = tmp_path / "p.jsonl.gz"
    pack.write_bytes(packs.pack(runs, [tmp_path / "before"]))
    assert packs.unpack(packs.read(pack), tmp_path / "after") == (1, 0)
    assert packs.unpack(packs.read(pack), tmp_path / "after") == (0, 1)
    (back,) = records.find([tmp_path / "after"]).runs
    assert (back.final, back.curve, back.seed) == (runs[0].final, runs[0].curve, 4)
    again = compose.load(tmp_path / "after" / record.path.relative_to(tmp_path / "before") / "config.yaml")
    again.output_dir = str(tmp_path / "after")
    assert compose.identity(again) == compose.identity(recipe)
    assert plan(again, Record.of(again)) == "skip"


def test_records_of_one_path_in_several_packs_are_kept_apart_or_refused(tmp_path: Path) -> None:
    files = [tmp_path / "before.jsonl.gz", tmp_path / "after.jsonl.gz"]
    for file, final in zip(files, (4.0, 5.0), strict=True):
        file.write_bytes(packs.pack([run(final=final)], [Path("outputs")]))
    both = tmp_path / "both.jsonl.gz"
    both.write_bytes(packs.pack(records.find(files).runs, files))
    assert packs.unpack(packs.read(both), tmp_path / "un") == (2, 0)
    assert [each.final for each in records.find([tmp_path / "un" / "after"]).runs] == [5.0]
    with pytest.raises(UserError, match=r"before.jsonl.gz:.*: a different record has the same path"):
        packs.unpack(records.find(files).runs, tmp_path / "lost")
    assert not (tmp_path / "lost").exists()
    again = shutil.copy(files[0], tmp_path / "again.jsonl.gz")  # the same record in two packs is written once
    assert packs.unpack(records.find([files[0], again]).runs, tmp_path / "once") == (1, 0)


def test_a_pack_cannot_write_elsewhere(tmp_path: Path) -> None:
    run = Run("x.jsonl.gz:../evil", {"task.target.metric": "val/loss"}, {}, {}, {})
    with pytest.raises(UserError, match="should be relative"):
        packs.unpack([run], tmp_path / "in")
    assert not (tmp_path / "evil").exists()
