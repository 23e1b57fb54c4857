"""The leaderboard and the check of an entry: each way in which a pack can be wrong is said in one line."""

import re
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from calling import Call

from caspr_cli.commands import report
from caspr_cli.commands.check import draw, packs
from caspr_cli.common.exits import TERMINATED
from caspr_cli.report import entry, leaderboard, pack, records
from caspr_cli.report.compare import tables
from caspr_cli.report.model import Point, Row, Run

ROOT = Path(__file__).parents[3]
PACK = ROOT / "outputs" / "published" / "records" / "fair_molpcba_muon.jsonl.gz"


@cache
def fair() -> tuple[Run, ...]:
    """The records of AdamW and Muon in a pack that is right: eight trials, three seeds."""
    return tuple(run for run in records.find([PACK]).runs if run.config["optim.name"] in ("adamw", "muon"))


def wrong(runs: Sequence[Run]) -> list[str]:
    return [
        line for table in tables(runs) for row in table.rows if not row.untuned for line in entry.problems(row, draw)
    ]


def changed(
    change: Callable[[Run], Run | None], *, trial: int | None = None, seed: int | None = None, optim: str = "muon"
) -> list[Run]:
    """The records with those changed, or left out, that are of this trial and seed."""

    def meant(run: Run) -> bool:
        own = run.config["optim.name"] == optim and run.config["trial"] != "default"
        return own and trial in (None, run.config["trial"]) and seed in (None, run.seed)

    assert any(map(meant, fair()))
    found = [change(run) if meant(run) else run for run in fair()]
    return [run for run in found if run is not None]


def config(**keys: Any) -> Callable[[Run], Run]:
    return lambda run: replace(run, config=run.config | {key.replace("__", "."): value for key, value in keys.items()})


def result(**keys: Any) -> Callable[[Run], Run]:
    return lambda run: replace(run, result=run.result | keys)


def origin(**keys: Any) -> Callable[[Run], Run]:
    return lambda run: replace(run, provenance=run.provenance | keys)


def gone(run: Run) -> None:
    return None


CODE = {"commit": "1" * 40, "diff_sha256": "e3b0c44298fc1c14"}


@pytest.mark.parametrize(
    ("runs", "line"),
    [
        (changed(result(final={"step": 500, "val/map": 0.95}), trial=7, seed=2),
         "trial 7, seed 2: its result says 0.95 at the end, and its curve "),
        (changed(lambda run: replace(run, curve=run.curve[:-1]), trial=7, seed=2),
         "trial 7, seed 2: its curve does not end at step 500"),
        (changed(result(steps=400), trial=7, seed=2), "trial 7, seed 2: trainer.max_steps is 500, and its result is of "
         "400"),
        (changed(config(optim__lr=0.03), trial=3), "trial 3: optim.lr is 0.03, and its search draws "),
        (changed(lambda run: replace(run, status={"state": "running"}), trial=2),
         "trial 2, seed 0: is running, and should have ended"),
        (changed(gone, trial=2), "of 8 trials 2 is missing at seed 0"),
        (changed(config(search__trials=4)), "search.trials is 4, and should be 8 or more"),
        (changed(config(search__trials=16), trial=2), "its records say different budgets: search.trials is 8 and 16"),
        (changed(config(search__name="lr")), "tuned by search=lr; the leaderboard has search=joint"),
        (changed(config(trial=None), trial=2), "1 trial without an index: not of the search"),
        (changed(gone, trial=3, seed=1001), "trial 3, of the best 3, is missing at seeds 1001 and 1002"),
        (changed(gone, trial=7, seed=3), "2 fresh seeds, and should have 3 or more (seeds 0, 1001 and 1002 choose "
         "the trial)"),
        (changed(config(seed=1), trial=3, seed=1001), "trial 3 was not selected, but run at seed 1, too, which may "
         "have chosen"),
        (changed(origin(code=CODE), trial=2), "its records are of different code: 11111111 and 220f0582"),
        (changed(origin(code=CODE | {"diff_sha256": "ab"})), "its code cannot be got again: 11111111 with changes ab"),
        (changed(origin(python="3.12"), trial=2), "its records are of different versions: "),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(runs: list[Run], line: str) -> None:
    found = wrong(runs)
    assert [each for each in found if each.startswith(line)], found
    assert len(found) <= 5


def rows(runs: Sequence[Run], optim: str) -> tuple[Row, Any]:
    (table,) = tables(runs)
    return next(row for row in table.rows if row.label == optim), table


def test_an_entry_has_to_fit_the_board() -> None:
    board = tables([run for run in fair() if run.config["optim.name"] == "adamw"])
    for change, lines in (
        (lambda run: run, []),
        (config(trainer__max_steps=1000), ["trainer.max_steps is 1000, and 500 on the board"]),
        (config(task__width=128), ["task.width is 128, and 64 on the board"]),
        (origin(data={"hash": "abc"}), ["its data have hash abc, and those of the board b5fb65af98d6015c"]),
        (lambda run: None if run.config["trial"] == 2 else run, ["it has 7 trials, and the rows of the board have 8"]),
    ):
        runs = [change(run) for run in fair() if run.config["optim.name"] == "muon"]
        row, table = rows([run for run in runs if run is not None], "muon")
        assert entry.against(row, table, board) == lines


def test_the_board_ranks_what_is_right_and_says_why_the_rest_is_not() -> None:
    old = [config(search__name="lr")(run) for run in fair()]
    found = leaderboard.board({"a": old, "b": changed(gone, trial=2), "c": fair()}, draw)
    assert [(place.pack, place.row.label) for place in found.places] == [("b", "adamw"), ("c", "muon")]
    assert found.refused == {
        "a": ["tuned by search=lr; the leaderboard has search=joint"],
        "b": ["muon on ogbg_molpcba: of 8 trials 2 is missing at seed 0"],
        "c": ["adamw on ogbg_molpcba: b has it already"],
    }
    (table,) = found.tables
    assert {row.label for row in table.rows} == {"adamw", "muon", "adamw untuned", "muon untuned"}


def variant(pack: str, exponent: float, optim: str = "muon") -> list[Run]:
    """The records of an optimizer as those of Muon with an option, in a pack of this name."""
    return [
        replace(run, path=f"{pack}:{run.path}", config=run.config | {"optim.name": "muon", "optim.exponent": exponent},
                result=run.result | {"optim": "muon"})
        for run in fair() if run.config["optim.name"] == optim
    ]  # fmt: skip


def test_a_row_is_an_optimizer_with_its_options_whatever_its_label() -> None:
    """Each pack calls its row muon; in the table of both packs each label has the option."""
    packs = {"a": variant("a", 1.0), "b": variant("b", 0.5, "adamw"), "c": variant("c", 1.0)}
    found = leaderboard.board(packs)
    assert [(place.pack, place.row.label) for place in found.places] == [("a", "muon"), ("b", "muon")]
    assert found.refused == {"c": ["muon on ogbg_molpcba: a has it already"]}
    lines = [line for line in leaderboard.page(packs, "made so").splitlines() if re.match(r"\| \d", line)]
    assert [re.sub(r" \| .* \|", " |", line[:-2]) for line in lines] == ["| 1 | a", "| 2 | b"]
    assert ["exponent=1 " in line for line in lines] == [True, False]


def test_rows_of_one_pack_have_to_fit_each_other() -> None:
    longer = [config(trainer__max_steps=1000)(run) if run.config["optim.name"] == "muon" else run for run in fair()]
    longer = [replace(run, result=run.result | {"steps": run.config["trainer.max_steps"]},
                      curve=(*run.curve, replace(run.curve[-1], step=run.config["trainer.max_steps"])))
              for run in longer]  # fmt: skip
    found = leaderboard.board({"a": longer}, draw)
    (one,) = found.places
    assert one.row.optim == "muon"  # the better one is looked at first
    assert found.refused == {"a": ["adamw on ogbg_molpcba: trainer.max_steps is 500, and 1000 on the board"]}


def test_the_page_has_tables_commands_and_reasons() -> None:
    text = leaderboard.page({"old": [config(search__name="lr")(run) for run in fair()], "new": fair()}, "made so", draw)
    assert "| 1 | muon | 3 | 0.8952 ± 0.0065 | 0.8789 to 0.9114 | 0.9062 ± 0.0024 | 0.8142 | 8 | better, +4.9 %" in text
    assert "| 2 | adamw | 3 | 0.8533 ± 0.0043 |" in text
    assert "- adamw: its weight_decay, 0.001466, is the smallest of 8 tried" in text
    budget = "search.trials=8 search.refine=0"
    assert f"caspr-train experiment=molpcba optim=my_opt {budget} seed=1,2,3" in text
    assert "- `old`: tuned by search=lr; the leaderboard has search=joint" in text
    assert "No row is ranked yet on c4_lm, resnet, ud_pos and vit" in text
    assert text.endswith("\n    made so\n")


def test_over_all_tasks_rows_are_timed_to_where_adamw_ends() -> None:
    """At .8520 on each of two tasks: Muon is there at step 300, AdamW itself at 500."""
    other = [
        replace(run, config=run.config | {"task.name": "blobs"}, result=run.result | {"task": "blobs"})
        for run in fair()
        if run.state == "done"
    ]
    text = leaderboard.page({"new": fair(), "other": other}, "made so", draw)
    part = text[text.index("## Over all tasks") : text.index("## Not ranked")]
    steps, seconds = (table.splitlines() for table in re.findall(r"(?:^\|.*\n)+", part, re.MULTILINE))
    assert [line.split(" | ")[:3] for line in steps[2:]] == [
        ["| muon", "**1.000**", "**1.00**"],
        ["| adamw", "0.778", "0.00"],
    ]
    assert steps[2].endswith("| **1.00x** | **1.00x** |")
    assert steps[3].endswith("| 1.67x | 1.67x |")
    assert len(seconds) == 4
    assert "with an experiment in your package that has task=blobs and search=joint:" in text
    assert "Over all tasks" not in leaderboard.page({"new": fair()}, "made so", draw)


def test_the_command_for_others_gives_them_as_many_further_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entry, "LEAST_TRIALS", 2)
    refined = config(search__trials=2, search__refine=3)
    text = leaderboard.page({"new": [refined(run) for run in fair()]}, "made so", draw)
    assert "optim=my_opt search.trials=2 search.refine=3 seed=1,2,3" in text


def test_against_the_first_all_pairs_are_corrected_for(monkeypatch: pytest.MonkeyPatch) -> None:
    (table,) = tables(records.find([PACK]).runs)
    three = [row for row in table.rows if not row.untuned]
    seen: list[int] = []
    monkeypatch.setattr(leaderboard.stats, "holm", lambda p: seen.append(len(p)) or [0.01] * len(p))
    said = leaderboard._against_first(table, three)
    assert seen == [3]
    assert said[0] == "-"
    assert said[1].startswith("worse, -0.7 %")
    assert said[2].startswith("worse, -5.3 %")
    assert leaderboard._against_first(table, three[::-1])[2].startswith("better, +5.6 %")


def packed(optim: str, file: Path) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(pack.pack([run for run in fair() if run.config["optim.name"] == optim], [PACK]))
    return file


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    return Call("caspr-report", report.main, monkeypatch, capsys)


def test_check_says_right_or_wrong_and_exits_so(call: Call, tmp_path: Path) -> None:
    own, board = packed("muon", tmp_path / "own.jsonl.gz"), tmp_path / "board"
    packed("adamw", board / "a.jsonl.gz")
    assert call("check", own, "--board", board) == 0
    assert call.out == "right    muon on ogbg_molpcba: 8 trials, 3 fresh seeds\n"
    shutil.copy(own, board / "b.jsonl.gz")
    assert call("check", own, "--board", board) == 1
    assert call.out == "wrong    muon on ogbg_molpcba: b.jsonl.gz has it already\n"
    assert "no such directory" in call.refused("check", str(PACK), "--board", str(tmp_path / "nosuch"))
    pack.unpack(fair(), tmp_path / "records")
    assert call("check", tmp_path / "records") == 0
    damaged = next((tmp_path / "records").rglob("result.json"))
    damaged.write_text('{"tr', encoding="utf8")
    assert call("check", tmp_path / "records") == 1
    assert f"wrong    {damaged}: is not valid JSON" in call.out
    bad = tmp_path / "bad.jsonl.gz"
    bad.write_bytes(pack.pack(changed(gone, trial=2), [PACK]))
    assert call("check", bad) == 1
    out = call.out.splitlines()
    assert "wrong    muon on ogbg_molpcba: of 8 trials 2 is missing at seed 0" in out
    assert "right    adamw on ogbg_molpcba: 8 trials, 3 fresh seeds" in out


def test_packs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    files = [packed("muon", tmp_path / "a" / "own.jsonl.gz"), packed("adamw", tmp_path / "b" / "own.jsonl.gz")]
    other = packed("muon", tmp_path / "b" / "other.jsonl.gz")
    found = packs([*files, files[0], other])
    assert {name: runs[0].config["optim.name"] for name, runs in found.items()} == {
        "a/own.jsonl.gz": "muon", "b/own.jsonl.gz": "adamw", "b/other.jsonl.gz": "muon",
    }  # fmt: skip
    board = leaderboard.board(found)
    assert {place.row.label for place in board.places} == {"muon", "adamw"}
    assert board.refused == {"b/other.jsonl.gz": ["muon on ogbg_molpcba: a/own.jsonl.gz has it already"]}
    assert list(packs([tmp_path / "b"])) == ["other.jsonl.gz", "own.jsonl.gz"]


@pytest.mark.parametrize(("off", "code", "as_pack"), [(0.001, 0, True), (0.1, 1, True), (0.001, 0, False)])
def test_check_runs_two_seeds_again(
    monkeypatch: pytest.MonkeyPatch, call: Call, tmp_path: Path, off: float, code: int, as_pack: bool
) -> None:
    """The run itself is replaced by one that ends a little or far off. The records are in a pack, or directories."""
    started = []

    def run(recipe: Any, command: list[str]) -> Any:
        started.append((recipe.optim.name, recipe.optim.lr, recipe.seed, recipe.output_dir))
        (one,) = (r for r in fair() if (r.config["optim.lr"], r.seed) == (recipe.optim.lr, recipe.seed))
        end = one.result | {"final": {"step": 500, "val/map": (one.final or 0) + off}}
        pack.unpack([replace(one, path="run", result=end)], tmp_path / str(len(started)))
        return SimpleNamespace(record=SimpleNamespace(path=tmp_path / str(len(started)) / "run"), signal=None)

    monkeypatch.setattr("caspr_cli.runs.launch.run", run)
    own = packed("muon", tmp_path / "own.jsonl.gz")
    if not as_pack:
        pack.unpack(pack.read(own), tmp_path / "records")
        own = tmp_path / "records"
    assert call("check", own, "--rerun", tmp_path / "again") == code
    into = str(tmp_path / "again" / "again")  # where the entry's own records are not found, if they are in --rerun
    assert started == [("muon", 0.05581, seed, into) for seed in (1, 2)]
    assert (f"3 fresh seeds, 2 run again in {into}" in call.out) == (code == 0)
    assert ("seed 1: ended at 0." in call.out) == (code == 1)


def test_a_check_that_is_stopped_ends_without_a_verdict(
    monkeypatch: pytest.MonkeyPatch, call: Call, tmp_path: Path
) -> None:
    started = []

    def run(recipe: Any, command: list[str]) -> Any:
        started.append(recipe.seed)
        return SimpleNamespace(record=SimpleNamespace(path=tmp_path), signal=signal.SIGTERM)

    monkeypatch.setattr("caspr_cli.runs.launch.run", run)
    own = packed("muon", tmp_path / "own.jsonl.gz")
    assert call("check", own, "--rerun", tmp_path / "again") == TERMINATED
    assert started == [1]
    assert "muon" not in call.out


def test_records_without_a_tuned_row_are_not_right(call: Call, tmp_path: Path) -> None:
    untuned = [run for run in fair() if run.config.get("trial") == "default"]
    (tmp_path / "own.jsonl.gz").write_bytes(pack.pack(untuned, [PACK]))
    assert call("check", tmp_path / "own.jsonl.gz") == 1
    assert call.out == "wrong    no row was tuned: there is nothing to check\n"


def test_a_search_of_some_keys_alone_is_not_the_joint_one() -> None:
    row, _ = rows(fair(), "muon")
    narrow = [
        replace(run, config={k: v for k, v in run.config.items() if not k.startswith("search.space.optim.betas")})
        for run in row.records
    ]
    found = entry.problems(replace(row, records=tuple(narrow)))
    assert found == ["its search does not vary optim.betas.0 and optim.betas.1"]


def test_the_keys_are_those_of_the_joint_search() -> None:
    space = yaml.safe_load((ROOT / "conf" / "search" / "joint.yaml").read_text())["search"]["space"]
    assert set(entry.TUNED) == space.keys()


def test_a_run_that_failed_again_is_as_before() -> None:
    row, _ = rows(fair(), "muon")
    failed = replace(row.runs[0], status={"state": "failed"})
    assert entry.reproduced(row, failed, None) is None
    assert entry.reproduced(row, failed, 0.9) == "seed 1: ended at None, and now at 0.9"
    assert entry.reproduced(row, row.runs[0], None) is not None


def test_a_point_of_the_curve_may_be_rounded() -> None:
    run = fair()[0]
    close = Point(500, 1.0, (run.final or 0) * (1 + 1e-12))
    assert list(entry._torn(replace(run, curve=(close,)))) == []
