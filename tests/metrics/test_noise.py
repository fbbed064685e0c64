"""Measures of label noise against their definitions, spelt out sample by sample in float64 NumPy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from etflayers.data import latent_classes, symmetric_noise
from etflayers.errors import InvalidArgumentError, NonFiniteError
from etflayers.metrics import (
    NOISE_DESCRIPTIONS,
    ClassStatistics,
    LabelNoise,
    class_statistics,
    dilation,
    label_accuracies,
    memorization,
    origin_means,
)
from tests.metrics.definitions import Data, direct_statistics, make_data, norm

K, D = 5, 7
KINDS = ["random", "collapsed", "imbalanced", "offset"]


class Noisy:
    """Training features with noisy labels, logits of a classifier, and test features of the same kind."""

    def __init__(self, kind: str, n: int = 40) -> None:
        data = make_data(kind, k=K, d=D, n=n)
        generator = torch.Generator().manual_seed(1)
        self.originals = data.targets
        self.targets = symmetric_noise(data.targets, K, 0.4, generator=generator).targets
        # Half memorized: a corrupted feature moves halfway to the mean of its label.
        means = torch.from_numpy(direct_statistics(data)["means"])
        self.features = data.features + (means[self.targets] - means[self.originals]) / 2
        self.logits = (self.features - means.mean(0)) @ data.weight.T + data.bias
        order = torch.randperm(len(data.targets), generator=generator)[: len(data.targets) * 3 // 4]
        self.test = replace(data, features=data.features[order], targets=data.targets[order])
        self.centers = class_statistics(self.test.features, self.test.targets, K)
        # For the definitions, which lose digits to a common offset, the same features without it: exactly,
        # because a difference of nearby numbers is not rounded. No measure depends on it.
        offset = 1e4 if kind == "offset" else 0.0
        self.plain = self.features - offset
        self.plain_test = replace(self.test, features=self.test.features - offset)

    @property
    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.features, self.targets, self.originals, self.logits


def nc1(features: Tensor, labels: Tensor) -> float:
    """tr(Sigma_W pinv(Sigma_B)) / K with the counts of these labels."""
    zeros = torch.zeros(K, 1)
    s = direct_statistics(Data(features, labels, zeros, zeros))
    return float(np.trace(s["within"] @ np.linalg.pinv(s["between"]))) / K


def direct(noisy: Noisy) -> dict[str, float]:
    """Every measure by its definition."""
    features, targets, originals, logits = (t.numpy() for t in (noisy.plain, *noisy.batch[1:]))
    test_means = direct_statistics(noisy.plain_test)["means"]
    corrupted = [i for i in range(len(features)) if targets[i] != originals[i]]
    decisions = logits.argmax(1)
    distances = [norm(features[i] - test_means[originals[i]]) for i in corrupted]
    bias = direct_bias(features, targets, originals)
    return {
        "noise_rate": len(corrupted) / len(features),
        "nc1_trace_noisy": nc1(noisy.plain, noisy.targets),
        "nc1_trace_clean": nc1(noisy.plain, noisy.originals),
        "nc1_trace_logits": nc1(noisy.logits, noisy.targets),
        "accuracy_noisy": float((decisions == targets).mean()),
        "accuracy_clean": float((decisions == originals).mean()),
        "memorization": sum(distances),
        "memorization_mean": float(np.mean(distances)),
        "corruption_bias": float(np.mean([bias[targets[i], originals[i]] for i in corrupted])),
    }


def direct_bias(
    features: npt.NDArray[np.float64], targets: npt.NDArray[Any], originals: npt.NDArray[Any]
) -> npt.NDArray[np.float64]:
    clean = [features[(targets == k) & (originals == k)].mean(0) for k in range(K)]
    bias = np.full((K, K), np.nan)
    for j in range(K):
        for k in range(K):
            members = features[(targets == j) & (originals == k)]
            if j != k and len(members):
                way = clean[j] - clean[k]
                bias[j, k] = (members.mean(0) - clean[k]) @ way / norm(way)
    return bias


def measured(noisy: Noisy, **options: Any) -> LabelNoise:
    metric = LabelNoise(K, D, centers=noisy.centers, **options)
    for batch in zip(*(tensor.split(17) for tensor in noisy.batch), strict=True):
        metric.update(*batch)
    return metric


def assert_measures(found: dict[str, Tensor], expected: dict[str, float], rel: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.float64
        assert found[name].item() == pytest.approx(value, rel=rel, abs=1e-10), name


@pytest.mark.parametrize("kind", KINDS)
def test_measures_are_their_definitions(kind: str) -> None:
    noisy = Noisy(kind)
    assert_measures(measured(noisy).compute(), direct(noisy))
    assert direct(noisy).keys() == NOISE_DESCRIPTIONS.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_memorization_by_sample_and_by_class(kind: str) -> None:
    noisy = Noisy(kind)
    found = memorization(noisy.features, noisy.targets, noisy.originals, noisy.centers)
    corrupted = (noisy.targets != noisy.originals).numpy()
    means = direct_statistics(noisy.plain_test)["means"]
    classes = noisy.originals.numpy()[corrupted]
    distances = np.sqrt(((noisy.plain.numpy()[corrupted] - means[classes]) ** 2).sum(1))
    np.testing.assert_allclose(found.distances, distances, rtol=1e-10)
    sums = np.array([distances[classes == k].sum() for k in range(K)])
    counts = np.bincount(classes, minlength=K)
    np.testing.assert_allclose(found.sums, sums, rtol=1e-10)
    np.testing.assert_allclose(found.class_means, sums / np.maximum(counts, 1), rtol=1e-10)
    assert found.total.item() == pytest.approx(distances.sum(), rel=1e-10)
    np.testing.assert_allclose(measured(noisy).memorization_by_class(), sums, rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_centroids_by_label_and_origin(kind: str) -> None:
    noisy = Noisy(kind)
    features, targets, originals, _ = (tensor.numpy() for tensor in noisy.batch)
    for found in (origin_means(*noisy.batch[:3], K), measured(noisy).origin_means()):
        for j in range(K):
            for k in range(K):
                members = features[(targets == j) & (originals == k)]
                assert found.counts[j, k] == len(members)
                mean = members.mean(0) if len(members) else np.zeros(D)
                np.testing.assert_allclose(found.means[j, k], mean, rtol=1e-12, atol=1e-12)
        expected = direct_bias(features, targets, originals)
        np.testing.assert_allclose(found.bias(), expected, rtol=1e-10, atol=1e-10)


def test_dilation_is_the_variability_of_test_features() -> None:
    noisy = Noisy("random")
    found = dilation(noisy.centers)
    s = direct_statistics(noisy.test)
    assert found.nc1.item() == pytest.approx(nc1(noisy.test.features, noisy.test.targets), rel=1e-10)
    assert found.trace.item() == pytest.approx(np.trace(s["within"]), rel=1e-12)


def test_limits_of_memorization() -> None:
    """A network that ignores wrong labels, and one that has learned every one of them by heart."""
    means = 3 * torch.eye(K, D, dtype=torch.float64)
    originals = torch.arange(K).repeat(20)
    targets = symmetric_noise(originals, K, 0.5, generator=torch.Generator().manual_seed(0)).targets
    test = class_statistics(means, torch.arange(K), K)
    for places, share in ((originals, 0.0), (targets, 1.0)):
        metric = LabelNoise(K, D, centers=test)
        metric.update(means[places], targets, originals, means[places] @ means.T)
        found = metric.compute()
        distance = 3 * 2**0.5
        assert found["memorization_mean"].item() == pytest.approx(share * distance)
        assert found["corruption_bias"].item() == pytest.approx(share * distance)
        assert found["accuracy_noisy" if share else "accuracy_clean"] == 1
        assert found["nc1_trace_noisy" if share else "nc1_trace_clean"] == pytest.approx(0, abs=1e-12)
        assert found["nc1_trace_clean" if share else "nc1_trace_noisy"] > 0.1


def test_clean_labels_leave_out_what_does_not_exist() -> None:
    data = make_data("random", k=K, d=D)
    metric = LabelNoise(K, D, centers=class_statistics(data.features, data.targets, K))
    metric.update(data.features, data.targets, data.targets)
    found = metric.compute()
    assert set(found) == {"noise_rate", "nc1_trace_noisy", "nc1_trace_clean", "memorization"}
    assert found["memorization"] == found["noise_rate"] == 0
    assert metric.origin_means().bias().isnan().all()


def test_latent_classes_have_the_centers_of_their_looks() -> None:
    """Labels in [0, 2K), true classes and centers in [0, K)."""
    data = make_data("random", k=K, d=D)
    targets = latent_classes(data.targets, K, 0.3, generator=torch.Generator().manual_seed(0)).targets
    centers = class_statistics(data.features, data.targets, K)
    metric = LabelNoise(2 * K, D, centers=centers, unseen="exclude")
    metric.update(data.features, targets, data.targets)
    moved = targets >= K
    distances = torch.linalg.vector_norm(data.features - centers.means[data.targets], dim=1)[moved]
    assert metric.compute()["memorization"].item() == pytest.approx(distances.sum().item(), rel=1e-12)
    assert metric.compute()["noise_rate"].item() == pytest.approx(moved.double().mean().item())


def test_ignored_samples_count_nothing_and_may_hold_anything() -> None:
    noisy = Noisy("random")
    kept = torch.ones(len(noisy.targets), dtype=torch.bool)
    kept[::4] = False
    expected = LabelNoise(K, D, centers=noisy.centers)
    expected.update(*(tensor[kept] for tensor in noisy.batch))
    for name in ("targets", "originals"):
        features, targets, originals, logits = (tensor.clone() for tensor in noisy.batch)
        features[~kept], logits[~kept] = torch.nan, torch.nan
        {"targets": targets, "originals": originals}[name][~kept] = -7
        metric = LabelNoise(K, D, centers=noisy.centers, ignore_index=-7)
        metric.update(features, targets, originals, logits)
        assert_measures(metric.compute(), {n: v.item() for n, v in expected.compute().items()})
        found = label_accuracies(logits, targets, originals, ignore_index=-7)
        assert found.noisy.item() == pytest.approx(expected.compute()["accuracy_noisy"].item())
        assert found.clean.item() == pytest.approx(expected.compute()["accuracy_clean"].item())


def test_half_precision_features_are_measured_in_float32_or_better() -> None:
    noisy = Noisy("random")
    half = LabelNoise(K, D, centers=noisy.centers)
    half.update(*(t.bfloat16() if t.is_floating_point() else t for t in noisy.batch))
    exact = LabelNoise(K, D, centers=noisy.centers)
    exact.update(*(t.bfloat16().double() if t.is_floating_point() else t for t in noisy.batch))
    assert_measures(half.compute(), {n: v.item() for n, v in exact.compute().items()}, rel=1e-5)


def refused(change: str) -> tuple[Noisy, list[Any]]:
    noisy = Noisy("random", n=4)
    features, targets, originals, logits = (tensor.clone() for tensor in noisy.batch)
    if change == "features":
        features[3, 2] = torch.nan
    elif change == "logits":
        logits[3, 2] = -torch.inf
    elif change == "width":
        logits = logits[:, 1:]
    elif change == "originals":
        originals[0] = K
    elif change == "targets":
        targets[0] = K
    return noisy, [features, targets, originals, logits]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("features", NonFiniteError, "features must be finite"),
        ("logits", NonFiniteError, "logits must be finite"),
        ("width", InvalidArgumentError, r"must have shape \(B, in_features\) = \(B, 5\), got \(20, 4\)"),
        ("originals", InvalidArgumentError, r"originals must be class indices in \[0, 5\)"),
        ("targets", InvalidArgumentError, r"targets must be class indices in \[0, 5\)"),
    ],
)
def test_a_batch_that_is_refused_is_not_added(change: str, error: Any, message: str) -> None:
    noisy, batch = refused(change)
    metric = LabelNoise(K, D, centers=noisy.centers)
    metric.update(*noisy.batch)
    before = {name: value.clone() for name, value in metric.metric_state.items()}
    with pytest.raises(error, match=message):
        metric.update(*batch)
    for name, value in metric.metric_state.items():
        assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name


def test_bad_arguments_are_named() -> None:
    noisy = Noisy("random", n=4)
    few = class_statistics(
        noisy.features, torch.where(noisy.originals == 1, 0, noisy.originals), K, unseen="exclude"
    )
    with pytest.raises(
        InvalidArgumentError, match=r"centers must have all classes 0 to K - 1, got \[0, 2, 3, 4\]"
    ):
        LabelNoise(K, D, centers=few)
    with pytest.raises(InvalidArgumentError, match="centers must have all classes"):
        memorization(noisy.features, noisy.targets, noisy.originals, few)
    with pytest.raises(InvalidArgumentError, match=r"centers must have means of shape .* in_features = 9"):
        LabelNoise(K, 9, centers=noisy.centers)
    with pytest.raises(InvalidArgumentError, match="memorization needs centers"):
        LabelNoise(K, D).memorization_by_class()
    metric = LabelNoise(K, D)
    metric.update(*noisy.batch)
    metric.update(*noisy.batch[:3])
    with pytest.raises(InvalidArgumentError, match="logits were given for 20 of 40 samples"):
        metric.compute()
    with pytest.raises(InvalidArgumentError, match="originals must have the shape of targets"):
        origin_means(noisy.features, noisy.targets, noisy.originals[1:], K)
    with pytest.raises(InvalidArgumentError, match="originals must be integers"):
        origin_means(noisy.features, noisy.targets, noisy.originals.double(), K)
    with pytest.raises(InvalidArgumentError, match="at least one sample that is not ignored"):
        label_accuracies(noisy.logits, torch.full((20,), -100), noisy.originals)


def test_forward_gives_the_batch_and_adds_it() -> None:
    noisy = Noisy("random")
    metric, half = LabelNoise(K, D, centers=noisy.centers), len(noisy.targets) // 2
    parts = [[tensor[:half] for tensor in noisy.batch], [tensor[half:] for tensor in noisy.batch]]
    for part in parts:
        alone = LabelNoise(K, D, centers=noisy.centers)
        alone.update(*part)
        assert_measures(metric(*part), {n: v.item() for n, v in alone.compute().items()})
    assert_measures(metric.compute(), {n: v.item() for n, v in measured(noisy).compute().items()})


def test_statistics_of_the_library_have_the_counts_of_the_noise() -> None:
    """What `class_statistics` counts under noise is the noisy labels, not the data set."""
    noisy = Noisy("imbalanced")
    statistics: ClassStatistics = class_statistics(noisy.features, noisy.targets, K)
    assert torch.equal(statistics.counts, torch.bincount(noisy.targets, minlength=K).double())
