"""``caspr-verify``: check the paper's claims. Imports torch only when it computes."""

import argparse
import os
import shlex
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import Field, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from caspr_cli import __version__
from caspr_cli.common.errors import Parser, UserError
from caspr_cli.common.exits import OK, RUN_FAILED
from caspr_cli.common.files import write_output
from caspr_cli.common.format import SECONDS_BETWEEN_LINES, Progress, duration, listed, terminal_width
from caspr_cli.common.streams import console_script
from caspr_cli.report import answer as answers
from caspr_cli.report.answer import Answer
from caspr_cli.runs import provenance
from caspr_cli.theory.choices import Choice, Costs, Layers, Seeds

OUTPUTS = Path("outputs/verify")
ALL = "all"


# Each question is a module of caspr_cli.theory; its flags are fields of a dataclass.
QUESTIONS: dict[str, tuple[str, type[Choice]]] = {
    "order": ("full-matrix Adagrad <= order 1 <= CASPR <= ... <= Shampoo, on recorded gradients", Layers),
    "approximation": ("how near each preconditioner comes to the full-matrix one, over training", Layers),
    "regret": ("online convex problems: regret of all, against the bounds", Seeds),
    "roots": ("inverse roots: error, steps, time and memory, predicted and measured", Seeds),
    "cost": ("FLOPs, bytes and time of a step: here, and on paper for large models", Costs),
}
EXITS = """\
exits    0 done   1 a statement that should hold did not   2 bad usage
         130 interrupted"""


def flags(choice: type[Choice]) -> list[Field[Any]]:
    return [each for each in fields(choice) if each.metadata]


def parser() -> Parser:
    made = Parser(
        "caspr-verify",
        description="The paper's claims on real gradients, checked, with tables and figures.",
        epilog=f"caspr-verify question --help has the flags of a question\n{EXITS}",
    )
    made.add_argument("--version", action="version", version=f"caspr-verify {__version__}")
    questions = made.add_subparsers(title="questions", metavar="question", dest="what")
    every = f"all of these, and one page of them: {OUTPUTS}/index.html"
    for name, (text, choice) in (QUESTIONS | {ALL: (every, Layers)}).items():
        about = textwrap.fill(f"{text}.", 78)
        one: Parser = questions.add_parser(name, help=text, description=about, epilog=EXITS)
        one.add_argument("--quick", action="store_true", help="seconds instead of minutes: less of everything")
        for each in flags(choice):
            default = f"{each.default:g}" if isinstance(each.default, float) else each.default
            said = each.metadata["help"] + ("" if default is None else f" (default: {default})")
            one.add_argument(f"--{each.name}", default=each.default, **{**each.metadata, "help": said})
        to = OUTPUTS if name == ALL else OUTPUTS / name
        text = f"directory for Markdown, JSON, CSV and SVG (default: {to})"
        one.add_argument("--to", type=Path, default=to, metavar="DIR", help=text)
        one.add_argument("--json", action="store_true", help="the answer, with nothing else on standard output")
    return made


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the parsed command line. What needs the tasks is not checked yet. Raises UserError."""
    args: argparse.Namespace = parser().parse_args(argv)
    if args.what is None:
        raise UserError(f"say what to verify (choices: {', '.join((*QUESTIONS, ALL))}; caspr-verify --help)")
    args.questions = tuple(QUESTIONS) if args.what == ALL else (args.what,)
    # A mistake here is found before minutes of computing.
    there = next(parent for parent in (args.to, *args.to.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise UserError(f"--to {args.to}: {there} is no directory")
    if not os.access(there, os.W_OK):
        raise UserError(f"--to {args.to}: cannot write there: not permitted")
    return args


def run(args: argparse.Namespace) -> int:
    """Compute, print, and write. Return the exit code. Raises UserError."""
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
    _, kind = QUESTIONS[name]
    given = {each: getattr(args, each.name) for each in flags(kind) if hasattr(args, each.name)}
    module = import_module(f"caspr_cli.theory.{name}")
    try:
        choice = kind(quick=args.quick, **{each.name: value for each, value in given.items()})
        one: Answer = module.answer(choice, progress.say)
    finally:
        progress.clear()
    changed = {each.name: value for each, value in given.items() if value != each.default}
    words = [word for flag, value in changed.items() for word in (f"--{flag}", str(value))]
    command = shlex.join(["caspr-verify", name, *(["--quick"] if args.quick else []), *words])
    return replace(one, command=command, provenance=origin(time.monotonic() - start))


def origin(seconds: float) -> dict[str, Any]:
    """Return versions and machine, without the machine's name and without paths."""
    found = provenance.collect([])
    own = {"caspr-cli": found["caspr_cli"], "commit": (found["code"] or {}).get("commit"), "python": found["python"]}
    packages = {name: found["packages"][name] for name in ("torch", "numpy")}
    machine = {key: found["machine"][key] for key in ("processor", "cores")}
    return own | packages | machine | {"took": duration(seconds)}


def judged(made: Sequence[Answer]) -> int:
    """Print which statements should have held, and return the exit code."""
    broken = [(one.name, text) for one in made for text, held in one.claims if not held]
    for name, text in broken:
        print(f"failed   {name}: {text}", file=sys.stderr)
    return RUN_FAILED if broken else OK


@console_script
def main() -> int:
    return run(parse(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
