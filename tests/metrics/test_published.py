"""Measures of published code that are no entries of the dictionary, against their definitions."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from etflayers.errors import InvalidArgumentError
from etflayers.geometry import simplex_etf
from etflayers.metrics import (
    Classifier,
    center_agreement,
    center_disagreement,
    class_distance_normalized_variance,
    class_statistics,
    duality_row_distance,
    equinorm_difference,
    hyperspherical_energy,
    mse_decomposition,
    orthogonality_deviation,
    own_cosines,
)
from tests.metrics.definitions import (
    KINDS,
    Data,
    direct_agreement,
    direct_cdnv,
    direct_energy,
    direct_loss_parts,
    direct_statistics,
    ideal_data,
    make_data,
    norm,
)


def statistics_of(data: Data):  # type: ignore[no-untyped-def]
    return class_statistics(data.features, data.targets, data.num_classes)


@pytest.mark.parametrize("regularization", [0.0, 0.01])
@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_of_a_squared_loss(kind: str, regularization: float) -> None:
    data = make_data(kind, n=8)
    parts = mse_decomposition(
        statistics_of(data), Classifier(data.weight, data.bias), regularization=regularization
    )
    direct = direct_loss_parts(data, regularization)
    # Deviations are kept to 1e-12 of the features: of a spread of 1e-4, or a mean of 1e4, to 1e-8.
    for name, value in parts._asdict().items():
        assert value.item() == pytest.approx(direct[name], rel=1e-6, abs=1e-9 * direct["loss"]), name
    assert sum(parts).item() == pytest.approx(direct["loss"], rel=1e-9)


def test_the_parts_where_there_is_nothing_left() -> None:
    data = ideal_data()
    best = mse_decomposition(statistics_of(data), Classifier(data.weight, data.bias))
    assert [best.nc1.item(), best.nc23.item()] == pytest.approx([0, 0], abs=1e-20)
    # W maps the vertices to a simplex of another size about 0 instead of the unit vectors.
    features, targets = data.arrays
    error = features @ data.weight.numpy().T + data.bias.numpy() - np.eye(5)[targets]
    assert best.perp.item() == pytest.approx((error**2).sum(1).mean() / 2, rel=1e-9)


def test_the_parts_with_a_class_that_has_no_sample_and_no_bias() -> None:
    data = make_data("imbalanced")
    spread = torch.tensor([0, 1, 3, 4, 5])
    weight = torch.randn(6, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    statistics = class_statistics(data.features, spread[data.targets], 6, unseen="exclude")
    parts = mse_decomposition(statistics, Classifier(weight), regularization=0.1)
    errors = data.features @ weight.mT - torch.eye(6, dtype=torch.float64)[spread[data.targets]]
    loss = (errors.square().sum(-1).mean() + 0.1 * weight.square().sum()) / 2
    torch.testing.assert_close(sum(parts), loss)
    with pytest.raises(InvalidArgumentError, match=r"classifier\.weight must have a row for each class"):
        mse_decomposition(statistics, Classifier(weight[:5]))
    with pytest.raises(InvalidArgumentError, match="regularization must be finite"):
        mse_decomposition(statistics, Classifier(weight), regularization=-1.0)


@pytest.mark.parametrize(("kernel", "exponent"), [("distance", None), ("log", None), ("riesz", None)])
@pytest.mark.parametrize("d", [7, 3])
def test_energies(kernel: Literal["distance", "log", "riesz"], exponent: float | None, d: int) -> None:
    rows = direct_statistics(make_data("random", d=d))["centered"]
    measured = hyperspherical_energy(torch.from_numpy(rows), kernel=kernel)
    assert [value.item() for value in measured] == pytest.approx(
        direct_energy(rows, kernel, d - 2), rel=1e-12
    )


@pytest.mark.parametrize("s", [-1.5, 2.5])
def test_riesz_energies_of_other_exponents(s: float) -> None:
    rows = direct_statistics(make_data("random"))["centered"]
    measured = hyperspherical_energy(torch.from_numpy(rows), kernel="riesz", exponent=s)
    assert [value.item() for value in measured] == pytest.approx(direct_energy(rows, "riesz", s), rel=1e-12)


def test_energies_at_the_ends() -> None:
    frame = 3 * simplex_etf(5, 7, rotation="haar", dtype=torch.float64)
    mean, variance = hyperspherical_energy(frame, kernel="distance")
    assert mean.item() == pytest.approx((2 * 5 / 4) ** 0.5, rel=1e-14)
    assert variance.item() == pytest.approx(0, abs=1e-28)
    twice = hyperspherical_energy(torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    assert torch.isinf(torch.stack(twice)).all()
    with pytest.raises(InvalidArgumentError, match="kernel must be"):
        hyperspherical_energy(frame, kernel="dot")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="exponent is for kernel='riesz'"):
        hyperspherical_energy(frame, exponent=1.0)
    with pytest.raises(InvalidArgumentError, match="must be finite and not 0"):
        hyperspherical_energy(torch.eye(2), kernel="riesz")


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_cdnv_with_an_exponent(kind: str, exponent: float) -> None:
    data = make_data(kind)
    measured = class_distance_normalized_variance(statistics_of(data), exponent=exponent)
    assert measured.item() == pytest.approx(direct_cdnv(data, exponent), rel=1e-8)
    with pytest.raises(InvalidArgumentError, match="exponent must be positive"):
        class_distance_normalized_variance(statistics_of(data), exponent=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_agreement_of_each_class_with_the_nearest_center(kind: str) -> None:
    data = make_data(kind)
    centers = torch.from_numpy(direct_statistics(data)["means"])
    logits = data.features @ data.weight.mT + data.bias
    measured = center_agreement(data.features, logits, centers, data.targets)
    assert measured.tolist() == pytest.approx(direct_agreement(data).tolist(), rel=1e-14)
    share = data.targets.bincount() / len(data.targets)
    disagreement = center_disagreement(data.features, logits, centers)
    torch.testing.assert_close(1 - share.double() @ measured, disagreement, rtol=0, atol=1e-6)
    ignoring = center_agreement(data.features, logits, centers, data.targets.to(torch.uint8), ignore_index=2)
    assert torch.isnan(ignoring[2])
    assert torch.equal(ignoring[[0, 1, 3, 4]], measured[[0, 1, 3, 4]])


def test_measures_of_weights_beside_means() -> None:
    data = make_data("imbalanced")
    features, targets = data.arrays
    m, w = direct_statistics(data)["centered"], data.weight.numpy()
    means = torch.from_numpy(m)
    distances = [norm(w[j] - m[j]) for j in range(5)]
    measured = duality_row_distance(data.weight, means, normalize=False)
    assert measured.item() == pytest.approx(np.mean(distances), rel=1e-14)
    lengths = [np.sqrt((rows**2).sum(1)) for rows in (w, m)]
    difference = abs(lengths[0].std(ddof=1) / lengths[0].mean() - lengths[1].std(ddof=1) / lengths[1].mean())
    assert equinorm_difference(data.weight, means).item() == pytest.approx(difference, rel=1e-12)
    foreign = np.arange(7.0) - 2
    cosines = [abs(row @ foreign) / norm(row) / norm(foreign) for row in m]
    deviation = orthogonality_deviation(means, torch.from_numpy(foreign))
    assert deviation.item() == pytest.approx(np.mean(cosines), rel=1e-12)
    with pytest.raises(InvalidArgumentError, match="foreign_mean must not hold a zero row"):
        orthogonality_deviation(means, torch.zeros(7))
    own = [row @ w[y] / norm(row) / norm(w[y]) for row, y in zip(features, targets, strict=True)]
    assert own_cosines(data.features, data.targets, data.weight).tolist() == pytest.approx(own, abs=1e-14)
