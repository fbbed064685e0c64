"""What the study of label noise can be asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from torch import Tensor

from etflayers.checks import require
from etflayers.errors import InvalidArgumentError
from lab.options import Count, Distinct, Free, NotNegative, Positive, Rule, Seed, at_least
from lab.settings import DataSettings, at_most, require_fair_choices
from noise.methods import Knobs, MethodName, ModelName, own_knobs

Eta = Annotated[float, Rule(lambda value: 0 <= value <= 1, "lie in [0, 1]")]
Open = Annotated[float, Rule(lambda value: 0 < value < 1, "lie in (0, 1)")]
Factor = Annotated[float, Rule(lambda value: 0 < value <= 1, "lie in (0, 1]")]

# Options that say where knobs come from; a run is what it is by the knobs themselves.
KNOB_OPTIONS = ("lr", "gamma", "weight_decay", "alpha", "choices")
KNOB_OPTIONS += ("tune", "tune_seed", "tune_eta", "tune_epochs", "trials", "search", "epochs")


@dataclass(frozen=True, kw_only=True)
class NoiseSettings(DataSettings):
    """What decides the numbers; the same for every method but its own knobs."""

    default_out = "runs/label-noise"

    per_class: Count | None = None
    """Learn from, and choose by, this many training images of each class at most."""
    etas: Free[Distinct[Eta]] = (0.0, 0.1, 0.2, 0.3, 0.4)
    """Noise: the probability with which a label is drawn anew from all K classes. It may come out as it was:
    the share eta (K - 1)/K of the labels is wrong."""
    methods: Free[Distinct[MethodName]] = ("ce", "smoothing", "relaxation", "fixed", "nearest")
    """ce, smoothing, relaxation: a linear layer with cross-entropy, with label smoothing, with label
    relaxation; fixed, nearest, nearest-huber, code: a fixed simplex ETF, that nearest to the class means,
    the same in the Huber loss, and the best code with a formula, with features of length 1 and
    cross-entropy."""
    model: ModelName = "mlp"
    """mlp: linear layers with batch normalization and ReLU, as published; resnet: three stages of one
    block."""
    depth: Annotated[int, at_least(2)] = 9
    """Linear layers of the MLP, the classifier included."""
    width: Count = 128
    """Hidden units of the MLP (published: 2048); a ResNet has a quarter, a half and all of it as channels."""
    features: Count | None = None
    """Number of features d, none of them negative (default: as many as there are classes, as published)."""
    scale: Positive = 10.0
    """Scale of the logits of features of length 1."""
    epochs: Count = 60
    """Passes over the training set."""
    batch_size: Count = 64
    """Images in a step; the remainder of an epoch is dropped."""
    lr: Positive = 0.05
    """Learning rate of SGD with momentum 0.9 in the first fifth of the steps."""
    gamma: Factor = 0.1
    """Factor to the learning rate after each further fifth."""
    weight_decay: NotNegative = 1e-3
    """Decay of all parameters."""
    alpha: Open = 0.1
    """What smoothing and relaxation give away of a label."""
    tune: bool = False
    """Choose these four for each method by Ray Tune (pip install 'etflayers[sweeps]'), by the accuracy on
    noisy validation labels, and write the choices to choices.json."""
    trials: Count = 12
    """With `--tune`: points that are tried for each method."""
    search: Literal["random", "optuna"] = "random"
    """With `--tune`: random points, the same for all methods, or those that Optuna proposes (pip install
    optuna)."""
    tune_eta: Eta = 0.2
    """With `--tune`: noise of the trials; the choice is used at every eta."""
    tune_seed: Seed = 1000
    """With `--tune`: seed of the trials and of the search."""
    tune_epochs: Count | None = None
    """With `--tune`: passes over the training set of a trial (default: as many as of the others)."""
    jobs: Free[Count] = 1
    """With `--tune`: trials at a time."""
    choices: Path | None = None
    """A file choices.json of an earlier run, to be used again."""
    threads: Count = 1
    """CPU threads."""

    def check(self) -> None:
        super().check()
        require(self.batch_size >= 2, "--batch-size must be at least 2: batch normalization needs two images")
        if self.tune:
            require_fair_choices(self.tune_seed, self.seeds, self.choices)

    def kept_images(self, targets: Tensor, num_classes: int) -> Tensor | None:
        return at_most(self.per_class, targets, num_classes)

    @property
    def given(self) -> Knobs:
        """What is taken where nothing is chosen."""
        return Knobs(self.lr, self.gamma, self.weight_decay, self.alpha)

    def read_choices(self) -> dict[str, Knobs]:
        """What an earlier run has chosen, by method; nothing without ``--choices``.

        Raises:
            InvalidArgumentError: a file that holds no choices.
        """
        if self.choices is None:
            return {}
        try:
            rows: list[dict[str, Any]] = json.loads(self.choices.read_text())
            return {row["method"]: self._chosen(row) for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidArgumentError(
                f"--choices {self.choices} is no list of choices ({error!r}): take a file that --tune wrote"
            ) from error

    def _chosen(self, row: dict[str, Any]) -> Knobs:
        own = own_knobs(row["method"], self.given)
        return self.given._replace(
            **{name: float(row[name]) for name, value in own.items() if value is not None}
        )
