"""The base session: a network learns its first classes, with one of several heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflayers import DotRegressionLoss, FixedETFHead, UnitRowHead
from etflayers.errors import NonFiniteError
from lab.data import Split
from lab.files import Row
from lab.heads import LinearHead
from lab.models import ResNet
from lab.schedules import rate_factor
from lab.training import EpochRun, descend, steps_of_an_epoch
from sessions.protocol import Episode, IncrementalSettings, distorted

BaseName = Literal["linear", "cosine", "projector-linear", "etf", "etf-few", "etf-ce", "joint"]
WIDTHS, BLOCKS, STEM_STRIDE = (16, 32, 128), (1, 1, 1), 2
EVALUATION_BATCH = 512
SLOPE = 0.1  # of the leaky ReLU


class Projector(nn.Module):
    """A perceptron with a linear map around it, which later sessions go on training.

    Reference:
        Yang, Yuan, Li, Lin, Torr, Tao (2023), arXiv 2302.03004.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        wide = 2 * in_features
        self.layers = nn.Sequential(
            nn.Linear(in_features, wide),
            nn.LayerNorm(wide),
            nn.LeakyReLU(SLOPE),
            nn.Linear(wide, wide),
            nn.LayerNorm(wide),
            nn.LeakyReLU(SLOPE),
            nn.Linear(wide, out_features, bias=False),
        )
        self.skip = nn.Linear(in_features, out_features, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features) + self.skip(features)


def make_neck(name: BaseName, in_features: int, out_features: int) -> nn.Module:
    """What later sessions train with the head."""
    if name in ("linear", "cosine"):
        return nn.Identity()
    if name == "etf-ce":
        return nn.Linear(in_features, out_features, bias=False)
    return Projector(in_features, out_features)


class Network(nn.Module):
    """A small ResNet, what is between it and the head, and the head.

    What is random in the head is drawn last, so that all networks of a seed have the same body.
    """

    def __init__(self, name: BaseName, settings: IncrementalSettings, channels: int) -> None:
        super().__init__()
        self.body = ResNet(channels, 1, WIDTHS, BLOCKS, STEM_STRIDE)
        self.body.classifier = nn.Identity()
        self.neck = make_neck(name, WIDTHS[-1], settings.features)
        plain = isinstance(self.neck, nn.Identity)
        self.head = make_head(name, WIDTHS[-1] if plain else settings.features, settings)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.neck(self.body(images)))


def make_head(name: BaseName, in_features: int, settings: IncrementalSettings) -> nn.Module:
    """A head for all classes; the later ones are not here yet."""
    sizes = (in_features, settings.classes)
    if name in ("linear", "projector-linear", "joint"):
        return LinearHead(*sizes)
    later = range(settings.base_classes, settings.classes)
    if name == "cosine":
        return UnitRowHead(*sizes, scale=settings.scale, normalize=True).deactivate(later)
    if name == "etf-few":  # nothing is reserved
        return FixedETFHead(in_features, settings.base_classes, rotation="haar", normalize=True)
    scale = settings.scale if name == "etf-ce" else 1.0
    return FixedETFHead(*sizes, rotation="haar", scale=scale, normalize=True).deactivate(later)


def objective(name: BaseName, logits: Tensor, targets: Tensor, seen: int) -> Tensor:
    """Dot regression, or the cross-entropy among the classes seen so far."""
    if name in ("etf", "etf-few"):
        return DotRegressionLoss()(logits, targets)
    return F.cross_entropy(logits[:, :seen], targets)


class BaseKey(NamedTuple):
    """Which training."""

    base: BaseName
    seed: int
    lr: float

    @property
    def name(self) -> str:
        return f"{self.base}-lr-{self.lr:g}-seed{self.seed}"


class BaseRun(EpochRun):
    """One training: batches come from (seed, epoch), so that a continued run draws the same ones."""

    def __init__(self, key: BaseKey, settings: IncrementalSettings, episode: Episode) -> None:
        self.key, self.settings, self.data = key, settings, episode.data
        self.device = settings.torch_device
        torch.manual_seed(key.seed)
        model = Network(key.base, settings, self.data.shape[0])
        self.model = model.to(self.device, memory_format=torch.channels_last)
        # The upper bound has all training images, of later classes too, of which others get a few.
        self.seen = settings.classes if key.base == "joint" else settings.base_classes
        self.train, self.validation = (
            part.where(part.targets < self.seen) for part in (episode.train, episode.validation)
        )
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), key.lr, weight_decay=settings.weight_decay
        )
        self.steps_per_epoch = steps_of_an_epoch(len(self.train), settings.batch_size)
        own = {**self.data.fingerprint, **key._asdict()}
        parts = {"model": self.model, "optimizer": self.optimizer}
        total = settings.epochs * self.steps_per_epoch
        super().__init__(parts, settings.base_fingerprint() | own, total)

    def batches(self) -> Iterator[Split]:
        """The batches of the current epoch that are still to come."""
        order, generator = self.shuffled(self.key.seed, len(self.train))
        shuffled = self.train.where(order.to(self.device))
        inputs = distorted(shuffled.images, self.settings, self.data, generator)
        for part in self.batch_slices(self.settings.batch_size):
            yield Split(inputs[part], shuffled.targets[part])

    def advance(self) -> Row | None:
        with self.clock():
            batch = self.next_batch()
            loss = objective(self.key.base, self.model(batch.images), batch.targets, self.seen)
            descend(self.optimizer, loss, self.key.lr * rate_factor(self.step, self.total))
        epoch = self.finished_epoch()
        if epoch is None:
            return None
        if not torch.isfinite(loss):
            raise NonFiniteError(f"training of {self.key.name} diverged: take a smaller --lr")
        return {**self.key._asdict(), "epoch": epoch, "loss": float(loss.detach())}

    @torch.no_grad()
    def validation_accuracy(self) -> float:
        """Of the classes of the base session, by which a learning rate is chosen."""
        self.model.eval()
        held = self.validation
        answers = [
            self.model(part)[:, : self.seen].argmax(-1) for part in held.images.split(EVALUATION_BATCH)
        ]
        return float((torch.cat(answers) == held.targets).double().mean())
