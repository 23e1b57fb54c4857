"""``caspr-bench``: what an optimizer would cost. Imports torch only when there is something to measure."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caspr_cli import __version__
from caspr_cli.bench.shapes import PRESETS, ShapeSet, parse_shapes, scaled_transformer
from caspr_cli.common.format import Progress
from caspr_cli.common.streams import console_script
from caspr_cli.recipe import compose
from caspr_cli.recipe.errors import ConfigError, nearest
from caspr_cli.recipe.flags import Parser, one_of, positive
from caspr_cli.recipe.schema import OPTIMIZERS, KroneckerConf, Recipe
from caspr_cli.runs.launch import BAD_USAGE, INTERRUPTED, OK
from caspr_cli.runs.record import finite, write_whole

if TYPE_CHECKING:
    from caspr_cli.bench.measure import Row
    from caspr_cli.bench.ranks import RanksRow

DEFAULT = ("caspr", "shampoo", "adamw", "muon", "soap", "scalable_shampoo")
NAMES = (*OPTIMIZERS, "scalable_shampoo")
KRONECKER = tuple(name for name, conf in OPTIMIZERS.items() if issubclass(conf, KroneckerConf))  # share their work
PARTS = ("statistics", "roots", "apply", "communication")
DTYPES = ("float32", "bfloat16", "float16", "float64")
TOKENS = 4096  # in a training step, where nothing else is said
PLOTS = Path("outputs/bench")

HELP = """\
caspr-bench {version}: what would an optimizer cost? Times steps, nothing is trained

  caspr-bench                                                14.7M parameters, six optimizers; takes minutes
  caspr-bench --optim caspr,adamw --params 2M                two of them, a smaller set; a minute
  caspr-bench --shapes "4*1536x512,2048x512,200*64x64x3x3"   your own shapes
  caspr-bench --task c4_lm --scale paper                     the parameters of a task's model
  caspr-bench --roots                                        how exact inverse roots in float32 are, by solver
  caspr-bench --ranks 1,2,4                                  a step that so many processes share

what to measure, one of
  --shapes LIST      comma-separated COUNT*SIZExSIZE..., or a preset: {presets}
  --params N         a transformer of about so many parameters: 300k, 14M, 1.5B
  --task NAME        a task's model: {tasks}
  --scale NAME       of the task (default: sample)
with
  --optim LIST       of {names[0]}
                     {names[1]} (default: all but those in brackets)
  --interval N       steps between two refreshes of roots or bases (default: 10; not in scalable_shampoo)
  --block-size N     longer axes are cut, in caspr, shampoo and scalable_shampoo (default: 1024)
  --set KEY=VALUE    an option of caspr and shampoo, as often as you like: --set order=3 --set merge=square
  --batch N          tokens in a training step, to predict a share of it (default: {tokens}; a task has its own)
  --rounds N         in each, every optimizer makes a step (default: 20)
  --dtype TYPE       of weights and gradients: {dtypes} (default: float32)
  --device, --threads   cpu or cuda (default: cpu); threads on a CPU, with --ranks those of each (default: 1)
results
  --json FILE        the rows as a list; - for standard output, with nothing else on it
  --png FILE         the chart (default: {plots}/<what was measured>.png); --no-png for none
exits    0 done   2 bad usage   130 interrupted
"""

LEGEND = """\
median      of a step at the optimizer's own interval, as are p99 and mean; the chart shows the median
no refresh  a step that refreshes no roots or bases; floor: its matrix products alone; x floor: the ratio of the two
x adamw     median / that of fused AdamW
split       of the median step: statistics, roots, apply, and the rest (momentum, graft, weights)
B/param     bytes of optimizer state for each parameter
share       of a training step, predicted: mean / (mean + {train} of forward and backward for {batch})"""


def ranks(text: str) -> list[int]:
    counts = [positive(part.strip()) for part in text.split(",")]
    return sorted(set(counts))


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, of which only what needs torch is left unchecked.

    Raises:
        ConfigError: one line for the user.
    """
    parser = Parser("caspr-bench", add_help=False, allow_abbrev=False)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--shapes", default="transformer")
    what.add_argument("--params")
    what.add_argument("--task")
    what.add_argument("--roots", action="store_true")
    parser.add_argument("--scale")
    parser.add_argument("--ranks", type=ranks)
    parser.add_argument("--optim")
    for flag, default in (("--interval", 10), ("--block-size", 1024), ("--batch", None), ("--rounds", 20)):
        parser.add_argument(flag, type=positive, default=default)
    parser.add_argument("--set", action="append", default=[], dest="given")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=positive)
    parser.add_argument("--json")
    png = parser.add_mutually_exclusive_group()
    png.add_argument("--png", type=Path)
    png.add_argument("--no-png", action="store_true")
    flags = [flag for action in parser._actions for flag in action.option_strings]
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        hint = nearest(unknown[0].split("=")[0], flags)
        raise ConfigError(f"{unknown[0]} is not a flag.{hint} (caspr-bench --help)")
    chosen = args.optim or ("caspr" if args.ranks else ",".join(DEFAULT))
    args.optim = [one_of("--optim", name.strip(), NAMES) for name in chosen.split(",")]
    if args.ranks and (others := [name for name in args.optim if name not in KRONECKER]):
        raise ConfigError(f"--optim {others[0]}: does not share its work among ranks; {', '.join(KRONECKER)} do")
    one_of("--dtype", args.dtype, DTYPES)
    one_of("--device", args.device, ("cpu", "cuda"))
    if args.scale and not args.task:
        raise ConfigError("--scale: is that of a task; say which with --task")
    if args.ranks and args.roots:
        raise ConfigError("--ranks: shares a step; --roots has none")
    if args.batch and args.task:
        raise ConfigError("--batch: a task has a batch of its own")
    return args


def recipe_of(task: str, scale: str) -> Recipe:
    """The recipe of a task in one of its scales.

    Raises:
        ConfigError: there is no such task, or it has no such scale.
    """
    import hydra

    one_of("--task", task, tuple(compose.choices("task")))
    one_of("--scale", scale, tuple(compose.choices(f"scale/{task}")))
    compose.register_schemas()
    with hydra.initialize_config_dir(str(compose.CONF), version_base="1.3"):
        return compose.freeze(hydra.compose("train", overrides=[f"task={task}", f"scale={scale}"]))


def writable(path: Path) -> Path:
    """The same path, with its directory made: better to know before minutes of measuring than after.

    Raises:
        ConfigError: nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{path}: cannot write there: {error.strerror}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{path}: cannot write there: {'it is a directory' if path.is_dir() else 'not permitted'}")
    return path


def run(args: argparse.Namespace) -> None:
    """Measure, print, and write what was asked for.

    Raises:
        ConfigError: one line for the user.
    """
    if args.roots:
        return run_roots(args)
    what: ShapeSet | Recipe = (
        recipe_of(args.task, args.scale or "sample")
        if args.task
        else scaled_transformer(args.params) if args.params else parse_shapes(args.shapes)
    )  # fmt: skip
    if args.ranks:
        return run_ranks(args, what)
    name = what.name if isinstance(what, ShapeSet) else f"{what.task.name}-{what.scale}"
    png = None if args.no_png else writable(args.png or PLOTS / f"{name}.png")
    target = json_file(args)
    out = sys.stderr if args.json == "-" else sys.stdout
    rows = measured(args, what)
    listed = as_json([asdict(row) for row in rows])
    if target:
        write_whole(target, listed)
    if png:
        from caspr_cli.bench.figure import draw, save

        save(draw(rows), png)
    for line in report(rows, "its own batch" if args.task else f"{args.batch or TOKENS:,} tokens"):
        print(line, file=out)
    for kind, path in (("json", target), ("png", png)):
        if path:
            print(f"{kind:<11} {path}", file=out)
    for line in next_commands(args):
        print(line, file=out)
    if args.json == "-":
        print(listed, end="")


def json_file(args: argparse.Namespace) -> Path | None:
    """Where ``--json`` goes, if that is a file."""
    return writable(Path(args.json)) if args.json and args.json != "-" else None


def as_json(rows: list[dict[str, Any]]) -> str:
    return json.dumps([finite(row) for row in rows], indent=2, allow_nan=False) + "\n"


def deliver(rows: list[dict[str, Any]], lines: list[str], target: Path | None, args: argparse.Namespace) -> None:
    """The lines for people, and the rows where they are wanted."""
    if target:
        write_whole(target, as_json(rows))
        lines.append(f"{'json':<11} {target}")
    print("\n".join(lines), file=sys.stderr if args.json == "-" else sys.stdout)
    if args.json == "-":
        print(as_json(rows), end="")


def run_ranks(args: argparse.Namespace, what: ShapeSet | Recipe) -> None:
    """The table of shared steps."""
    target = json_file(args)
    progress = Progress(sys.stderr)
    progress.say("importing torch")
    from caspr_cli.bench import contenders, session
    from caspr_cli.bench.ranks import measured_ranks

    try:
        rows = measured_ranks(
            what,
            args.optim,
            args.ranks,
            contenders.Settings(args.interval, args.block_size, contenders.parse_given(args.given, args.optim)),
            session.Machine(args.dtype, args.device, args.threads),
            rounds=args.rounds,
            say=progress.say,
        )
    finally:
        progress.clear()
    deliver([asdict(row) for row in rows], list(ranks_report(rows)), target, args)


def ranks_report(rows: list[RanksRow]) -> Iterator[str]:
    """The table and what its columns are."""
    first = rows[0]
    yield (
        f"caspr-bench {__version__}  {first.set}, {first.parameters:,} parameters, {first.dtype}; times in ms, "
        f"{first.threads} thread{'s' * (first.threads > 1)} a rank on {first.device}, {os.cpu_count()} cores"
    )
    heads = ["optimizer", "ranks", "median", "mean", "speedup", *PARTS, "state MB", "factors MB", "received MB", "x"]
    cells = [
        [
            row.optimizer,
            str(row.ranks),
            *map(number, (row.median_ms, row.mean_ms)),
            f"{row.speedup:.2f}",
            *map(number, (row.statistics_ms, row.roots_ms, row.apply_ms, row.communication_ms)),
            *(f"{size / 1e6:.1f}" for size in (row.state_bytes, row.factor_bytes, row.bytes_received)),
            f"{row.bytes_received / row.weight_bytes:.2f}",
        ]
        for row in rows
    ]
    yield from aligned([heads, *cells])
    yield ""
    yield "mean      of a step at the optimizer's own interval, until the slowest rank is done; speedup: of the mean"
    yield "split     of the mean step, of the rank that spends most on it; communication: waiting for others' updates"
    yield "state     of the rank that keeps most: moments, which all keep, and factors, which are statistics and roots"
    yield "received  by a rank in a step, its own part included; x: how many times the weights that is"


def run_roots(args: argparse.Namespace) -> None:
    """The table of the roots' errors."""
    target = json_file(args)
    progress = Progress(sys.stderr)
    progress.say("roots of twenty matrices by four solvers: half a minute")
    from caspr_cli.bench.root_errors import main_table

    try:
        rows, lines = main_table(threads=args.threads)
    finally:
        progress.clear()
    deliver(rows, lines, target, args)


def measured(args: argparse.Namespace, what: ShapeSet | Recipe) -> list[Row]:
    """A row for each optimizer."""
    progress = Progress(sys.stderr)
    progress.say("importing torch")
    from caspr_cli.bench import contenders, session

    try:
        return session.measured(
            what,
            args.optim,
            contenders.Settings(args.interval, args.block_size, contenders.parse_given(args.given, args.optim)),
            session.Machine(args.dtype, args.device, args.threads),
            tokens=args.batch or TOKENS,
            rounds=args.rounds,
            say=progress.say,
        )
    finally:
        progress.clear()


def report(rows: list[Row], batch: str) -> Iterator[str]:
    """The table, what its columns are, the roots, and the machine."""
    first = rows[0]
    yield f"caspr-bench {__version__}  {first.set}, {first.parameters:,} parameters, {first.dtype}; times in ms"
    yield from table(rows)
    yield ""
    yield from LEGEND.format(train=f"{number(first.train_ms)} ms", batch=batch).splitlines()
    for row in rows:
        yield from roots(row)
    versions = ", ".join(f"{name} {value}" for name, value in first.versions.items())
    yield f"machine     {first.device}, threads {first.threads}; {versions}"


def table(rows: list[Row]) -> Iterator[str]:
    heads = ["optimizer", "median", "p99", "mean", "no refresh", "floor", "x floor", "x adamw",
             "statistics", "roots", "apply", "rest", "B/param", "share"]  # fmt: skip
    cells = [
        [
            row.optimizer,
            *map(number, (row.median_ms, row.p99_ms, row.mean_ms, row.step_ms, row.floor_ms)),
            *map(ratio, (row.floor_ratio, row.adamw_ratio)),
            *map(number, (row.statistics_ms, row.roots_ms, row.apply_ms, row.rest_ms)),
            f"{row.state_bytes_per_parameter:.1f}",
            f"{100 * row.share:.1f} %",
        ]
        for row in rows
    ]
    yield from aligned([heads, *cells])


def aligned(lines: list[list[str]]) -> Iterator[str]:
    """Columns, all but the first to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        right = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join([first.ljust(widths[0]), *right])


def roots(row: Row) -> Iterator[str]:
    """What a refresh of all roots at once costs, where it was measured."""
    if row.refresh_ms is None:
        return
    yield (
        f"roots       of {row.optimizer}, all at once: {number(row.refresh_ms)} ms, {ratio(row.refresh_ratio)} x "
        f"LAPACK's eigendecompositions of as many matrices of the same sizes ({number(row.lapack_ms)} ms)"
    )
    yield (
        f"            warm-started: {number(row.warm_ms)} ms, {ratio(row.warm_ratio)} x LAPACK, "
        f"largest residual {row.warm_residual:.1e}"
    )


def number(value: float | None) -> str:
    """Milliseconds, in about three digits."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def next_commands(args: argparse.Namespace) -> Iterator[str]:
    """What to try now."""
    if args.task:
        scale = f" scale={args.scale}" if args.scale else ""
        yield f"next        caspr-train task={args.task}{scale} optim={args.optim[0]}"
        yield f"            caspr-train task={args.task}{scale} optim={args.optim[0]} debug=plan"
    else:
        yield "next        caspr-bench --task c4_lm --scale paper"
        yield f"            caspr-bench --shapes {'transformer' if args.shapes == 'small' else 'small'}"
    if args.interval == 10:
        yield "            caspr-bench --interval 50"


def usage() -> str:
    lists: dict[str, Iterable[str]] = {"presets": PRESETS, "tasks": compose.choices("task"), "dtypes": DTYPES}
    others = [f"[{name}]" for name in NAMES if name not in DEFAULT]
    return HELP.format(
        version=__version__,
        names=[", ".join(DEFAULT), ", ".join(others)],
        tokens=TOKENS,
        plots=PLOTS,
        **{key: ", ".join(value) for key, value in lists.items()},
    )


@console_script
def main() -> int:
    """Console script. Returns the exit code."""
    argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv:
        print(usage(), end="")
        return OK
    if "--version" in argv:
        print(f"caspr-bench {__version__}")
        return OK
    try:
        run(parse(argv))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_USAGE
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return INTERRUPTED
    return OK


if __name__ == "__main__":
    sys.exit(main())
