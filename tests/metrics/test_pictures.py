"""What ``plot`` draws is what ``compute`` returned."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from etflayers.errors import InvalidArgumentError, MissingDependencyError
from etflayers.metrics import CosineMargins, NeuralCollapse
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


def test_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(MissingDependencyError, match=r"etflayers\[examples\]"):
        measured().plot()
