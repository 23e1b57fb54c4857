"""``caspr-verify``: the paper's claims, checked. Imports torch only when there is something to compute."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from caspr_cli import __version__
from caspr_cli.common.errors import UserError
from caspr_cli.common.files import write_whole
from caspr_cli.common.format import Progress, duration, listed
from caspr_cli.recipe.errors import ConfigError, nearest
from caspr_cli.recipe.flags import Parser, one_of, positive
from caspr_cli.report import answer as answers
from caspr_cli.report.answer import Answer
from caspr_cli.runs import provenance
from caspr_cli.runs.launch import BAD_USAGE, INTERRUPTED, OK

FAILED = 1  # a statement that should hold did not
OUTPUTS = Path("outputs/verify")
OPTIMIZERS = ("caspr", "adamw")
# What is assumed of large models: see caspr_cli.theory.cost.answer.
ASSUMED = {
    "tokens": 4e6, "efficiency": 0.7, "mfu": 0.4, "float32": 67.0, "bfloat16": 989.0, "memory": 3.35, "network": 50.0
}  # fmt: skip
DEFAULTS = {"seed": 0, "seeds": 3, "optim": "caspr", "model": "c4_lm", **ASSUMED}  # of flags that have one


@dataclass(frozen=True)
class Question:
    """A subcommand: ``caspr_cli.theory.<name>.answer``.

    Args:
        flags: those it takes beside ``--quick``, ``--seed``, ``--to`` and ``--json``.
    """

    about: str
    flags: tuple[str, ...] = ()


LAYERS = ("seeds", "task", "parameter", "optim")
QUESTIONS = {
    "order": Question("full-matrix Adagrad <= order 1 <= CASPR <= ... <= Shampoo, on recorded gradients", LAYERS),
    "approximation": Question("how near each preconditioner comes to the full-matrix one, over training", LAYERS),
    "regret": Question("online convex problems: regret of all, against the bounds", ("seeds",)),
    "roots": Question("inverse roots: error, steps, time and memory, predicted and measured", ("seeds",)),
    "cost": Question(
        "FLOPs, bytes and time of a step: here, and on paper for large models", ("model", "batch", *ASSUMED)
    ),
}
ALL = "all"

HELP = """\
caspr-verify {version}: the paper's claims on real gradients, checked, with tables and figures

{questions}
  {all:<14}all of these, and one page of them: {outputs}/index.html

with
  --quick              seconds instead of minutes: less of everything, for a look
  --seed N             the first seed (default: 0)
  --seeds N            so many seeds, for bands (default: 3; {seeds})
and, for {task},
  --task NAME          gradients of this task alone: {tasks}
  --parameter TEXT     its layers with this in their names, of at most 1,024 numbers
  --optim NAME         gradients along the path of {optims} (default: caspr)
and, for cost,
  --model NAME         the task whose model is costed, at its sample scale (default: c4_lm); --batch N samples a step
  --tokens N           in a step of the large models (default: 4e6), trained at --mfu (0.4) of a GPU's peak
  --float32, --bfloat16, --memory, --network, --efficiency    of a GPU, in TFLOP/s, TB/s, GB/s and as a share of these
                       (defaults: an H100's data sheet, and 0.7)
results
  --to DIR             Markdown, JSON, CSV and SVG (default: {outputs}/<question>)
  --json               the answer, with nothing else on standard output
exits    0 done   1 a statement that should hold did not   2 bad usage   130 interrupted
"""


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, of which only what needs the tasks is left unchecked.

    Raises:
        ConfigError: one line for the user.
    """
    what, names = argv[0] if argv else "", (*QUESTIONS, ALL)
    if what not in names:
        given = f"{what}: no such question.{nearest(what, names)} (" if what else "say what to verify ("
        raise ConfigError(f"{given}choices: {', '.join(names)}; caspr-verify --help)")
    flags = QUESTIONS[what].flags if what != ALL else LAYERS
    parser = Parser(f"caspr-verify {what}", add_help=False, allow_abbrev=False)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--to", type=Path, default=OUTPUTS if what == ALL else OUTPUTS / what)
    parser.add_argument("--seed", type=natural, default=DEFAULTS["seed"])
    for flag in flags:
        parser.add_argument(f"--{flag}", type=kind_of(flag), default=DEFAULTS.get(flag))
    known = [flag for action in parser._actions for flag in action.option_strings]
    args, unknown = parser.parse_known_args(argv[1:])
    if unknown:
        hint = nearest(unknown[0].split("=")[0], known)
        raise ConfigError(f"{unknown[0]} is no flag of {what}.{hint} (caspr-verify --help)")
    if "optim" in flags:
        one_of("--optim", args.optim, OPTIMIZERS)
    args.what, args.questions = what, tuple(QUESTIONS) if what == ALL else (what,)
    _check_directory(args.to)
    return args


def kind_of(flag: str) -> Callable[[str], Any]:
    return positive if flag in ("seeds", "batch") else float if flag in ASSUMED else str


def natural(text: str) -> int:
    """A seed."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"should be 0, 1, 2, ... but is {text}")
    return int(text)


def _check_directory(directory: Path) -> None:
    """Better to know before minutes of computing than after."""
    there = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise ConfigError(f"--to {directory}: {there} is no directory")
    if not os.access(there, os.W_OK):
        raise ConfigError(f"--to {directory}: cannot write there: not permitted")


def run(args: argparse.Namespace) -> int:
    """Compute, print, and write. Returns the exit code.

    Raises:
        ConfigError, UserError: one line for the user.
    """
    out = sys.stderr if args.json else sys.stdout
    width = shutil.get_terminal_size((answers.WIDTH, 24)).columns
    made: list[Answer] = []
    for name in args.questions:
        if made and not args.json:
            print(file=out)
        print(f"caspr-verify {__version__}  {name}{' (quick)' if args.quick else ''}", file=out, flush=True)
        one = answered(name, args)
        made.append(one)
        directory = args.to / name if args.what == ALL else args.to
        written = answers.write(one, directory)
        if not args.json:
            print("\n".join(answers.lines(one, width)))
            print()
        print(f"wrote    {directory}: {listed([path.name for path in written], 20)}", file=out, flush=True)
    if args.what == ALL:
        print(f"wrote    {write_page(made, args.to)}", file=out)
    if args.json:
        print(answers.as_json(made if args.what == ALL else made[0]), end="")
    return judged(made)


def answered(name: str, args: argparse.Namespace) -> Answer:
    """What a question's module computes, with the command that asks for it and where it was asked."""
    progress, start = Progress(sys.stderr), time.monotonic()
    progress.say("importing torch")
    options = {flag: getattr(args, flag) for flag in QUESTIONS[name].flags if hasattr(args, flag)}
    module = import_module(f"caspr_cli.theory.{name}")
    try:
        one: Answer = module.answer(quick=args.quick, seed=args.seed, say=progress.say, **options)
    finally:
        progress.clear()
    return replace(one, command=command(name, args), provenance=origin(time.monotonic() - start))


def command(name: str, args: argparse.Namespace) -> str:
    """The line that asks this question alone."""
    given = {flag: getattr(args, flag) for flag in ("seed", *QUESTIONS[name].flags) if hasattr(args, flag)}
    words = [word for flag, value in given.items() if value != DEFAULTS.get(flag) for word in (f"--{flag}", str(value))]
    return shlex.join(["caspr-verify", name, *(["--quick"] if args.quick else []), *words])


def origin(seconds: float) -> dict[str, Any]:
    """Versions and machine, without the machine's name and without paths."""
    found = provenance.collect([])
    code = found["code"] or {}
    return {
        "caspr-cli": found["caspr_cli"],
        "commit": code.get("commit"),
        "python": found["python"],
        "torch": found["packages"]["torch"],
        "numpy": found["packages"]["numpy"],
        "processor": found["machine"]["processor"],
        "cores": found["machine"]["cores"],
        "took": duration(seconds),
    }


def write_page(made: Sequence[Answer], directory: Path) -> Path:
    """One page of all answers."""
    from caspr_cli.report import page

    target = directory / "index.html"
    write_whole(target, page.answers(made, "The theory of CASPR, checked"))
    return target


def judged(made: Sequence[Answer]) -> int:
    """The exit code; says which statements should have held."""
    broken = [(one.name, text) for one in made for text, held in one.claims if not held]
    for name, text in broken:
        print(f"failed   {name}: {text}", file=sys.stderr)
    return FAILED if broken else OK


def usage() -> str:
    # the tasks of caspr_cli.theory.gradients, which needs torch
    from caspr_cli.recipe.schema import TASKS

    return HELP.format(
        version=__version__,
        questions="\n".join(f"  {name:<14}{question.about}" for name, question in QUESTIONS.items()),
        all=ALL,
        outputs=OUTPUTS,
        **{flag: listed([name for name, one in QUESTIONS.items() if flag in one.flags]) for flag in ("seeds", "task")},
        tasks=", ".join(TASKS),
        optims=" or ".join(OPTIMIZERS),
    )


def main() -> int:
    """Console script. Returns the exit code."""
    argv = sys.argv[1:]
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if "--help" in argv or "-h" in argv:
        print(usage(), end="")
        return OK
    if "--version" in argv:
        print(f"caspr-verify {__version__}")
        return OK
    try:
        code = run(parse(argv))
        sys.stdout.flush()
        return code
    except (ConfigError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_USAGE
    except BrokenPipeError:  # the reader has seen enough; files may not be written yet, as | head asks
        sys.stdout = open(os.devnull, "w", encoding="utf8")  # noqa: SIM115
    except KeyboardInterrupt:
        return INTERRUPTED
    return OK


if __name__ == "__main__":
    sys.exit(main())
