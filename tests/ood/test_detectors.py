"""Detectors against a pipeline of scikit-learn and against a search over all vertices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from etflayers.errors import InvalidArgumentError, NonFiniteError, NotFittedError
from etflayers.functional import nearest_etf
from etflayers.geometry import simplex_etf
from etflayers.ood import NECO, VertexDistance, ood_metrics

K, D = 4, 9
TARGETS = torch.arange(K).repeat(30)


def made(kind: str = "plain") -> tuple[Tensor, Tensor, Tensor]:
    """Training features, others, and logits of those."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(K, D, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, 120, D, generator=generator, dtype=torch.float64)
    mixing = torch.randn(D, D, generator=generator, dtype=torch.float64)
    known, other = 2 * means[TARGETS] + 0.4 * noise[0] @ mixing, noise[1]
    if kind == "offset":
        known, other = known + 1e4, other + 1e4
    elif kind == "constant":
        known[:, 3] = 0.1
    return known, other, torch.randn(120, K, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["plain", "offset", "constant"])
@pytest.mark.parametrize("dimension", [1, 3, D, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("max_logit", [True, False])
def test_neco_is_a_pipeline_of_scikit_learn(kind: str, dimension: float, max_logit: bool) -> None:
    sklearn = pytest.importorskip("sklearn")
    assert sklearn
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    known, other, logits = made(kind)
    scaler = StandardScaler().fit(known.numpy())
    pca = PCA(dimension, svd_solver="full").fit(scaler.transform(known.numpy()))
    detector = NECO(dimension, max_logit=max_logit).fit(known)
    assert len(detector.directions) == pca.n_components_
    for features in (known, other):
        scaled = scaler.transform(features.numpy())
        expected = np.linalg.norm(pca.transform(scaled), axis=1) / np.linalg.norm(scaled, axis=1)
        if max_logit:
            expected = expected * logits.numpy().max(1)
        found = detector.score(features, logits if max_logit else None)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8 if kind == "offset" else 1e-11)


def test_neco_of_the_mean_is_zero_and_of_half_precision_finite() -> None:
    known = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [0.5, -0.5], [-0.5, 0.5]])
    detector = NECO(1, max_logit=False).fit(known.bfloat16())
    assert detector.score(torch.zeros(1, 2)).item() == 0
    assert torch.isfinite(detector.score(known.half())).all()


@pytest.mark.parametrize("kind", ["plain", "offset"])
def test_vertex_distance_is_the_smallest_over_all_vertices(kind: str) -> None:
    known, other, _ = made(kind)
    plain = known - (1e4 if kind == "offset" else 0)
    means = torch.stack([plain[k == TARGETS].mean(0) for k in range(K)])
    frame = nearest_etf(means).numpy()
    detector = VertexDistance().fit(known, TARGETS)
    np.testing.assert_allclose(detector.vertices, frame, atol=1e-10)
    for features in (known, other):
        rows = features.numpy() - (1e4 if kind == "offset" else 0) - means.mean(0).numpy()
        units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        distances = np.linalg.norm(units[:, None] - frame[None], axis=2).min(1)
        np.testing.assert_allclose(detector.score(features), -distances, atol=1e-10)


def test_collapsed_features_have_the_largest_score_and_keep_short_distances() -> None:
    frame = simplex_etf(K, D, rotation="haar", dtype=torch.float64)
    known = 7 * frame[TARGETS] + 3
    detector = VertexDistance(K).fit(known, TARGETS)
    assert detector.score(known).abs().max() < 1e-14
    assert detector.score(known).max() <= 0
    # 2 - 2 cos of this would be zero.
    side = torch.linalg.svd(frame).Vh[-1]
    assert detector.score(known[:1] + 7e-10 * side).item() == pytest.approx(-1e-10, rel=1e-3)
    # What is orthogonal to all vertices is sqrt 2 away, and the center itself, which has no direction, 1.
    assert detector.score(side.unsqueeze(0) + 3).item() == pytest.approx(-(2**0.5))
    assert detector.score(torch.full((1, D), 3.0)).item() == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize("detector", [NECO(K - 1, max_logit=False), VertexDistance()])
def test_it_tells_known_from_unknown(detector: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    frame = simplex_etf(K, D, rotation="haar", generator=generator, dtype=torch.float64)
    noise = torch.randn(2, 120, D, generator=generator, dtype=torch.float64)
    known = 5 * frame[TARGETS] + 0.2 * noise[0]
    detector.fit(known[:60], TARGETS[:60])
    found = ood_metrics(detector.score(known[60:]), detector.score(noise[1]))
    assert found.auroc > 0.95
    backwards = ood_metrics(-detector.score(known[60:]), -detector.score(noise[1]))
    assert backwards.auroc == pytest.approx(1 - found.auroc, abs=1e-6)


def test_a_second_fit_forgets_the_first_and_one_that_is_refused_does_not() -> None:
    known, other, _ = made()
    detector = VertexDistance().fit(known, TARGETS)
    before = detector.score(other)
    with pytest.raises(InvalidArgumentError, match="of 5 classes"):
        detector.fit(2 + known[:, :5], TARGETS + (TARGETS == 3))
    assert torch.equal(detector.score(other), before)
    detector.fit(known[:, :5], TARGETS)
    assert detector.score(other[:, :5]).shape == (120,)


@pytest.mark.parametrize("detector", [NECO(2, max_logit=False), VertexDistance()])
def test_what_cannot_be_scored_is_named(detector: Any) -> None:
    known, other, logits = made()
    with pytest.raises(NotFittedError, match="must be fitted before it can score: call fit"):
        type(detector)().score(other)
    detector.fit(known, TARGETS)
    with pytest.raises(InvalidArgumentError, match=r"width of those in fit, shape \(B, 9\), got \(120, 8\)"):
        detector.score(other[:, 1:])
    with pytest.raises(InvalidArgumentError, match=r"features must have shape \(B, d\), got \(9,\)"):
        detector.score(other[0])
    with pytest.raises(InvalidArgumentError, match="features must be a tensor, got ndarray"):
        detector.score(other.numpy())
    with pytest.raises(InvalidArgumentError, match="features must have a real floating-point dtype"):
        detector.score(other.long())
    with pytest.raises(NonFiniteError, match="features must be finite"):
        detector.score(other / 0)
    with pytest.raises(InvalidArgumentError, match=r"logits must have shape .* = \(120, K\), got \(119, 4\)"):
        detector.score(other, logits[1:])
    with pytest.raises(NonFiniteError, match="logits must be finite"):
        detector.score(other, logits / 0)
    with pytest.raises(InvalidArgumentError, match="at least one sample"):
        detector.fit(known[:0], TARGETS[:0])
    with pytest.raises(InvalidArgumentError, match="targets must be integers"):
        detector.fit(known, TARGETS.double())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: NECO(0), "dimension must be at least 1, got 0"),
        (lambda: NECO(1.0), r"dimension as a share of variance must be in \(0, 1\), got 1.0"),
        (lambda: NECO(0.0), "dimension must be a finite number > 0"),
        (lambda: NECO(True), "dimension must be an integer, got True"),
        (lambda: NECO(10).fit(made()[0]), "dimension must be at most the width of the features, 9, got 10"),
        (lambda: NECO().fit(torch.ones(5, 3)), "features must not all be equal"),
        (lambda: NECO(2).fit(made()[0]).score(made()[1]), "logits are needed by NECO"),
        (lambda: NECO(2, max_logit=1), "max_logit must be True or False"),  # type: ignore[arg-type]
        (lambda: VertexDistance(1), "num_classes must be at least 2"),
        (lambda: VertexDistance().fit(made()[0]), "targets are needed by VertexDistance"),
        (lambda: VertexDistance().fit(made()[0], 0 * TARGETS), "of two classes or more, got 1"),
        (lambda: VertexDistance(K + 1).fit(made()[0], TARGETS), r"of 5 classes \[4\] have none"),
        (lambda: VertexDistance().fit(made()[0][:, :2], TARGETS), "at least"),
    ],
)
def test_bad_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        call()
