"""The networks: encoder, perhaps a projector, head; trained here or by the study of collapse."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflayers import FixedCodeHead, FixedETFHead, NearestETFHead, capture_features
from etflayers.checks import require
from etflayers.functional.logits import directions
from etflayers.metrics import classifier_inputs
from etflayers.nn import EntropyRegularizer, ETFProjector
from lab import files
from lab.data import ImageData
from lab.data.sampling import affine_maps, transformed
from lab.files import Row
from lab.heads import LinearHead, head_of
from lab.models import RESNETS, ResNet, make_classifier
from lab.schedules import rate_factor
from lab.settings import Settings
from lab.training import GlobalStreams, LossRun, descend, steps_of_an_epoch
from unknowns.settings import ENTROPIC, PROJECTED, Head, UnknownSettings, Variant

EVALUATION_BATCH = 500
ENCODER, PROJECTOR = "encoder", "projector"


class Answers(NamedTuple):
    """What a network says of images: features ``(N, d)`` by the space that they are in, logits ``(N, K)``."""

    features: dict[str, Tensor]
    logits: Tensor


class Subject(ABC):
    """A trained network that is asked.

    Attributes:
        head: the head.
        space: the name of what the head reads.
        data: that were learned; they normalize images.
        labels: what tells it from others, as columns of a table.
        fingerprint: what decides its numbers.
    """

    head: nn.Module
    space: str = ENCODER
    data: ImageData
    labels: Row
    fingerprint: dict[str, Any]

    @abstractmethod
    def spaces(self, inputs: Tensor) -> dict[str, Tensor]:
        """Features of normalized images, each as the head reads them, or as directions where no head does."""

    @torch.no_grad()
    def answers(self, images: Tensor) -> Answers:
        """Of bytes, in eval mode."""
        parts = [self.spaces(self.data.normalized(part)) for part in images.split(EVALUATION_BATCH)]
        features = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return Answers(features, self.head.eval()(features[self.space]))


class Network(nn.Module):
    """A small ResNet, a linear map to d features, a projector or nothing, a head."""

    def __init__(self, head: nn.Module, projected: bool, channels: int, width: float) -> None:
        super().__init__()
        widths, blocks, stem_stride = RESNETS["small"]
        widths = tuple(max(1, round(width * number)) for number in widths)
        self.encoder = ResNet(channels, 2, widths, blocks, stem_stride)
        self.encoder.classifier = nn.Linear(widths[-1], head.in_features, bias=False)
        self.projector = ETFProjector(head.in_features) if projected else nn.Identity()
        self.head = head


def make_head(name: Head, features: int, classes: int, scale: float) -> nn.Module:
    """The head; what is random in it comes from the global generator."""
    sizes, unit = (features, classes), {"scale": scale, "normalize": True}
    if name == "linear":
        return LinearHead(*sizes)
    if name == "code":
        return FixedCodeHead(*sizes, code="orthoplex", **unit)
    return (
        FixedETFHead(*sizes, rotation="haar", **unit) if name == "fixed" else NearestETFHead(*sizes, **unit)
    )


class UnknownRun(LossRun, Subject):
    """One training, then a subject: all of a seed have the same encoder at the start and the same batches."""

    def __init__(
        self, head: Head, variant: Variant, seed: int, settings: UnknownSettings, data: ImageData
    ) -> None:
        self.settings, self.data, self.seed, self.device = settings, data, seed, settings.torch_device
        self.labels = {"data": data.name, "head": head, "variant": variant, "seed": seed}
        self.name = f"{head}-{variant}-seed{seed}"
        require(
            settings.features >= data.num_classes - 1,
            f"--features {settings.features} is too small for {data.num_classes} classes: a simplex ETF "
            f"needs at least {data.num_classes - 1}",
        )
        projected = variant in PROJECTED
        self.space = PROJECTOR if projected else ENCODER
        torch.manual_seed(seed)
        self.head = make_head(head, settings.features, data.num_classes, settings.scale)
        torch.manual_seed(seed)  # the encoder does not depend on what the head has drawn
        self.model = Network(self.head, projected, data.shape[0], settings.width).to(self.device)
        self.entropy = EntropyRegularizer() if variant in ENTROPIC else None
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), settings.lr, weight_decay=settings.weight_decay
        )
        self.steps_per_epoch = steps_of_an_epoch(len(data.train), settings.batch_size)
        parts = {"model": self.model, "optimizer": self.optimizer, "random": GlobalStreams(self.device)}
        own = {**data.fingerprint, **self.labels, "affine": settings.affine_size}
        total = settings.epochs * self.steps_per_epoch
        super().__init__(parts, settings.fingerprint() | own, total)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the current epoch that are still to come."""
        train, affine = self.data.train, self.settings.affine_size
        order, generator = self.shuffled(self.seed, len(train))
        maps = affine_maps(len(train), affine, generator)
        for part in self.batch_slices(self.settings.batch_size):
            chosen = order[part]
            images = train.images[chosen.to(self.device)]
            if affine:
                images = transformed(images, maps[chosen].to(self.device))
            yield self.data.normalized(images), train.targets[chosen.to(self.device)]

    def advance(self) -> Row | None:
        with self.clock():
            images, targets = self.next_batch()
            features = self.model.encoder(images)
            read = self.model.projector(features)
            wants = getattr(self.head, "accepts_targets", False)
            loss = F.cross_entropy(self.head(read, targets) if wants else self.head(read), targets)
            if self.entropy is not None:
                loss = loss + self.settings.penalty * self.entropy(features)
            descend(self.optimizer, loss, self.settings.lr * rate_factor(self.step, self.total))
            self.losses += float(loss.detach())
        epoch = self.finished_epoch()
        if epoch is None:
            return None
        return {**self.labels, "epoch": epoch, "loss": self.mean_loss(self.name)}

    def spaces(self, inputs: Tensor) -> dict[str, Tensor]:
        features = self.model.eval().encoder(inputs)
        if self.space == ENCODER:
            return {ENCODER: classifier_inputs(self.head, features)}
        read = classifier_inputs(self.head, self.model.projector(features))
        return {ENCODER: directions(features), PROJECTOR: read}


class Collapsed(Subject):
    """A network that examples/collapse_study.py has trained."""

    def __init__(self, path: Path, settings: Settings, data: ImageData) -> None:
        head, _, seed = path.stem.rpartition("-seed")
        state = files.load(path, {"content of the images": data.fingerprint["content of the images"]})
        self.labels = {"data": data.name, "head": head, "variant": "trained", "seed": int(seed)}
        self.name = f"{head}-trained-seed{seed}"
        self.data = data
        self.model = make_classifier(head, settings, data, int(seed))
        self.model.load_state_dict(state["model"])
        self.model.to(data.device).eval()
        self.head = head_of(self.model)
        self.fingerprint = {**state["fingerprint"], "step": state["step"]}
        epochs = self.fingerprint["epochs"]
        self.finished = int(state["history"][-1]["epoch"]) == epochs

    def spaces(self, inputs: Tensor) -> dict[str, Tensor]:
        with capture_features(self.model, self.head) as captured:
            self.model(inputs)
        return {ENCODER: classifier_inputs(self.head, captured[0])}


def settings_of(settings: UnknownSettings) -> Settings:
    """What the study of collapse in the folder ``trained`` was asked for; places and device are ours."""
    assert settings.trained is not None
    plain = json.loads((settings.trained / "run.json").read_text())["settings"]
    known = {field.name for field in fields(Settings)}
    given = {name: value for name, value in plain.items() if name in known}
    return Settings(**given | {"data_dir": settings.data_dir, "device": settings.device})
