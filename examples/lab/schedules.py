"""The learning rate as a function of the step alone, so that there is nothing to save."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "step", "constant"]

WARM_UP = 0.1  # share of the steps


def rate_factor(step: int, total: int, schedule: Schedule = "cosine") -> float:
    """What the peak rate is multiplied by in a step, counted from 0: a linear warm-up, then the schedule."""
    progress = (step + 1) / total
    if progress <= WARM_UP:
        return progress / WARM_UP
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))
    return float(0.1 ** ((progress > 0.5) + (progress > 0.75))) if schedule == "step" else 1.0
