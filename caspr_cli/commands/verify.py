"""``caspr-verify``: check the paper's claims. Imports torch only when it computes."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from caspr_cli import __version__
from caspr_cli.common import plugins
from caspr_cli.common.errors import Parser, UserError, positive
from caspr_cli.common.files import write_output
from caspr_cli.common.format import SECONDS_BETWEEN_LINES, Progress, duration, listed, terminal_width
from caspr_cli.common.streams import OK, console_script
from caspr_cli.report import answer as answers
from caspr_cli.report.answer import Answer
from caspr_cli.runs import provenance
from caspr_cli.tasks.registry import TASKS

FAILED = 1  # a statement that should hold did not
OUTPUTS = Path("outputs/verify")
ALL = "all"


def natural(text: str) -> int:
    """Return a seed."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"should be 0, 1, 2, ... but is {text}")
    return int(text)


@dataclass(frozen=True)
class Flag:
    """A flag of a question: its default, its type, and its line of help."""

    default: Any
    kind: Callable[[str], Any]
    help: str
    metavar: str | None = "N"
    choices: tuple[str, ...] | None = None


# The values of caspr_cli.theory.gradients, which cannot be imported here: it needs torch.
OURS = [name for name in TASKS if plugins.package(plugins.TASKS, name) is None]
FLAGS = {
    "seed": Flag(0, natural, "the first seed"),
    "seeds": Flag(3, positive, "number of seeds, for bands"),
    "task": Flag(None, str, f"gradients of this task alone: {', '.join(OURS)}", "NAME"),
    "parameter": Flag(None, str, "layers of the task with this in their names, with at most 1,024 numbers", "TEXT"),
    "optim": Flag("caspr", str, "caspr or adamw, along whose path gradients are recorded", "NAME", ("caspr", "adamw")),
    "model": Flag("c4_lm", str, "the task whose model is costed, at its sample scale", "NAME"),
    "batch": Flag(None, positive, "samples in a step of that model (default: as in the task)"),
    "tokens": Flag(4e6, float, "tokens in a step of the large models"),
    "efficiency": Flag(0.7, float, "the part of a GPU's peaks that the optimizer reaches"),
    "mfu": Flag(0.4, float, "the part of a GPU's bfloat16 peak that training reaches"),
    "float32": Flag(67.0, float, "TFLOP/s of a GPU; this and the next three: an H100's data sheet"),
    "bfloat16": Flag(989.0, float, "TFLOP/s of a GPU"),
    "memory": Flag(3.35, float, "TB/s of a GPU's memory"),
    "network": Flag(50.0, float, "GB/s of a GPU's link to other nodes"),
}
LAYERS = ("seed", "seeds", "task", "parameter", "optim")
COSTED = tuple(name for name in FLAGS if name not in LAYERS)
# Each question is a module of caspr_cli.theory, with its flags.
QUESTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "order": ("full-matrix Adagrad <= order 1 <= CASPR <= ... <= Shampoo, on recorded gradients", LAYERS),
    "approximation": ("how near each preconditioner comes to the full-matrix one, over training", LAYERS),
    "regret": ("online convex problems: regret of all, against the bounds", ("seed", "seeds")),
    "roots": ("inverse roots: error, steps, time and memory, predicted and measured", ("seed", "seeds")),
    "cost": ("FLOPs, bytes and time of a step: here, and on paper for large models", ("seed", *COSTED)),
}
EXITS = """\
exits    0 done   1 a statement that should hold did not   2 bad usage
         130 interrupted"""


def parser() -> Parser:
    """Return the parser of the command line, with a subparser for each question."""

    made = Parser(
        "caspr-verify",
        description="The paper's claims on real gradients, checked, with tables and figures.",
        epilog=f"caspr-verify question --help has the flags of a question\n{EXITS}",
    )
    made.add_argument("--version", action="version", version=f"caspr-verify {__version__}")
    questions = made.add_subparsers(title="questions", metavar="question", dest="what")
    every = f"all of these, and one page of them: {OUTPUTS}/index.html"
    for name, (text, flags) in (QUESTIONS | {ALL: (every, LAYERS)}).items():
        about = textwrap.fill(f"{text}.", 78)
        one: Parser = questions.add_parser(name, help=text, description=about, epilog=EXITS)
        one.add_argument("--quick", action="store_true", help="seconds instead of minutes: less of everything")
        for flag in flags:
            f = FLAGS[flag]
            default = f"{f.default:g}" if isinstance(f.default, float) else f.default
            said = f.help if default is None else f"{f.help} (default: {default})"
            one.add_argument(
                f"--{flag}", type=f.kind, default=f.default, metavar=f.metavar, choices=f.choices, help=said
            )
        to = OUTPUTS if name == ALL else OUTPUTS / name
        text = f"directory for Markdown, JSON, CSV and SVG (default: {to})"
        one.add_argument("--to", type=Path, default=to, metavar="DIR", help=text)
        one.add_argument("--json", action="store_true", help="the answer, with nothing else on standard output")
    return made


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the command line, of which only what needs the tasks is left unchecked.

    Raises:
        UserError: one line for the user.
    """
    args: argparse.Namespace = parser().parse_args(argv)
    if args.what is None:
        raise UserError(f"say what to verify (choices: {', '.join((*QUESTIONS, ALL))}; caspr-verify --help)")
    args.questions = tuple(QUESTIONS) if args.what == ALL else (args.what,)
    # Better to know before minutes of computing than after.
    there = next(parent for parent in (args.to, *args.to.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise UserError(f"--to {args.to}: {there} is no directory")
    if not os.access(there, os.W_OK):
        raise UserError(f"--to {args.to}: cannot write there: not permitted")
    return args


def run(args: argparse.Namespace) -> int:
    """Compute, print, and write. Return the exit code.

    Raises:
        UserError: one line for the user.
    """
    out = sys.stderr if args.json else sys.stdout
    width = terminal_width(answers.WIDTH)
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
        from caspr_cli.report import page

        write_output(args.to / "index.html", page.answers(made, "The theory of CASPR, checked"))
        print(f"wrote    {args.to / 'index.html'}", file=out)
    if args.json:
        print(answers.as_json(made if args.what == ALL else made[0]), end="")
    return judged(made)


def answered(name: str, args: argparse.Namespace) -> Answer:
    """Return the answer of a question's module, with the command that asks for it and where it was computed."""
    progress, start = Progress(sys.stderr, SECONDS_BETWEEN_LINES), time.monotonic()
    progress.say("importing torch")
    given = {flag: getattr(args, flag) for flag in QUESTIONS[name][1] if hasattr(args, flag)}
    module = import_module(f"caspr_cli.theory.{name}")
    try:
        one: Answer = module.answer(module.Choice(quick=args.quick, **given), progress.say)
    finally:
        progress.clear()
    changed = {flag: value for flag, value in given.items() if value != FLAGS[flag].default}
    words = [word for flag, value in changed.items() for word in (f"--{flag}", str(value))]
    command = shlex.join(["caspr-verify", name, *(["--quick"] if args.quick else []), *words])
    return replace(one, command=command, provenance=origin(time.monotonic() - start))


def origin(seconds: float) -> dict[str, Any]:
    """Return versions and machine, without the machine's name and without paths."""
    found = provenance.collect([])
    return {
        "caspr-cli": found["caspr_cli"],
        "commit": (found["code"] or {}).get("commit"),
        "python": found["python"],
        "torch": found["packages"]["torch"],
        "numpy": found["packages"]["numpy"],
        "processor": found["machine"]["processor"],
        "cores": found["machine"]["cores"],
        "took": duration(seconds),
    }


def judged(made: Sequence[Answer]) -> int:
    """Print which statements should have held, and return the exit code."""
    broken = [(one.name, text) for one in made for text, held in one.claims if not held]
    for name, text in broken:
        print(f"failed   {name}: {text}", file=sys.stderr)
    return FAILED if broken else OK


@console_script
def main() -> int:
    """Run the console script. Return the exit code."""
    return run(parse(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
