"""Detectors of pytorch-ood: a stand-in with its interface, and the package itself where it is installed."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflayers import FixedETFHead, NearestETFHead
from etflayers.errors import InvalidArgumentError, MissingDependencyError, NotFittedError
from etflayers.ood import PytorchOOD, ood_metrics

K, D = 4, 9
TARGETS = torch.arange(K).repeat(15)


class Residual:
    """Of features, with the arguments of ViM; an outlier is far from the logits of its nearest sample."""

    requires_fit = True

    def __init__(self, encoder: Any, d: int, w: Tensor, b: Tensor) -> None:
        self.encoder, self.d, self.w, self.b = encoder, d, w, b

    def fit_features(self, features: Tensor, labels: Tensor) -> Residual:
        self.logits, self.labels = F.linear(features, self.w, self.b), labels
        return self

    def predict_features(self, x: Tensor) -> Tensor:
        return torch.cdist(F.linear(x, self.w, self.b), self.logits).amin(1)


class Energy:
    """Of logits, without a fit."""

    requires_fit = False

    def __init__(self, model: Any, t: float = 1.0) -> None:
        self.model, self.t = model, t

    def predict_logits(self, logits: Tensor) -> Tensor:
        return -self.t * torch.logsumexp(logits / self.t, -1)


class Temperature(Energy):
    """Of logits, with a fit."""

    requires_fit = True

    def fit_logits(self, logits: Tensor, labels: Tensor) -> Temperature:
        self.t = float(logits.gather(1, labels[:, None]).mean())
        return self


class OfLinear(Residual):
    """Of features, given a linear layer."""

    def __init__(self, encoder: Any, head: nn.Linear) -> None:
        super().__init__(encoder, 0, head.weight, head.bias)


class OfImages:
    def predict(self, x: Tensor) -> Tensor:
        return x


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package as far as the adapter knows it."""
    modules = {name: ModuleType(name) for name in ("pytorch_ood", "pytorch_ood.detector", "pytorch_ood.api")}
    for made in (Residual, Energy, Temperature, OfLinear, OfImages):
        setattr(modules["pytorch_ood.detector"], made.__name__, made)
    modules["pytorch_ood.api"].LogitsDetector = object  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def head_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "fixed":
        return FixedETFHead(D, K, rotation="haar", scale=3.0)
    head = NearestETFHead(D, K, scale=2.0, normalize=kind == "normalized")
    head(features_of("known"), TARGETS)
    return head.eval().to_linear() if kind == "linear" else head.eval()


def features_of(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    means = 4 * torch.randn(K, D, generator=generator)
    noise = torch.randn(3, len(TARGETS), D, generator=generator)
    return {"known": means[TARGETS] + noise[0], "test": means[TARGETS] + noise[1], "other": 2 * noise[2]}[
        kind
    ]


HEADS = ["linear", "fixed", "nearest", "normalized"]


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("kind", HEADS)
def test_a_detector_sees_the_linear_layer_that_a_head_is(kind: str) -> None:
    """Its logits, from weight and bias and what it is given, are those of the head."""
    head, known, test = head_of(kind), features_of("known"), features_of("test")
    with torch.no_grad():
        logits, stored = head(test), head(known)
    distances = torch.cdist(logits, stored).amin(1)
    for name, options in (("Residual", {"d": 3}), ("OfLinear", {})):
        detector = PytorchOOD.from_head(name, head, **options)
        with pytest.raises(NotFittedError, match="must be fitted"):
            detector.score(test)
        scores = detector.fit(known, TARGETS).score(test)
        torch.testing.assert_close(scores, -distances, rtol=1e-3, atol=1e-3)
        assert not scores.requires_grad
    energy = PytorchOOD.from_head("Energy", head, t=2.0)
    torch.testing.assert_close(energy.score(test), 2 * torch.logsumexp(logits / 2, -1))
    torch.testing.assert_close(energy.score(test, 3 * logits), 2 * torch.logsumexp(3 * logits / 2, -1))
    fitted = PytorchOOD.from_head("Temperature", head).fit(known, TARGETS)
    expected = float(stored.gather(1, TARGETS[:, None]).mean())
    assert fitted.detector.t == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("stub")
def test_bad_arguments_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    head = head_of("linear")
    with pytest.raises(InvalidArgumentError, match="OfImages has neither"):
        PytorchOOD.from_head("OfImages", head)
    with pytest.raises(InvalidArgumentError, match=r"class of pytorch_ood\.detector, got 'ViN'"):
        PytorchOOD.from_head("ViN", head)
    with pytest.raises(InvalidArgumentError, match=r"head must be an nn\.Linear or a head of this library"):
        PytorchOOD.from_head("Energy", nn.ReLU())
    with pytest.raises(InvalidArgumentError, match="targets are needed by Residual"):
        PytorchOOD.from_head("Residual", head, d=2).fit(features_of("known"))
    with pytest.raises(InvalidArgumentError, match=r"shape \(B, 9\), got \(60, 8\)"):
        PytorchOOD.from_head("Energy", head).score(features_of("test")[:, 1:])
    monkeypatch.setitem(sys.modules, "pytorch_ood.api", ModuleType("pytorch_ood.api"))
    with pytest.raises(InvalidArgumentError, match=r"pytorch-ood must be 0\.3 or newer"):
        PytorchOOD.from_head("Energy", head)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pytorch_ood", "pytorch_ood.detector"):  # where it is installed it may be loaded already
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'etflayers\[ood\]'"):
        PytorchOOD.from_head("ViM", head_of("linear"), d=2)


@pytest.mark.parametrize("kind", ["linear", "nearest", "normalized"])  # those that fit the features
def test_detectors_of_the_package(kind: str) -> None:
    detectors = pytest.importorskip("pytorch_ood.detector")
    head, known, test, other = head_of(kind), *map(features_of, ("known", "test", "other"))
    options: dict[str, dict[str, Any]] = {
        "ViM": {"d": 3},
        "KNN": {"k": 3},
        "Mahalanobis": {},
        "RMD": {},
        "SHE": {},
        "fDBD": {},
        "NCI": {},
        "DICE": {"p": 0.5},
        "EnergyBased": {},
        "MaxSoftmax": {},
        "MaxLogit": {},
        "KLMatching": {},
    }
    for name, given in options.items():
        detector = PytorchOOD.from_head(name, head, **given).fit(known, TARGETS)
        found = ood_metrics(detector.score(test), detector.score(other))
        assert found.auroc > 0.6, name  # a sign that is wrong would be below 0.5
    rows = F.normalize(known, dim=-1) if kind == "normalized" else known
    rows_test = F.normalize(test, dim=-1) if kind == "normalized" else test
    linear = head if kind == "linear" else head.to_linear(normalized_inputs=True)  # type: ignore[operator]
    bias = torch.zeros(K) if linear.bias is None else linear.bias
    direct = detectors.ViM(None, d=3, w=linear.weight, b=bias).fit_features(rows, TARGETS)
    scores = PytorchOOD.from_head("ViM", head, d=3).fit(known, TARGETS).score(test)
    torch.testing.assert_close(scores, -direct.predict_features(rows_test))
