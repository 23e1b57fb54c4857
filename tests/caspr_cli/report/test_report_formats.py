import csv
import io
import json
import re
from dataclasses import replace

import pytest
from pandas import DataFrame
from recorded import run
from tabled import seeds

from caspr_cli.report import export, format, render, terminal
from caspr_cli.report.compare import tables
from caspr_cli.report.model import Point, Table
from caspr_cli.report.stats import Comparison, Summary

PROMISED = {
    "task", "scale", "data", "optim", "label", "n", "mean", "sd", "ci_low", "ci_high", "test_mean", "test_sd",
    "steps_to_target", "seconds_to_target", "reached", "trials", "verdict", "p_value", "p_holm", "difference",
    "selected", "warnings", "test_n", "test_difference", "test_difference_low", "test_difference_high", "against",
    "tests", "data_hash",
}  # fmt: skip


@pytest.fixture
def made() -> list[Table]:
    runs = [run("adamw", seed, 4.5 + 0.02 * seed) for seed in range(3)]
    runs += [run("caspr", seed, 4.0 + 0.03 * seed, optim__lr=0.006) for seed in range(3)]
    runs += [run("shampoo", seed, None, "failed") for seed in range(3)]
    runs += [run("soap", 0, 4.1, task__name="vit", task__target__value=None, optim__order=float("inf"))]
    return tables(runs, tuned=["optim.lr", "optim.order"])


def lines(table: Table, width: int = 120) -> list[str]:
    return list(terminal.table_lines(table, width))


def test_json_has_a_row_for_each_and_no_nan(made: list[Table]) -> None:
    rows = json.loads(export.as_json(made), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [(row["task"], row["label"], row["n"]) for row in rows] == [
        ("c4_lm", "caspr", 3), ("c4_lm", "adamw", 3), ("c4_lm", "shampoo", 0), ("vit", "soap", 1),
    ]  # fmt: skip
    assert all(set(row) >= PROMISED for row in rows)
    caspr = rows[0]
    assert caspr["selected"] == {"optim.lr": 0.006}
    assert caspr["difference"] == pytest.approx(-0.49)
    assert (caspr["verdict"], caspr["reached"], caspr["steps_to_target"]) == ("better", 3, 200)
    assert rows[3]["selected"]["optim.order"] == "inf"
    assert (caspr["test_difference"], caspr["test_difference_low"]) == pytest.approx((-0.49, caspr["difference_low"]))
    assert (rows[2]["mean"], rows[2]["verdict"]) == (None, "not tested: no seed is done on one side")


def test_csv_has_the_same_rows(made: list[Table]) -> None:
    rows = list(csv.DictReader(io.StringIO(export.as_csv(made))))
    entries = export.entries(made)
    assert [float(row["mean"]) if row["mean"] else None for row in rows] == [entry["mean"] for entry in entries]
    assert json.loads(rows[0]["warnings"]) == list(made[0].warnings)


def test_csv_has_no_cell_that_a_spreadsheet_computes() -> None:
    runs = [run("adamw", s, -4.5 + 0.02 * s, task__data="=1+1") for s in range(3)]
    runs += [run("@caspr", s, -4.0 + 0.03 * s, task__data="=1+1") for s in range(3)]
    for one in runs:
        one.status["error"] = "-x"
    text = export.as_csv(tables(runs))
    (first, second) = csv.DictReader(io.StringIO(text))
    assert [first["data"], second["label"], second["optim"]] == ["'=1+1", "'@caspr", "'@caspr"]
    assert (float(first["mean"]), first["n"], first["tests"], first["paired"]) == (pytest.approx(-4.48), "3", "", "")
    assert (second["tests"], second["paired"], second["steps_to_target"]) == ("1", "True", "100")
    for formula in ("=", "+", "-", "@", "\t", "\r"):
        (cell,) = csv.reader(io.StringIO(render.csv(DataFrame({"x": [f"{formula}1"]})).partition("\n")[2]))
        assert cell == [f"'{formula}1".replace("\r", "\n")]


def test_a_terminal_shows_numbers_with_n_and_verdicts_below(made: list[Table]) -> None:
    text = lines(made[0])
    heading = " ".join(line.strip() for line in text[:2])
    assert heading.startswith(
        "c4_lm, sample scale, sample data abcd: val/loss at the end, lower is better; target 4.5, "
    )
    assert heading.endswith("target 4.5, steps to it read off a schedule of 300 steps")
    text = text[1:]
    assert " ".join(text[1].split()) == "optimizer n mean ± sd 95 % interval test steps to 4.5 time to it trials"
    assert " ".join(text[2].split()) == ("caspr 3 4.030 ± 0.030 3.955 to 4.105 4.130 ± 0.030 200 (3 of 3) 20.0 s 1")
    assert text[3] == "  lr=0.006; ▲ against adamw: better, -10.84 % (-11.39 to -10.29), p < 0.001, 3 pairs"
    assert "  lr=0.003; ● baseline" in text
    assert any(line.startswith("warning  shampoo: no run is done") for line in text)


@pytest.mark.parametrize("width", [120, 100, 80, 60, 40])
def test_narrow_terminals_lose_columns_and_say_which_but_never_n_or_the_mean(made: list[Table], width: int) -> None:
    text = lines(made[0], width)
    assert max(map(len, text)) <= width
    heads = next(line for line in text if line.startswith("optimizer"))
    assert heads.split()[:5] == ["optimizer", "n", "mean", "±", "sd"]
    assert ("trials" in heads) == (width > 100)
    gone = " ".join(text)
    assert ("no room for:" in gone) == (width <= 100)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("<b>x</b>", r"\<b>x\</b>"),
        ("a\\|b", r"a\\\|b"),
        ("*a* `b` _c_ d_e", r"\*a\* \`b\` \_c\_ d_e"),
        ("[x](y)", r"\[x](y)"),
        ("p < 0.001", "p < 0.001"),
        ("a|b", r"a\|b"),
    ],
)
def test_what_markdown_would_take_for_more_than_text(value: str, said: str) -> None:
    text = export.as_markdown(tables([run(), run(optim__graft=value), run(optim__graft="none")]), "caspr-report")
    assert f"| adamw graft={said} | 1 |" in text
    assert f"adamw graft={said} (n = 1)" in text
    results, settings = (re.findall(r"(?m)^\|.*", part) for part in text.split("What the reported seeds ran with"))
    assert [lines[1][:7] for lines in (results, settings)] == ["| --- |"] * 2
    assert "- fewer than 3 seeds" in text
    assert text.endswith("    caspr-report\n")
    for lines in (results, settings):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1


def test_latex_escapes_and_balances(made: list[Table]) -> None:
    text = export.as_latex(made, "caspr-report compare 100%")
    body = [line for line in text.splitlines() if not line.startswith("%")]
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == text.count(r"\bottomrule") == 2
    assert r"c4\_lm" in text
    assert not any("%" in line.replace(r"\%", "") for line in body)
    assert not any("±" in line for line in body)
    rows = [line for line in body if line.endswith(r"\\")]
    spec = next(line for line in body if r"\begin{tabular}" in line)
    assert spec.endswith(r"lp{0.3\linewidth}}")  # a verdict of one line would run off the page
    assert {line.count("&") for line in rows[:4]} == {len(spec.split("{")[2]) - 1}
    notes = [line for line in body if "Note: " in line]
    assert len(notes) == sum(len(table.warnings) for table in made)
    first = text[: text.index(r"\end{table}")]
    assert first.index(r"\end{tabular}") < first.index("Note: shampoo: no run is done with a finite value")


def test_a_terminal_says_where_test_and_validation_disagree_and_how_many_have_a_test_value() -> None:
    runs = [run("adamw", s, 4.5 + s / 50) for s in range(3)] + [run("caspr", s, 4.0 + s * s / 90) for s in range(3)]
    assert not any("test disagrees" in line for line in lines(tables(runs)[0]))
    turned = [
        replace(each, result=each.result | {"test": {"test/loss": 9 - each.final} if each.seed else {}})
        for each in runs
    ]
    text = " ".join(" ".join(lines(tables(turned)[0], 200)).split())
    assert "3 pairs; test disagrees adamw" in text
    assert "4.470 ± 0.014 (n = 2)" in text
    none = [replace(each, result=each.result | {"test": {}}) for each in runs]
    (test,) = (column for column in format.sheet(tables(none)[0]).columns if column.head == "test")
    assert (test.cells, test.best) == (["-", "-"], set())
    alike = runs[:3] + [run("caspr", s, v) for s, v in enumerate((4.5, 4.53, 4.5))]
    turned = [replace(each, result=each.result | {"test": {"test/loss": 9 - each.final}}) for each in alike]
    difference = next(each.difference for each in tables(turned)[0].rows if each.difference)
    assert difference.value * difference.test.value < 0
    assert format.against(difference).startswith("against adamw: no significant difference: -0.2")
    assert "disagrees" not in format.against(difference)


# ---- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "sd", "said"),
    [
        (3.9921, 0.0116, "3.992 ± 0.012"),
        (6.92, 0.12, "6.92 ± 0.12"),
        (2e-5, 1.4e-7, "2.000e-05 ± 1.4e-07"),
        (0.0213, 2e-5, "0.021300 ± 0.000020"),
        (1499.9991, 0.0141, "1,499.999 ± 0.014"),
        (1500.0, 34.2, "1,500 ± 34"),
        (-0.0004, 0.014, "0.000 ± 0.014"),
        (1.25e30, 2e29, "1.25e+30 ± 2e+29"),
        (4.0, 0.0, "4.0000 ± 0"),
        (0.1, 1.7e-17, "0.1000 ± 0"),  # of equal values, by rounding
        (4.0, None, "4.0000"),
        (2e-5, None, "2e-05"),
        (None, None, "-"),
    ],
)
def test_digits_are_those_of_the_spread(mean: float | None, sd: float | None, said: str) -> None:
    assert format.mean_sd(Summary(2, mean, sd)) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0004, "p < 0.001"),
        (0.0012, "p = 0.001"),
        (0.0123, "p = 0.012"),
        (0.0496, "p = 0.0496"),
        (0.0504, "p = 0.0504"),
        (0.213, "p = 0.21"),
    ],
)
def test_p_values_around_the_level_differ(value: float, said: str) -> None:
    assert format.p(value) == said
    assert format.p(value, corrected=True) == said.replace("p", "p (Holm)", 1)


@pytest.mark.parametrize(
    ("value", "low", "high", "base", "said"),
    [
        (-0.0153, -0.0377, 0.0071, [4.0], "-0.38 % (-0.94 to +0.18)"),
        (0.056, 0.01, 0.12, [-4.0], "+1.4 % (+0.2 to +3.0)"),
        (0.04, 0.0, 0.08, [4.0], "+1.0 % (0.0 to +2.0)"),
        (-0.03, -0.063, 0.003, [0.1, 0.3], "-0.030 (-0.063 to +0.003)"),  # near zero: in units of the metric
        (-0.5, None, None, [4.5, 4.6, 4.4], "-11 %"),
        (0.0, None, None, [4.5], "0 %"),
        (None, None, None, [], "-"),
    ],
)
def test_differences_have_signs_and_the_digits_of_their_interval(
    value: float | None, low: float | None, high: float | None, base: list[float], said: str
) -> None:
    assert format.change(Comparison(value=value, low=low, high=high, base=tuple(base))) == said


def test_who_did_not_reach_the_target_is_not_counted_as_who_did() -> None:
    slow = [(300, 30.0, 4.6)]
    fast = [(300, 30.0, 4.4)]
    runs = [run("adamw", s, 4.4 if s < 2 else 4.6, curve=fast if s < 2 else slow) for s in range(5)]
    runs += [run("caspr", s, 4.4, curve=fast if s < 3 else slow) for s in range(5)]
    runs += [run("soap", s, 4.6, curve=slow) for s in range(5)]
    cells = {row.label: format.steps_to_target(row) for row in tables(runs)[0].rows}
    assert cells == {"caspr": "300 (3 of 5)", "adamw": "not reached; 2 of 5 did", "soap": "not reached"}


# ---- records -----------------------------------------------------------------------------------------------------


def test_a_sparkline_is_low_to_high_and_marks_what_is_not_finite() -> None:
    curve = [Point(k, None, value) for k, value in enumerate([1.0, 2.0, None, 8.0])]
    assert terminal.sparkline(curve) == "▁▂×█"
    assert terminal.sparkline([Point(1, None, 3.0)] * 2) == "▁▁"
    assert terminal.sparkline([Point(1, None, None)]) == terminal.sparkline([]) == ""
    assert len(terminal.sparkline([Point(k, None, float(k)) for k in range(500)])) == 40
    assert terminal.sparkline([Point(k, None, v) for k, v in enumerate([1e308, 0.0, -1e308, None])]) == "█▅▁×"
    assert terminal.sparkline([Point(1, None, 0.0), Point(2, None, 5e-324)]) == "▁█"


def test_a_record_in_words() -> None:
    text = "\n".join(terminal.record_lines(run("caspr", 2, 3.9, trial=4, search__name="lr")))
    for said in (
        "run      task=c4_lm optim=caspr scale=sample seed=2 search=lr trial=4",
        "state    done at step 300, 31.0 s of training",
        "result   val/loss 3.9000 at the end; test 4.0000",
        "target   4.5: step 200, 20.0 s",
        "4.9000 to 3.9000 in 3 validations",
        "data     words (sample), hash abcd",
    ):
        assert said in text
    where = {"device": {"type": "cpu", "processes": 1, "threads": 2, "products": "bfloat16"}}
    shown = "\n".join(terminal.record_lines(run(provenance=where)))
    assert "1 process, 2 threads, products in bfloat16" in " ".join(shown.split())
    failed = "\n".join(terminal.record_lines(run(state="failed")))
    assert "state    failed at step 100, 30.0 s of training: loss is nan" in failed


def best(table: Table) -> set[tuple[str, str]]:
    """The rows and heads of bold cells."""
    return {(table.rows[k].label, column.head) for column in format.sheet(table).columns for k in column.best}


def test_the_best_of_each_column_is_bold(made: list[Table]) -> None:
    """Of means, tests and times, whether significant or not; not where there is one row, or all are equal."""
    first, second = made
    heads = ("mean ± sd", "test", "steps to 4.5", "time to it")
    assert best(first) == {("caspr", head) for head in heads}
    assert best(second) == set()
    alike = tables([run("adamw", s, 4.5) for s in range(2)] + [run("caspr", s, 4.5) for s in range(2)])
    assert best(alike[0]) == set()
    lucky = tables(seeds("adamw", [4.5, 4.6]) + seeds("caspr", [4.0, None]))[0]
    assert {label for label, _ in best(lucky)} == {"adamw"}  # a seed of caspr failed
    cell = "4.030 ± 0.030"
    assert f"| **{cell}** |" in export.as_markdown(made, "x")
    assert rf"\textbf{{{cell.replace('±', '$' + chr(92) + 'pm$')}}}" in export.as_latex(made, "x")
    shown = list(terminal.table_lines(first, 120, bold=True))
    assert any(f"\x1b[1m{cell}\x1b[0m" in line for line in shown)
    assert [re.sub("\x1b\\[[0-9]*m", "", line).rstrip() for line in shown] == lines(first)


def test_the_list_has_the_newest_last_and_leaves_out_what_the_path_says_too() -> None:
    runs = [run("caspr", 5, optim__lr=0.01), run("caspr", 0), run("adamw", 2, final=None, state="running")]
    text = list(terminal.listing(runs, 200))
    assert [line.split()[:5] for line in text[1:]] == [
        ["c4_lm", "caspr", "lr=0.003", "0", "done"],
        ["c4_lm", "adamw", "-", "2", "running"],
        ["c4_lm", "caspr", "lr=0.01", "5", "done"],
    ]
    heads, *lines = terminal.listing(runs, 80)
    assert heads.split() == ["task", "optim", "seed", "state", "step", "final", "record"]
    assert max(map(len, lines)) <= 80
    assert " ".join(lines).endswith("(no room for: settings that differ, time; a wider terminal or a pipe has all)")
    assert next(terminal.listing(runs, 20)).split() == ["state", "step", "final", "record"]  # never less
