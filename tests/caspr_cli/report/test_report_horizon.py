import pytest
from recorded import run
from tabled import row, seeds, table

from caspr_cli.report import export, format
from caspr_cli.report.compare import tables
from caspr_cli.report.model import OwnSchedule, Run, Table


def whole(optim: str, steps: int, values: list[float | None], **keys: object) -> list[Run]:
    """Runs of one length: 10 steps take a second, and a value of None failed."""
    made = []
    for k, value in enumerate(values, 1):
        one = run(optim, k, value, "failed" if value is None else "done", trainer__max_steps=steps, **keys)
        if one.result:
            one.result["seconds"] = steps / 10
        made.append(one)
    return made


def of_length(steps: int, runs: list[Run]) -> Table:
    (made,) = [each for each in tables(runs) if each.steps == steps]
    return made


def own(made: Table, label: str) -> OwnSchedule | None:
    return row(made, label).own_schedule


def test_the_shortest_whole_run_whose_mean_reaches_the_target() -> None:
    """The target is 4.5; 200 steps reach it in the mean, though one seed does not, and 100 do not, though one does."""
    runs = whole("caspr", 300, [4.0, 4.1]) + whole("caspr", 200, [4.6, 4.3]) + whole("caspr", 100, [4.4, 4.9])
    assert own(of_length(300, runs), "caspr") == OwnSchedule(200, 20.0, (100, 200, 300))
    assert own(of_length(200, runs), "caspr") == OwnSchedule(200, 20.0, (100, 200))
    assert own(of_length(100, runs), "caspr") is None  # nothing is shorter
    (longest,) = export.entries([of_length(300, runs)])
    assert (longest["own_schedule_steps"], longest["own_schedule_seconds"]) == (200, 20.0)
    assert longest["steps_to_target"] == 200  # read off the curves
    rising = {"task__target__higher_is_better": True, "task__target__value": 0.8}
    up = [one for steps, end in ((100, 0.7), (200, 0.85), (300, 0.9)) for one in whole("soap", steps, [end], **rising)]
    assert own(of_length(300, up), "soap") == OwnSchedule(200, 20.0, (100, 200, 300))


@pytest.mark.parametrize(
    ("shorter", "found"),
    [
        (whole("adamw", 100, [4.4, 4.4]), OwnSchedule(100, 10.0, (100, 300))),
        (whole("adamw", 100, [4.9, 4.8]), OwnSchedule(300, 30.0, (100, 300))),
        (whole("adamw", 100, [4.4]), None),  # a seed is missing: that of the lucky one would be compared
        (whole("adamw", 100, [4.4, None]), OwnSchedule(300, 30.0, (100, 300))),  # it failed
        (whole("adamw", 100, [4.4, 4.4], optim__lr=0.1), None),  # other settings
        (whole("adamw", 100, [4.4, 4.4], optim__weight_decay=0.1), None),
        (whole("caspr", 100, [4.4, 4.4]), None),
        (whole("adamw", 400, [4.4, 4.4]), None),  # longer
    ],
)
def test_only_the_same_recipe_and_seeds_count(shorter: list[Run], found: OwnSchedule | None) -> None:
    made = of_length(300, whole("adamw", 300, [4.0, 4.1]) + shorter)
    (longest,) = [
        each
        for each in made.rows
        if each.optim == "adamw"
        and (each.settings["trainer.max_steps"], each.settings["optim.weight_decay"]) == (300, 0.0)
    ]
    assert longest.own_schedule == found


def test_none_of_the_lengths_may_do_and_there_may_be_no_target() -> None:
    runs = whole("adamw", 300, [5.0]) + whole("adamw", 100, [5.5])
    made = of_length(300, runs)
    assert own(made, "adamw") == OwnSchedule(None, None, (100, 300))
    assert "not reached in 2 lengths" in [cell for line in format.sheet(made).rows for cell in line]
    none = [one for steps in (100, 300) for one in whole("adamw", steps, [4.0], task__target__value=None)]
    assert own(of_length(300, none), "adamw") is None


def test_the_heading_says_from_which_schedule_steps_are_read() -> None:
    plain = table(seeds("adamw", [4.0, 4.1]))
    assert format.title(plain).endswith("; target 4.5, steps to it read off a schedule of 300 steps")
    assert "own schedule" not in format.sheet(plain).heads
    both = of_length(1300, whole("adamw", 1300, [4.0]) + whole("adamw", 100, [5.5], horizon=100))
    assert "read off a schedule of 1,300 steps; own schedule: the shortest whole run" in format.title(both)
    assert "own schedule" in format.sheet(both).heads
    assert "1,300 (2 lengths)" in [cell for line in format.sheet(both).rows for cell in line]
    assert "schedule" not in format.title(table(seeds("adamw", [4.0], task__target__value=None)))
    assert "schedule" not in format.title(table(seeds("adamw", [4.0], without=["trainer.max_steps"])))
