"""Which of the sets seen on the way is kept, and when learning has gone on for long enough."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from etflayers.distill import DistilledSet


class Validation:
    """Looks at a set every so many outer steps, keeps the best one, and gives up when none has been better.

    The score is that of images which the set has not been learned from, so that the set is neither the one of
    the last step by chance nor chosen by the images it is tested on. With ``every=0`` nobody looks.

    Args:
        score: what a set is worth; the larger, the better.
        every: outer steps from one look to the next.
        patience: so many looks without a better one end the run; ``None``: it takes all its steps.

    Attributes:
        curve: the steps of the looks, and what was seen.
    """

    def __init__(self, score: Callable[[], float], every: int, patience: int | None) -> None:
        self.score, self.every, self.patience = score, every, patience
        self.curve: list[tuple[int, float]] = []
        self._best: dict[str, Tensor] = {}

    @property
    def best(self) -> tuple[int, float]:
        """The step of the best set, and its score; of equals the first."""
        return max(self.curve, key=lambda look: look[1])

    @property
    def gives_up(self) -> bool:
        """Whether the patience is at an end."""
        if self.patience is None or not self.curve:
            return False
        return len(self.curve) - 1 - self.curve.index(self.best) >= self.patience

    def look(self, step: int, last: int, distilled: DistilledSet) -> None:
        """Judge the set after this step, if it is time to or the step is the last."""
        if not self.every or (step % self.every and step != last):
            return
        self.curve.append((step, self.score()))
        if self.best[0] == step:
            self._best = {name: value.clone() for name, value in distilled.state_dict().items()}

    def restore_best(self, distilled: DistilledSet) -> None:
        """Give the set the values that it had when it was best."""
        if self._best:
            distilled.load_state_dict(self._best)

    def state_dict(self) -> dict[str, Any]:
        return {"curve": self.curve, "best": self._best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.curve, self._best = [(step, value) for step, value in state["curve"]], dict(state["best"])
