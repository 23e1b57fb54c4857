"""All runs of one method on one problem: at the step sizes of a grid, and as the theorem has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from caspr_cli.theory.learners import Method
from caspr_cli.theory.online import Ladder, Runs, ladder, of_theorem, play
from caspr_cli.theory.problems import Problem

Say = Callable[[str], None]

HALVINGS = range(9)  # step sizes of the grid: ||W*|| / 2^k, the same for all methods


@dataclass(frozen=True)
class Played:
    """One method on one problem."""

    problem: Problem
    method: Method
    grid: Runs  # [S, steps of the grid]
    ladder: Ladder  # of the theorem's run
    strayed: Tensor  # [S]: with the theorem's step and no ball, how far W came from W*, in units of D

    @property
    def theorem(self) -> Runs:
        """``[S, 1]``."""
        return self.ladder.runs

    @property
    def chosen(self) -> int:
        """The step of the grid with the least regret, on average over seeds."""
        return int(self.grid.at_end.mean(0).argmin())

    @property
    def regret(self) -> list[float]:
        """Of each seed, at the chosen step."""
        found: list[float] = self.grid.at_end[:, self.chosen].tolist()
        return found

    @property
    def at_edge(self) -> bool:
        return self.chosen in (HALVINGS[0], HALVINGS[-1])

    @property
    def share(self) -> list[float]:
        """Of each seed: the regret of the theorem's run, in units of its bound sqrt(2 r) D tr(X_T)."""
        found: list[float] = (self.theorem.regret[:, 0, -1] / limits(self.theorem)[:, -1]).tolist()
        return found


def limits(runs: Runs) -> Tensor:
    """sqrt(2 r) D tr(X_t) ``[S, T]`` for the theorem's step, D = eta sqrt(2 r): twice eta r tr(X_t)."""
    return (2 * runs.eta.unsqueeze(-1) * runs.rank * runs.sizes).squeeze(1)


def play_all(problem: Problem, method: Method, say: Say) -> Played:
    """A method at every step of the grid, and as the theorem has it.

    Args:
        say: is told what goes on.
    """
    say(f"{problem.name}: {method.label}")
    sizes = torch.linalg.matrix_norm(problem.best).unsqueeze(1)
    eta, ball = of_theorem(problem, method)
    steps = [sizes * 0.5**k for k in HALVINGS]
    runs = play(problem, method, torch.cat([*steps, eta], 1))  # the last is the theorem's, without its ball
    return Played(
        problem,
        method,
        runs.take(slice(0, -1)),
        ladder(problem, method, eta, ball),
        runs.distance[:, -1] / (2 * ball[:, 0]),
    )


def rate(runs: Runs, rounds: int) -> float:
    """Regret a round, of the first of the runs."""
    return float(runs.regret[0, 0, rounds - 1]) / rounds
