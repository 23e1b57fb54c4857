"""``caspr-report``: tables and figures of records, with error bars. It only reads files: no torch, no Hydra.

Libraries that take long to import are imported where they are used, when main() is ready for Ctrl-C.
"""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caspr_cli import __version__
from caspr_cli.common.errors import WIDEST, Parser, UserError
from caspr_cli.common.exits import OK, RUN_FAILED
from caspr_cli.common.files import write_output
from caspr_cli.common.format import count, listed, size, terminal_width
from caspr_cli.common.streams import console_script

if TYPE_CHECKING:
    from caspr_cli.report.model import Run, Table
    from caspr_cli.report.trackers import Found

WIDTH = 120  # where no terminal says its own
SHOWN = 8  # warnings about files
SUFFIXES = (".html", ".md", ".tex", ".csv", ".json", ".svg")
# Of commands that write files: what --to is called in the help, how its name ends, whether it has to be given, and why.
OUTPUTS = {
    "compare": ("FILE", SUFFIXES, False, f"{', '.join(SUFFIXES)}; may be given several times"),
    "profile": ("FILE.svg", (".svg",), False, "a figure; may be given several times"),
    "curves": ("FILE.svg", (".svg",), True, "the figure"),
    "trials": ("FILE", (".svg", ".md"), False, ".svg (by learning rate, and FILE-keys.svg by each other key) or .md"),
    "pack": ("FILE.jsonl.gz", (".jsonl.gz",), True, "the pack"),
    "unpack": ("DIRECTORY", (), True, "where the records go"),
    "leaderboard": ("FILE.md", (".md",), True, "the page"),
}

BASELINE = (
    "a row, as the table names it (default: adamw, where there is one); without an optimizer, as statistics=ema: each "
    "optimizer's own row with these settings"
)
EXAMPLES = """\
examples
  caspr-report compare                              a table for each task
  caspr-report compare --where optim=caspr,adamw    only these records
  caspr-report compare outputs/c4_lm --baseline shampoo
  caspr-report compare --to report.html --to table.tex
  caspr-report trials outputs --to trials.svg       all, by learning rate
  caspr-report curves outputs --to curves.svg --together
  caspr-report show outputs/c4_lm/caspr/lr0.006-4e9d1440/seed0
  caspr-report pack outputs --to study.jsonl.gz     one file of all records
  caspr-report unpack study.jsonl.gz --to outputs   directories again
  caspr-report check study.jsonl.gz                 is it whole and fair?

  caspr-report compare --help        your own logs of TensorBoard, CSV, W&B

PATHS are directories with records below them, or packs (default: outputs)
exits    0 done   1 check: something is wrong   2 bad usage   130 interrupted
"""
OWN_LOGS = """\
your own logs
  caspr-report compare --from tensorboard runs --metric val/loss \\
    --group optimizer
  caspr-report compare --from csv lightning_logs --metric val_acc \\
    --group optimizer --seed seed --at best
  caspr-report compare --from wandb export.csv --metric val/loss \\
    --names '{optimizer}-{seed}'
  caspr-report compare --from mlflow mlruns --metric val/loss \\
    --group optimizer --tuned lr --to report.html

A run is a folder of event files, a CSV (Lightning, Keras), a column or a line
of an export of W&B, or a run of MLflow. Seeds are taken from hyperparameters
and columns called seed, or from names, as adam_seed3; hyperparameters from
TensorBoard's HPARAMS, hparams.yaml, params/, columns of W&B's table of runs,
and names as lr=0.1. Every guess is printed. A run that ends before the others
of its row counts as failed; of several values at one step the last counts.
"""
LOGS = ("metric", "group", "seed", "names", "step", "at", "higher")  # flags of _add_logs
SOURCES = ("tensorboard", "csv", "wandb", "mlflow")


def parser() -> Parser:
    about = "Compare records, with error bars. It only reads files, also while runs go on."
    made = Parser("caspr-report", description=about, epilog=EXAMPLES)
    made.add_argument("--version", action="version", version=f"caspr-report {__version__}")
    commands = made.add_subparsers(title="commands", metavar="command", dest="what")

    def command(name: str, text: str, more: str = "") -> Parser:
        one: Parser = commands.add_parser(name, help=text, description=text, epilog=more)
        one.add_argument("paths", nargs="*", type=Path, metavar="PATHS", help="records or packs (default: outputs)")
        return one

    compare = command("compare", "a table for each task: mean, interval, test, verdict", OWN_LOGS)
    profile = command("profile", "over all tasks: how often is a row near the fastest?")
    trials = command("trials", "every trial and what failed; figures of value against tuned keys")
    curves = command("curves", "validation over training, mean and 95-percent band over seeds")
    listing = command("list", "one line a record, the newest last")
    command("show", "one record in words")
    command("pack", "many records in one small file, to be read like a directory")
    command("unpack", "the records of packs as directories again")
    command("leaderboard", "the rows of packs that were tuned alike, and how to enter one's own")
    check = command("check", "whether records may stand on the leaderboard, or what is wrong")
    check.add_argument("--board", metavar="DIRECTORY", type=Path, help="packs of the leaderboard that it has to fit")
    check.add_argument("--rerun", metavar="DIRECTORY", type=Path, help="run two reported seeds of each row again there")
    units: dict[str, Any] = {"choices": ("steps", "seconds"), "default": "steps", "metavar": "UNIT"}
    units["help"] = "steps (the default) or seconds"
    for one in (compare, profile, curves):
        one.add_argument("--baseline", metavar="LABEL", help=BASELINE)
        one.add_argument("--target", metavar="TASK=VALUE", type=target, action="append", default=[], help="another "
                         "target, once for each task; times are then read from the curves")  # fmt: skip
    for one in (compare, profile, curves, trials):
        one.add_argument("--tuned", metavar="KEYS", type=keys, help="keys that rows are tuned over (default: optim.lr, "
                         "and those of searches)")  # fmt: skip
    for one in (compare, profile, curves, trials, listing):
        one.add_argument("--where", metavar="KEY=VALUES", type=condition, action="append", default=[], help="only "
                         "records with this, as optim=caspr,adamw; may be given several times")  # fmt: skip
        _add_logs(one)
    compare.add_argument("--json", action="store_true", help="the rows as a list, and nothing else on standard output")
    profile.add_argument("--unit", **units)
    curves.add_argument("--over", **units)
    curves.add_argument("--together", action="store_true", help="all tasks in one figure, and FILE-dark.svg for dark "
                        "pages")  # fmt: skip
    for name, (called, _, _, text) in OUTPUTS.items():
        commands.choices[name].add_argument("--to", metavar=called, type=Path, action="append", default=[], help=text)
    return made


def _add_logs(one: Parser) -> None:
    own = one.add_argument_group("your own logs (caspr-report compare --help has examples)")
    own.add_argument("--from", dest="kind", metavar="KIND", choices=SOURCES, help="what PATHS hold, in place "
                     f"of records: {', '.join(SOURCES)}")  # fmt: skip
    own.add_argument("--metric", metavar="NAME", help="as it was logged, as val/loss")
    own.add_argument("--group", metavar="KEYS", type=keys, help="hyperparameters: a row for each value (default: "
                     "the name of the run without its seed)")  # fmt: skip
    own.add_argument("--seed", metavar="KEY", help="the hyperparameter that is the seed (default: seed, or the name's)")
    own.add_argument("--names", metavar="PATTERN", help="how runs are called, as '{optimizer}/lr{lr}-{seed}'")
    own.add_argument("--step", metavar="COLUMN", help="of a CSV (default: step, or else epoch)")
    counts = "the value that counts: end, best, or a step (default: end)"
    own.add_argument("--at", metavar="WHICH", type=at, help=counts)
    for word in ("higher", "lower"):
        own.add_argument(f"--{word}-is-better", dest="higher", action="store_const", const=word == "higher",
                         help="in place of a guess from the metric's name")  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the command line. Raises UserError."""
    args: argparse.Namespace = parser().parse_args(argv)
    if args.what is None:
        raise UserError("say what to do (caspr-report --help)")
    if args.what in OUTPUTS:
        _check_files(args.what, args.to)
    args.kind = getattr(args, "kind", None)
    if args.kind and not args.paths:
        raise UserError(f"--from {args.kind}: name the folder or the files of the logs")
    given = [flag for flag in LOGS if getattr(args, flag, None) is not None]
    if given and not args.kind:
        raise UserError(f"--{given[0].replace('higher', 'higher-is-better')}: only with --from ({', '.join(SOURCES)})")
    if getattr(args, "step", None) and args.kind not in ("csv", "wandb"):
        raise UserError(f"--step: {args.kind} has steps of its own; columns are of csv and wandb")
    args.paths = args.paths or [Path("outputs")]
    return args


def keys(text: str) -> list[str]:
    return [key.strip() for key in text.split(",") if key.strip()]


def condition(text: str) -> str:
    if not all(text.partition("=")):
        raise argparse.ArgumentTypeError(f"should be KEY=VALUES, as optim=caspr,adamw, but is {text}")
    return text


def at(text: str) -> str | int:
    if text not in ("end", "best") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"should be end, best, or a step, but is {text}")
    return int(text) if text.isdecimal() else text


def target(text: str) -> tuple[str, float]:
    task, _, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not task or not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"should be TASK=VALUE, as c4_lm=4.2, but is {text}")
    return task, number


def _check_files(what: str, files: Sequence[Path]) -> None:
    _, allowed, needed, _ = OUTPUTS[what]
    if what == "unpack":
        if len(files) != 1 or files[0].is_file():
            raise UserError("unpack: name one directory with --to, and no file")
        return
    for file in files:
        if not file.suffix or not file.name.endswith(allowed):
            raise UserError(f"--to {file}: the name should end in {', '.join(allowed)}")
        if file.is_dir():
            raise UserError(f"--to {file}: it is a directory")
    if needed and len(files) != 1:
        raise UserError(f"{what}: name a file with --to, as {what}{allowed[0]}")


def run(args: argparse.Namespace) -> int:
    """Read the records, and do what was asked for. Return the exit code. Raises UserError."""
    from caspr_cli.report import records
    from caspr_cli.report.selection import where

    if args.what in ("check", "leaderboard"):
        return check(args) if args.what == "check" else leaderboard(args)
    found = _logs(args) if args.kind else records.find(args.paths)
    for line in found.warnings[:SHOWN]:
        print(f"warning  {line}", file=sys.stderr)
    if len(found.warnings) > SHOWN:
        print(f"warning  {len(found.warnings) - SHOWN} more files like these", file=sys.stderr)
    if not found.runs and found.warnings:
        raise UserError(f"all records in {listed(args.paths)} were left out (see above)")
    if not found.runs:
        raise UserError(f"no records in {listed(args.paths)}; {records.how(args.paths)}")
    runs = where(found.runs, getattr(args, "where", ()))
    {"list": listing, "show": show, "pack": pack, "unpack": unpack}.get(args.what, report)(args, runs)
    return OK


def check(args: argparse.Namespace) -> int:
    from caspr_cli.commands.check import check as all_right

    return OK if all_right(args.paths, args.board, args.rerun) else RUN_FAILED


def leaderboard(args: argparse.Namespace) -> int:
    from caspr_cli.commands.check import draw, packs
    from caspr_cli.report.leaderboard import page

    write_output(args.to[0], page(packs(args.paths), _command(), draw))
    print(f"wrote    {args.to[0]}")
    return OK


def _logs(args: argparse.Namespace) -> Found:
    """Return the runs of other programs, and say what was guessed."""
    from caspr_cli.report import logs
    from caspr_cli.report.trackers import Asked

    tuned = getattr(args, "tuned", None) or []
    given = {flag: value for flag in LOGS if (value := getattr(args, flag)) is not None}
    asked = Asked(args.kind, given.pop("metric", None), tuned=tuned, where=args.where, **given)
    found = logs.find(args.paths, asked)
    args.tuned, args.where = list(map(logs.key, tuned)), found.where
    for line in found.notes:
        print(f"note     {line}", file=sys.stderr)
    return found


def listing(args: argparse.Namespace, runs: Sequence[Run]) -> None:
    from caspr_cli.report import terminal

    print("\n".join(terminal.listing(runs, terminal_width())))  # in a pipe whole, as other programs read it


def show(args: argparse.Namespace, runs: Sequence[Run]) -> None:
    from caspr_cli.report import terminal

    if len(runs) > 1:
        raise UserError(f"show: {count(len(runs), 'record')} there; name one, as {runs[0].path}")
    print("\n".join(terminal.record_lines(runs[0], min(terminal_width(WIDTH), WIDEST))))


def pack(args: argparse.Namespace, runs: Sequence[Run]) -> None:
    from caspr_cli.report.pack import pack

    content = pack(runs, args.paths)
    write_output(args.to[0], content)
    print(f"wrote    {args.to[0]}: {count(len(runs), 'record')}, {size(len(content))}")


def unpack(args: argparse.Namespace, runs: Sequence[Run]) -> None:
    from caspr_cli.report.pack import unpack

    if outside := [path for path in args.paths if not path.is_file()]:
        raise UserError(f"unpack {outside[0]}: is not a pack")
    written, there = unpack(runs, args.to[0], args.paths)
    print(f"wrote    {args.to[0]}: {count(written, 'record')}" + (f"; {there} were there already" if there else ""))


def report(args: argparse.Namespace, runs: Sequence[Run]) -> None:
    """Print and write what is made from tables: compare, profile, curves, trials."""
    from caspr_cli.report import export
    from caspr_cli.report.compare import tables

    asked = vars(args)
    made = tables(runs, baseline=asked.get("baseline"), tuned=args.tuned, wanted=dict(asked.get("target", ())))
    quiet = args.what == "compare" and args.json
    out = sys.stderr if quiet else sys.stdout
    wrote = []
    for file in args.to:  # before anything is printed, as the reader of a pipe may leave
        for path, content in _contents(args, file, made):
            if content:
                write_output(path, content)
            nothing = f"nothing to {'draw' if path.suffix == '.svg' else 'show'}"
            wrote.append(f"wrote    {path}" if content else f"skipped  {path}: {nothing}")
    for line in [*([] if quiet else _lines(args, runs, made)), *wrote]:
        print(line, file=out)
    if quiet:
        print(export.as_json(made), end="")


def _lines(args: argparse.Namespace, runs: Sequence[Run], made: Sequence[Table]) -> Iterator[str]:
    from caspr_cli.report import terminal

    width, bold = terminal_width(WIDTH), sys.stdout.isatty()
    if args.what == "compare":
        yield from terminal.compared(made, runs, args.paths, width, bold=bold)
    elif args.what == "trials":
        yield from terminal.trials(made, width)
    elif args.what == "profile":
        from caspr_cli.report.profile import profile

        yield from terminal.profiled(profile(made, args.unit), width, bold=bold)


def _command() -> str:
    from caspr_cli.common.shape import printable  # imports yaml

    return printable(shlex.join(["caspr-report", *sys.argv[1:]]))


def _contents(args: argparse.Namespace, file: Path, made: Sequence[Table]) -> Iterator[tuple[Path, str]]:
    """Yield the files to write for one name: several for figures of which there is one for each table."""
    from caspr_cli.report import export

    command = _command()
    writers: dict[str, Callable[[], str]] = {
        ".md": lambda: (export.trials_as_markdown if args.what == "trials" else export.as_markdown)(made, command),
        ".tex": lambda: export.as_latex(made, command),
        ".csv": lambda: export.as_csv(made),
        ".json": lambda: export.as_json(made),
    }
    if file.suffix in writers:
        yield file, writers[file.suffix]()
    elif file.suffix == ".html":
        from caspr_cli.report.page import compared

        yield file, compared(made, command)
    elif args.what == "profile":
        from caspr_cli.report import figures
        from caspr_cli.report.profile import profile

        yield file, figures.profile(profile(made, args.unit))
    else:
        from caspr_cli.report import figures, sensitivity, style

        if args.what == "curves" and args.together:
            drawn = figures.together(made, over=args.over)
            yield file, drawn
            yield file.with_stem(f"{file.stem}-dark"), style.dark(drawn)
            return
        styles = style.styles(row.label for table in made for row in table.rows)
        parts = [(table.task, table.scale, table.data) for table in made]
        for table, own in zip(made, parts, strict=True):
            several = parts.count(own) > 1
            more = (table.metric, (table.data_hash or "")[:8], f"{table.steps}") if several else ()
            what = re.sub(r"[^\w.-]", "_", "-".join([*own, *more]))
            name = file if len(made) == 1 else file.with_stem(f"{file.stem}-{what}")
            if args.what == "trials":
                yield name, sensitivity.by_rate(table, styles)
                yield name.with_stem(f"{name.stem}-keys"), sensitivity.by_others(table, styles)
            else:
                yield name, figures.curves(table, over=getattr(args, "over", "steps"), styles=styles)


@console_script
def main() -> int:
    return run(parse(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
