"""A network for more classes than features, with one of several heads; it can be killed and continued."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflayers import (
    ClassMeanHead,
    FixedCodeHead,
    NearestCodeHead,
    UnitRowHead,
)
from etflayers.checks import require
from etflayers.codes import find_code
from etflayers.functional import directions
from etflayers.metrics import (
    class_statistics,
    covariance_trace_ratio,
    duality_cosine,
    largest_cosine,
    read_classifier,
)
from lab.data import ImageData, Split
from lab.data.sampling import affine_maps, transformed
from lab.files import Row
from lab.heads import LinearHead
from lab.models import ResNet
from lab.options import Count, Distinct, Free, Natural, NotNegative, Positive
from lab.schedules import rate_factor
from lab.settings import DataName, DataSettings
from lab.training import GlobalStreams, LossRun, descend, steps_of_an_epoch

Method = Literal["linear", "cosine", "class-means", "code", "code-arranged", "roots"]

WIDTHS, BLOCKS, STEM_STRIDE = (16, 32, 128), (1, 1, 1), 2
EVALUATION_BATCH = 512


@dataclass(frozen=True, kw_only=True)
class ManyClassesSettings(DataSettings):
    """What decides the numbers; the same for every head but its own scale."""

    default_out = "runs/many-classes"

    data: DataName = "glyphs"
    """Which images: glyphs are the data of this study; for the others see examples/train_heads.py."""
    methods: Free[Distinct[Method]] = ("linear", "cosine", "class-means", "code", "code-arranged", "roots")
    """Heads. linear: nn.Linear; cosine: learned rows of length 1; class-means: the directions of the running
    class means; code: a fixed spherical code, its words dealt out as they come; code-arranged: class means
    for the first epochs, then the nearest arrangement of the same code; roots: the code e_i - e_j, where
    there are enough of them."""
    features: Free[Distinct[Count]] = (16, 64, 256)
    """Numbers of features d: one training for each."""
    scale: Positive = 24.0
    """Scale of the logits of all heads but the linear one; features have length 1 there."""
    epochs: Count = 12
    """Passes over the training set."""
    batch_size: Count = 128
    """Images in a step; the remainder of an epoch is dropped."""
    lr: Positive = 5e-3
    """Peak learning rate of AdamW, after a linear warm-up and before a cosine."""
    weight_decay: NotNegative = 5e-4
    """Decay of all parameters."""
    affine: NotNegative = 0.05
    """Turn, stretch, shear and move each training image by up to about this."""
    settle: Natural = 4
    """After which epoch the arranged code is arranged."""
    threads: Count = 1
    """CPU threads."""

    def check(self) -> None:
        super().check()
        require(self.batch_size >= 2, "--batch-size must be at least 2: batch normalization needs two images")


class Key(NamedTuple):
    """Which training."""

    method: Method
    features: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.features}-seed{self.seed}"


def exists(method: Method, features: int, num_classes: int) -> bool:
    """Whether there is such a head: the roots have d (d - 1) words."""
    return method != "roots" or num_classes <= features * (features - 1)


def make_head(key: Key, num_classes: int, settings: ManyClassesSettings) -> nn.Module:
    """The head; what is random in it comes from the global generator."""
    sizes, options = (key.features, num_classes), {"scale": settings.scale, "normalize": True}
    if key.method == "linear":
        return LinearHead(*sizes)
    if key.method == "cosine":
        return UnitRowHead(*sizes, **options)
    if key.method == "class-means":
        return ClassMeanHead(*sizes, **options)
    # An optimized code takes a minute or two: it is the same for all seeds, and kept in a file.
    cache = settings.folder / f"code-{num_classes}-{key.features}.safetensors"
    cache.parent.mkdir(parents=True, exist_ok=True)
    stream = torch.Generator().manual_seed(0)
    kind = "roots" if key.method == "roots" else "auto"
    code = find_code(num_classes, key.features, kind=kind, generator=stream, cache=cache)
    head = NearestCodeHead if key.method == "code-arranged" else FixedCodeHead
    return head(*sizes, code=code, **options)


class Network(nn.Module):
    """A small ResNet, a linear map to d features, a head."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.body = ResNet(1, 2, WIDTHS, BLOCKS, STEM_STRIDE)
        self.body.classifier = nn.Linear(WIDTHS[-1], head.in_features, bias=False)
        self.head = head

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        features = self.body(images)
        return self.head(features) if targets is None else self.head(features, targets)


class CodeRun(LossRun):
    """One training: batches come from (seed, epoch), so that a continued run draws the same ones."""

    def __init__(self, key: Key, settings: ManyClassesSettings, data: ImageData) -> None:
        self.key, self.settings, self.data, self.device = key, settings, data, settings.torch_device
        torch.manual_seed(key.seed)
        head = make_head(key, data.num_classes, settings)
        torch.manual_seed(key.seed)  # the body does not depend on what the head has drawn
        self.model = Network(head).to(self.device)
        self.takes_targets = getattr(head, "accepts_targets", False)
        decay = settings.weight_decay
        self.optimizer = torch.optim.AdamW(self.model.parameters(), settings.lr, weight_decay=decay)
        self.steps_per_epoch = steps_of_an_epoch(len(data.train), settings.batch_size)
        self.hits = 0.0
        parts = {"model": self.model, "optimizer": self.optimizer, "random": GlobalStreams(self.device)}
        own = {**data.fingerprint, "method": key.method, "features": key.features, "seed": key.seed}
        super().__init__(parts, settings.fingerprint() | own, settings.epochs * self.steps_per_epoch)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the current epoch that are still to come."""
        train = self.data.train
        order, generator = self.shuffled(self.key.seed, len(train))
        maps = affine_maps(len(train), self.settings.affine, generator)
        for part in self.batch_slices(self.settings.batch_size):
            chosen = order[part].to(self.device)
            images = transformed(train.images[chosen], maps[order[part]].to(self.device))
            yield self.data.normalized(images), train.targets[chosen]

    def advance(self) -> Row | None:
        with self.clock():
            images, targets = self.next_batch()
            logits = self.model(images, targets if self.takes_targets else None)
            loss = F.cross_entropy(logits, targets)
            descend(self.optimizer, loss, self.settings.lr * rate_factor(self.step, self.total))
            self.losses += float(loss.detach())
            self.hits += float((logits.detach().argmax(-1) == targets).float().mean())
        epoch = self.finished_epoch()
        if epoch is None:
            return None
        return self._row(epoch)

    def _row(self, epoch: int) -> Row:
        """What an epoch has come to; the test set only at the end."""
        row: Row = {**self.key._asdict(), "epoch": epoch}
        row["train_loss"] = self.mean_loss(self.key.name)
        row["train_accuracy"], self.hits = self.hits / self.steps_per_epoch, 0.0
        validation = self.data.held_out()[1]
        row["validation_accuracy"] = self.accuracy(validation)
        if self.key.method == "code-arranged" and epoch == self.settings.settle:
            row["cosine_of_refit"] = self.model.head.refit()
        row["ms_per_step"] = 1e3 * self.seconds / self.steps_per_epoch
        self.seconds = 0.0
        if epoch == self.settings.epochs:
            row |= {"test_accuracy": self.accuracy(self.data.test), **self.collapse(), **self.sizes()}
        return row

    @torch.no_grad()
    def accuracy(self, split: Split) -> float:
        """Of images that are not changed."""
        self.model.eval()
        hits = sum(
            int((self.model(self.data.normalized(images)).argmax(-1) == targets).sum())
            for images, targets in zip(
                split.images.split(EVALUATION_BATCH), split.targets.split(EVALUATION_BATCH), strict=True
            )
        )
        self.model.train()
        return hits / len(split)

    @torch.no_grad()
    def collapse(self) -> Row:
        """Generalized neural collapse of the training set: see docs/understand/metrics.md."""
        self.model.eval()
        train = self.data.train
        parts = train.images.split(EVALUATION_BATCH)
        features = directions(torch.cat([self.model.body(self.data.normalized(part)) for part in parts]))
        self.model.train()
        statistics = class_statistics(features, train.targets, self.data.num_classes)
        weight = read_classifier(self.model.head).weight
        # Of more features than the body has the others are combinations: the ratio would be one of rounding.
        spanned = self.key.features <= WIDTHS[-1]
        return {
            **({"gnc1_trace": float(covariance_trace_ratio(statistics))} if spanned else {}),
            "gnc2_largest_cosine_means": float(largest_cosine(statistics.means)),
            "gnc2_largest_cosine_weights": float(largest_cosine(weight)),
            "gnc3_cosine": float(duality_cosine(weight, statistics.means)),
        }

    def sizes(self) -> Row:
        """Megabytes of the head: parameters, their gradients, both moments of AdamW, and buffers."""
        head: nn.Module = self.model.head
        learned = 4 * sum(parameter.nbytes for parameter in head.parameters())
        return {"head_megabytes": (learned + sum(buffer.nbytes for buffer in head.buffers())) / 2**20}

    def state(self) -> dict[str, Any]:
        return super().state() | {"hits": self.hits}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.hits = state["hits"]
