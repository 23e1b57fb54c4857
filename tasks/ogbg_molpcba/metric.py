"""What predictions of a molecule's labels are measured by."""

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_average_precision

from caspr_cli.tasks.metrics import Means
from caspr_cli.tasks.ogbg_molpcba.graphs import MISSING
from caspr_cli.tasks.ogbg_molpcba.model import cross_entropy


class MeanAveragePrecision(Means):
    """Cross entropy and average precision over all graphs.

    ``compute()`` gives ``loss`` (nats an observed cell) and ``map``: average precision (the sum of precision times
    gain in recall, as scikit-learn and OGB have it) of each label's observed cells, averaged over the labels that
    have both classes. It is NaN if no label has; a data set with such a split is refused when it is prepared.
    """

    means = (("loss", "nats", "cells"),)
    logits: list[Tensor] | Tensor
    labels: list[Tensor] | Tensor

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self._tasks = tasks
        for state in ("logits", "labels"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add ``logits`` ``[B, T]`` and ``labels`` ``[B, T]``, 0, 1 or MISSING."""
        nats, cells = cross_entropy(logits, labels)
        self.add(nats=nats.double(), cells=cells)
        self.logits.append(logits.detach().float())  # type: ignore[union-attr]
        self.labels.append(labels)  # type: ignore[union-attr]

    def compute(self) -> dict[str, Tensor]:
        loss = super().compute()["loss"]
        logits, labels = self._whole(self.logits), self._whole(self.labels)
        scores = [average_precision(logits[:, t], labels[:, t]) for t in range(self._tasks)]
        found = [score for score in scores if score is not None]
        return {"loss": loss, "map": torch.stack(found).mean() if found else torch.full_like(loss, torch.nan)}

    def _whole(self, parts: list[Tensor] | Tensor) -> Tensor:
        """Return the batches as one tensor, which torchmetrics has made of them already where there are ranks."""
        if isinstance(parts, Tensor):
            return parts
        return torch.cat(parts) if parts else torch.empty(0, self._tasks)


def average_precision(logits: Tensor, labels: Tensor) -> Tensor | None:
    """Return the average precision of one label's ``logits`` ``[n]``; None unless both classes were observed."""
    observed = labels != MISSING
    logits, truth = logits[observed], labels[observed].long()
    positive = truth.sum()
    if positive == 0 or positive == len(truth):
        return None
    # By rank, in [0, 1]: torchmetrics puts what is outside through a sigmoid, where large logits become equal.
    ranks = logits.unique(return_inverse=True)[1].double()
    return binary_average_precision(ranks / ranks.max().clamp(min=1), truth)
