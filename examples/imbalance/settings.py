"""What the study of long-tailed training can be asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from etflayers.checks import require
from etflayers.errors import InvalidArgumentError
from imbalance.data import End, Kind
from imbalance.methods import KNOBS, Knobs, MethodName
from lab.options import Count, Distinct, Free, MoreThanOne, NotNegative, Positive, Seed
from lab.settings import DataName, DataSettings, require_fair_choices

GLYPH_VIEWS = 25


@dataclass(frozen=True, kw_only=True)
class LongTailSettings(DataSettings):
    """What decides the numbers; the same for every method but its own knobs."""

    default_out = "runs/long-tail"

    data: DataName = "fashion"
    """Which images: fashion and glyphs (with --classes 62, letters and digits) are the data of this study;
    for the others see examples/train_heads.py."""
    kinds: Free[Distinct[Kind]] = ("exponential", "step")
    """Tails. exponential: each class rarer than the last by one factor; step: half of them are rare."""
    ratios: Free[Distinct[MoreThanOne]] = (10.0, 50.0, 100.0)
    """Imbalance ratios: size of the largest class over that of the smallest."""
    rare: End = "last"
    """Which classes are rare: the last ones, as usual, or the first. The rare ones may be the easy ones."""
    views: Count | None = None
    """How many fixed distorted views of each training image there are before classes are made rare (default:
    25 for glyphs, of which there are eight of a class, else 1: the image itself)."""
    methods: Free[Distinct[MethodName]] = tuple(KNOBS)
    """ce: a linear layer and cross-entropy; reweighted: that with class weights by inverse frequency;
    linear-la: that with logit adjustment; cosine-la: learned rows of length 1, features of length 1 and
    logit adjustment; etf-dr: a fixed ETF and dot regression; etf-dr-lengths: with lengths from the counts;
    etf-la: a fixed ETF, features of length 1 and logit adjustment; nearest-la: the same with the ETF nearest
    to the class means, weighted by inverse frequency; etf-ntce, etf-nonl: a fixed ETF with these losses."""
    scale: Positive = 10.0
    """Scale of the logits of features of length 1, and of NTCE and NONL the inverse temperature."""
    weight_decay: NotNegative = 0.05
    """Decay of all parameters."""
    tau: NotNegative = 1.0
    """How much of the logarithm of the prior logit adjustment adds."""
    tune: bool = False
    """Choose these three for each method and each tail on the validation set, by one training for each
    point of the grid, and write the choices to choices.json. Where a method has one point it is taken."""
    tune_seed: Seed = 1000
    """Seed of the trainings that choose."""
    tune_epochs: Count | None = None
    """Passes over the training set of the trainings that choose (default: as many as of the others)."""
    scales: Distinct[Positive] = (5.0, 10.0, 20.0)
    """With `--tune`: scales of the grid."""
    weight_decays: Distinct[NotNegative] = (0.005, 0.05)
    """With `--tune`: weight decays of the grid."""
    taus: Distinct[NotNegative] = (1.0, 1.5)
    """With `--tune`: values of tau of the grid."""
    choices: Path | None = None
    """A file choices.json of an earlier run, to be used again."""
    features: Count = 64
    """Number of features d; a simplex ETF of K classes needs K - 1."""
    width: Positive = 1.0
    """Factor to the channels of the network, 16, 32 and 64."""
    epochs: Count = 15
    """Passes over the training set."""
    batch_size: Count = 128
    """Images in a step; the remainder of an epoch is dropped."""
    lr: Positive = 2e-3
    """Peak learning rate of AdamW, after a linear warm-up and before a cosine."""
    threads: Count = 1
    """CPU threads."""

    def check(self) -> None:
        super().check()
        require(self.batch_size >= 2, "--batch-size must be at least 2: batch normalization needs two images")
        if self.tune:
            require_fair_choices(self.tune_seed, self.seeds, self.choices)

    @property
    def number_of_views(self) -> int:
        return (GLYPH_VIEWS if self.data == "glyphs" else 1) if self.views is None else self.views

    @property
    def given(self) -> Knobs:
        """What is taken where nothing is chosen."""
        return Knobs(self.scale, self.weight_decay, self.tau)

    def grid(self, method: MethodName) -> list[Knobs]:
        """All points for a method: what it does not have stays as given."""
        values = {"scale": self.scales, "weight_decay": self.weight_decays, "tau": self.taus}
        own = KNOBS[method]
        axes = [values[name] if name in own else (getattr(self.given, name),) for name in Knobs._fields]
        return [Knobs(*point) for point in product(*axes)]

    def read_choices(self) -> dict[tuple[str, float, str], Knobs]:
        """What an earlier run has chosen, by kind, ratio and method; nothing without ``--choices``.

        Raises:
            InvalidArgumentError: a file that holds no choices.
        """
        if self.choices is None:
            return {}
        try:
            rows: list[dict[str, Any]] = json.loads(self.choices.read_text())
            return {
                (row["kind"], float(row["ratio"]), row["method"]): self.given._replace(
                    **{name: float(row[name]) for name in KNOBS[row["method"]]}
                )
                for row in rows
            }
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidArgumentError(
                f"--choices {self.choices} is no list of choices ({error!r}): take a file that --tune wrote"
            ) from error
