"""What ``plot`` draws is what ``compute`` returned."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from etflayers import nearest_etf, simplex_etf
from etflayers.errors import InvalidArgumentError, MissingDependencyError
from etflayers.metrics import CosineMargins, NeuralCollapse, plot_cosines, plot_tetrahedron
from tests.metrics.definitions import make_data

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def no_window() -> Iterator[None]:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield
    pyplot.close("all")


def measured() -> NeuralCollapse:
    data = make_data("random", torch.float32)
    metric = NeuralCollapse(5, 7, classifier=nn.Linear(7, 5))
    metric.update(data.features, data.targets)
    return metric


def test_bars_of_the_measures() -> None:
    metric = measured()
    figure, ax = metric.plot()
    values = metric.compute()
    assert [label.get_text() for label in ax.get_yticklabels()] == list(values)
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == pytest.approx([value.item() for value in values.values()])
    figure.canvas.draw()
    assert metric.plot(ax=ax)[1] is ax


def test_curves_of_the_measures() -> None:
    values = measured().compute()
    later = {**{name: value / 2 for name, value in values.items()}, "nc2_etf_drift_means": torch.tensor(0.1)}
    figure, ax = measured().plot([values, later])
    figure.canvas.draw()
    curves = {line.get_label(): line.get_ydata() for line in ax.lines}
    assert list(curves) == list(later)
    for name, value in values.items():
        assert list(curves[name]) == pytest.approx([value.item(), value.item() / 2])
    assert list(curves["nc2_etf_drift_means"]) == pytest.approx([0.1])
    with pytest.raises(InvalidArgumentError, match="val must hold at least one measure"):
        measured().plot([])


def test_the_curve_of_margins() -> None:
    data = make_data("random", torch.float32)
    metric = CosineMargins()
    metric.update(data.features, data.targets, data.weight)
    figure, ax = metric.plot()
    figure.canvas.draw()
    assert torch.equal(torch.from_numpy(ax.lines[0].get_ydata()), metric.compute())
    _, ax = metric.plot([metric.compute(), metric.compute()[::2]])
    assert len(ax.lines[1].get_ydata()) == len(data.targets) // 2
    with pytest.raises(InvalidArgumentError, match="val must hold at least one curve"):
        metric.plot([])


def test_cosines_are_those_of_centered_rows() -> None:
    rows = 7 * simplex_etf(6, 9, rotation="haar", dtype=torch.float64) + torch.arange(9)
    figure, ax = plot_cosines(rows)
    figure.canvas.draw()
    expected = torch.full((6, 6), -0.2, dtype=torch.float64).fill_diagonal_(1)
    torch.testing.assert_close(torch.from_numpy(ax.images[0].get_array().data), expected)
    labels = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert labels == ["−1", "−1/5", "1"]
    assert plot_cosines(rows, ax)[0] is figure
    assert len(figure.axes) == 2  # no second bar
    with pytest.raises(
        InvalidArgumentError, match=r"rows must have shape \(K, d\) with K >= 2, got \(1, 9\)"
    ):
        plot_cosines(rows[:1])


def test_the_tetrahedron_is_seen_without_distortion() -> None:
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(4, 16, dtype=torch.float64, generator=generator)
    figure, ax = plot_tetrahedron(means, nearest_etf(means))
    figure.canvas.draw()
    lines = [torch.tensor(np.array(line.get_data_3d())).double().T for line in ax.lines]
    edges, rest = lines[:6], lines[6:]
    dots = torch.cat([line for line in rest[:4]])
    # Distances between dots are those of the means up to one factor, and the mean is the origin.
    ratio = torch.cdist(dots, dots) / torch.cdist(means, means)
    off = ~torch.eye(4, dtype=torch.bool)
    torch.testing.assert_close(ratio[off], ratio[0, 1].expand(12))
    torch.testing.assert_close(dots.mean(0), torch.zeros(3).double(), rtol=0, atol=1e-12)
    assert float(dots.square().sum(1).mean()) == pytest.approx(1)
    # The classifier is the nearest ETF itself: its triangles are the corners of the tetrahedron.
    corners = torch.cat(rest[5::2])
    torch.testing.assert_close(corners, simplex_etf(4, 3, dtype=torch.float64))
    assert all(float((edge[0] - edge[1]).norm()) == pytest.approx((8 / 3) ** 0.5) for edge in edges)


def test_the_tetrahedron_has_a_point_for_each_sample() -> None:
    means, targets = torch.randn(4, 5), torch.arange(12) % 4
    _, ax = plot_tetrahedron(means, features=means[targets], targets=targets)
    assert len(ax.collections[0].get_offsets()) == 12
    assert len(ax.lines) == 6 + 4  # no classifier
    assert plot_tetrahedron(means, ax=ax)[1] is ax


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.ones(3, 5),), {}, r"means must have shape \(4, d\) with d >= 3, .* got \(3, 5\)"),
        ((torch.ones(4, 2),), {}, "means must have shape"),
        ((torch.ones(4, 5), torch.ones(4, 6)), {}, r"weight must have shape .* got \(4, 6\)"),
        ((torch.ones(4, 5),), {"features": torch.ones(2, 5)}, "features and targets belong together"),
    ],
)
def test_what_is_no_tetrahedron_is_named(arguments: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        plot_tetrahedron(*arguments, **options)


def test_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingDependencyError, match=r"etflayers\[examples\]"):
        measured().plot()
