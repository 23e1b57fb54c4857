"""Online convex problems over a matrix W: least squares on streams of several spectra, logistic regression on real
data.

In round t a learner plays W_t ``[m, n]``, pays f_t(W_t) and receives G_t = grad f_t(W_t). All losses are functions of
the predictions Z = W X_t ``[m, b]`` for the b samples of a round, summed over these, so that G_t = (df/dZ) X_t^T is of
rank at most b. Everything is float64. Problems hold S seeds side by side, as other samples or another order of them.
"""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from caspr_cli.tasks.registry import MolPCBAConf, TaggingConf

SMOOTHING = 0.1  # of labels: then a best W exists even where a feature never comes with a label
CLASSES, ENDINGS = 8, 12  # of words: the commonest tags, and the commonest last letters
PROPERTIES = 8  # of molecules, those that were measured most often
VARIES = 0.2  # standard deviation that a feature of molecules has at least: what few of them have decides no weight
RARE, PERIOD = 60, 51  # of `forgetting`
NEWTON_STEPS, EXACT = 60, 1e-10  # of a loss: what the best W may be off by
NULL = 1e-13  # of the largest eigenvalue of a Hessian: what counts as 0


@dataclass(frozen=True)
class Loss:
    """A convex function of predictions Z and targets Y, both ``[..., m, b]``, summed over the last two axes."""

    name: str
    value: Callable[[Tensor, Tensor], Tensor]  # [...]
    slope: Callable[[Tensor, Tensor], Tensor]  # df/dZ [..., m, b]


@dataclass(frozen=True)
class Problem:
    """T rounds of one problem, for S seeds."""

    name: str
    about: str
    loss: Loss
    X: Tensor  # [S, T, n, b]
    Y: Tensor  # [S, T, m, b]
    best: Tensor  # [S, m, n]: the W with the least sum of f_t, and of those the one of least length

    @property
    def rank(self) -> int:
        """Return r: no gradient has a larger rank."""
        return int(min(self.X.shape[-1], *self.best.shape[-2:]))

    @property
    def rounds(self) -> int:
        return self.X.shape[1]

    def play(self, t: int, W: Tensor) -> tuple[Tensor, Tensor]:
        """Return f_t ``[S, E]`` and G_t ``[S, E, m, n]`` of E runs a seed, W ``[S, E, m, n]``."""
        X, Y = self.X[:, t].unsqueeze(1), self.Y[:, t].unsqueeze(1)
        Z = W @ X  # [S, E, m, b]
        return self.loss.value(Z, Y), self.loss.slope(Z, Y) @ X.mT


def _known(Y: Tensor, x: Tensor) -> Tensor:
    """Return x where a target was observed, and 0 where it is NaN."""
    return torch.where(torch.isnan(Y), 0, x)


SQUARES = Loss("least squares", lambda Z, Y: (Z - Y).square().sum((-2, -1)) / 2, lambda Z, Y: Z - Y)
SOFTMAX = Loss(
    "logistic regression over classes",
    value=lambda Z, Y: (torch.logsumexp(Z, -2) - (Y * Z).sum(-2)).sum(-1),
    slope=lambda Z, Y: torch.softmax(Z, -2) - Y,
)
SIGMOID = Loss(  # of m labels at once; a target that is NaN was not observed and costs nothing
    "logistic regression of several labels",
    value=lambda Z, Y: _known(Y, torch.nn.functional.softplus(Z) - Y * Z).sum((-2, -1)),
    slope=lambda Z, Y: _known(Y, torch.sigmoid(Z) - Y),
)
LINEAR = Loss("linear", lambda Z, Y: (Y * Z).sum((-2, -1)), lambda Z, Y: Y.expand_as(Z))


def best_in_hindsight(loss: Loss, X: Tensor, Y: Tensor) -> Tensor:
    """Return W* ``[m, n]``, argmin of sum_t f_t, by Newton's method from 0, which for least squares takes one step.

    Directions in which no loss changes (of a softmax, a number added to all rows) are left alone, so that W* is the
    minimiser of least length. Done where half the Newton decrement, which is what is left to gain where a loss is
    nearly a parabola, is below ``EXACT`` of the loss (Boyd and Vandenberghe, Convex Optimization, section 9.5). Raises
    ValueError if there is no minimiser, or it is out of reach. ``X``: ``[T, n, b]``; Y ``[T, m, b]``.
    """
    x, y = (part.movedim(1, 0).flatten(1) for part in (X, Y))  # [n, N], [m, N]
    W = x.new_zeros(len(y), len(x))

    def total(W: Tensor) -> float:
        return float(loss.value(W @ x, y))

    def gradient(W: Tensor) -> Tensor:
        return loss.slope(W @ x, y) @ x.mT

    for _ in range(NEWTON_STEPS):
        at, slope = total(W), gradient(W)
        values, Q = torch.linalg.eigh(torch.autograd.functional.jacobian(gradient, W).view(W.numel(), -1))
        inverse = torch.where(values > NULL * values[-1], values, torch.inf).reciprocal()
        step = (Q @ (inverse * (Q.mT @ slope.flatten()))).view_as(W)
        decrement = float((slope * step).sum())
        size = 1.0
        while total(W - size * step) > at - 0.25 * size * decrement and size > 1e-10:
            size /= 2
        W = W - size * step
        if decrement / 2 <= EXACT * max(at, 1e-3):
            best: Tensor = W
            return best
    raise ValueError(f"{loss.name}: no best W was found in {NEWTON_STEPS} Newton steps; is there one?")


def _problem(name: str, about: str, loss: Loss, X: Tensor, Y: Tensor) -> Problem:
    best = torch.stack([best_in_hindsight(loss, x, y) for x, y in zip(X, Y, strict=True)])
    return Problem(name, about, loss, X, Y, best)


def least_squares(
    name: str,
    about: str,
    samples: int,
    spectra: tuple[float, float],
    *,
    rounds: int,
    seeds: list[int],
    shape: tuple[int, int] = (6, 8),
) -> Problem:
    """Return the problem Y = W0 X + noise, W0 normal, m and n of W being ``shape``, b ``samples`` a round.

    ``spectra`` are the condition numbers of the covariance of inputs, in a random basis, and of that of the noise,
    which is about as large as the signal.
    """
    m, n = shape

    def draw(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        def coloured(d: int, condition: float) -> Tensor:  # a square root [d, d] of the covariance, of trace d
            values = torch.logspace(0, -math.log10(condition), d, dtype=torch.float64)
            root: Tensor = torch.linalg.qr(normal(d, d)).Q * (values * d / values.sum()).sqrt()
            return root

        X = coloured(n, spectra[0]) @ normal(rounds, n, samples)
        noise = coloured(m, spectra[1]) @ normal(rounds, m, samples)
        Y: Tensor = normal(m, n) @ X / math.sqrt(n) + noise
        return X, Y

    drawn = [draw(seed) for seed in seeds]
    return _problem(name, about, SQUARES, torch.stack([x for x, _ in drawn]), torch.stack([y for _, y in drawn]))


def _streams(X: Tensor, Y: Tensor, samples: int, rounds: int, seeds: list[int]) -> tuple[Tensor, Tensor]:
    """Return X ``[N, n]`` and Y ``[N, m]`` in a random order for each seed: ``[S, T, n, b]`` and ``[S, T, m, b]``."""
    orders = [torch.randperm(len(X), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    chosen = torch.stack([order[: rounds * samples] for order in orders])  # [S, T b]
    found_X, found_Y = (part[chosen].unflatten(1, (rounds, samples)).mT for part in (X, Y))
    return found_X, found_Y


def words(*, samples: int, rounds: int, seeds: list[int]) -> Problem:
    """Return the problem of predicting the tag of a word from its last letter, its length, a capital, and 1.

    From the training split of the tagger's sample, words of letters alone, W is ``[8, 16]``: seven tags and all others.
    """
    from caspr_cli.tasks.ud_pos.data import Corpus  # here: a task brings its own libraries

    pairs = [
        (word, tag)
        for sentence in Corpus(TaggingConf()).sentences["train"]
        for word, tag in zip(sentence.words, sentence.tags, strict=True)
        if word.isalpha()
    ]
    tags = [tag for tag, _ in Counter(tag for _, tag in pairs).most_common(CLASSES - 1)]
    endings = [letter for letter, _ in Counter(word[-1].lower() for word, _ in pairs).most_common(ENDINGS)]
    features = [
        [1.0, len(word) / 10, word[0].isupper(), word[-1].lower() not in endings]
        + [word[-1].lower() == letter for letter in endings]
        for word, _ in pairs
    ]
    X = torch.tensor(features, dtype=torch.float64)
    place = torch.tensor([tags.index(tag) if tag in tags else CLASSES - 1 for _, tag in pairs])
    Y = (1 - SMOOTHING) * torch.nn.functional.one_hot(place, CLASSES).double() + SMOOTHING / CLASSES
    about = f"tags of words from their endings, {CLASSES} classes, {X.shape[1]} features"
    return _problem("words", about, SOFTMAX, *_streams(X, Y, samples, rounds, seeds))


def molecules(*, samples: int, rounds: int, seeds: list[int]) -> Problem:
    """Return the problem of predicting whether properties of a molecule are above their medians.

    Features are the means of those of its atoms and bonds, its size, and 1. From the training split of the molecules'
    sample, W is ``[8, 10]``; most labels of a molecule are missing.
    """
    from caspr_cli.tasks.ogbg_molpcba.data import Library  # here: a task brings its own libraries
    from caspr_cli.tasks.ogbg_molpcba.measured import LABELS

    graphs = Library(MolPCBAConf()).dataset("train")
    medians = [i for i, (_, quantile) in enumerate(LABELS) if quantile == 0.5]
    some = np.random.default_rng(0).permutation(len(graphs))[: 20 * samples * rounds]
    labels = np.stack([graphs[i].labels[medians] for i in some])  # [N, 14]
    often = (labels >= 0).sum(0).argsort(kind="stable")[: -PROPERTIES - 1 : -1]
    labels, kept = labels[:, often], (labels[:, often] >= 0).any(1)
    X = torch.from_numpy(np.stack([_features(graphs[i]) for i in some[kept]]))
    X = X[:, X.std(0) > VARIES]
    X = torch.cat([torch.ones(len(X), 1, dtype=torch.float64), (X - X.mean(0)) / X.std(0)], 1)
    found = torch.from_numpy(labels[kept]).double()
    Y = torch.where(found >= 0, (1 - SMOOTHING) * found + SMOOTHING / 2, torch.nan)
    about = f"is a property above its median, {PROPERTIES} properties, {X.shape[1]} features of a molecule"
    return _problem("molecules", about, SIGMOID, *_streams(X, Y, samples, rounds, seeds))


def _features(graph: Any) -> Any:
    """Return the features ``[13]`` of one molecule; one without bonds has zeros for theirs."""
    bonds = graph.bonds.mean(0) if len(graph.bonds) else np.zeros(graph.bonds.shape[1])
    return np.concatenate([graph.nodes.mean(0), bonds, [math.log(len(graph.nodes))]])


def forgetting(rounds: int) -> Problem:
    """Return the problem of one number w in [-1, 1], f_t(w) = 60 w in every 51st round, else -w: the best is -1.

    A moving average has the 60 in the step that answers it, which is short for that, and has forgotten it before the
    next: most of the steps to the wrong side are long.
    Source: Reddi, Kale, Kumar, "On the convergence of Adam and beyond", ICLR 2018, section 3, with other numbers.
    """
    slopes = [float(RARE) if t % PERIOD == 0 else -1.0 for t in range(rounds)]
    Y = torch.tensor(slopes, dtype=torch.float64).view(1, rounds, 1, 1)
    best = torch.full((1, 1, 1), -1.0, dtype=torch.float64)
    about = f"one number, {RARE} w in every {PERIOD}st round, else -w"
    return Problem("forgetting", about, LINEAR, torch.ones_like(Y), Y, best)


def all_problems(*, rounds: int, seeds: list[int]) -> list[Problem]:
    """Return three least squares problems and two of real data, small enough for full-matrix Adagrad."""
    drawn: tuple[tuple[str, str, int, tuple[float, float]], ...] = (
        ("white", "inputs and noise without structure, one sample a round", 1, (1, 1)),
        ("inputs", "inputs of condition 1e3, one sample a round", 1, (1e3, 1)),
        ("both", "inputs of condition 1e3, noise of condition 1e3, four samples a round", 4, (1e3, 1e3)),
    )
    how: dict[str, Any] = {"rounds": rounds, "seeds": seeds}
    squares = [least_squares(f"squares, {name}", about, b, spectra, **how) for name, about, b, spectra in drawn]
    return [*squares, words(samples=1, **how), molecules(samples=4, **how)]
