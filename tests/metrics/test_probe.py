"""Hooks that measure layers of a running model, and the callback that logs what they measure."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from etflayers.errors import EtfLayersError, InvalidArgumentError
from etflayers.metrics import NeuralCollapse, NeuralCollapseCallback, NeuralCollapseProbe

K = 3


def make_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, K)
    )


def make_batches() -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(12, 1, 5, 5), torch.arange(12) % K) for _ in range(3)]


def test_layers_are_measured_as_by_hand() -> None:
    model, batches = make_model(), make_batches()
    conv, last = NeuralCollapse(K, 6), NeuralCollapse(K, 6, classifier=model[4])
    with NeuralCollapseProbe(model, K, layers=["0"], classifier="4") as probe, torch.no_grad():
        for images, targets in batches:
            logits = model(images)
            probe.update(targets)
            conv.update(model[0](images).mean((2, 3)), targets)
            probe._features.pop("0")  # by the hook in the line above, which was a run of that layer alone
            last.update(model[:4](images), targets, logits)
            probe._features.clear()
    measured = probe.compute()
    for name, metric in (("0", conv), ("4", last)):
        for key, value in metric.compute().items():
            torch.testing.assert_close(measured[name][key], value, msg=key, rtol=1e-5, atol=1e-6)
    assert {"nc3_distance", "accuracy"} <= measured["4"].keys() - measured["0"].keys()


def test_hooks_are_gone_afterwards() -> None:
    model = make_model()
    with NeuralCollapseProbe(model, K, layers=["0"]):
        assert model[0]._forward_hooks
    assert not model[0]._forward_hooks


def test_reset_and_options_and_pool() -> None:
    model = make_model()
    flatten = NeuralCollapseProbe(model, K, layers=["0"], pool=lambda x: x.flatten(1), scatter="none")
    for images, targets in make_batches():
        model(images)
        flatten.update(targets)
    assert flatten.metrics["0"].in_features == 6 * 9
    assert "nc1_trace" not in flatten.compute()["0"]
    flatten.reset()
    assert not flatten.metrics["0"].moments.counts.any()
    flatten.remove()


def test_features_keep_no_graph() -> None:
    model = make_model()
    with NeuralCollapseProbe(model, K, layers=["0"]) as probe:
        model(torch.randn(6, 1, 5, 5))
        assert not probe._features["0"].requires_grad


def test_what_the_probe_refuses() -> None:
    model = make_model()
    with pytest.raises(InvalidArgumentError, match=r"has no \['7'\]"):
        NeuralCollapseProbe(model, K, layers=["7"])
    with pytest.raises(InvalidArgumentError, match="at least one module"):
        NeuralCollapseProbe(model, K)
    with pytest.raises(InvalidArgumentError, match="must be different"):
        NeuralCollapseProbe(model, K, layers=["4"], classifier="4")
    assert not any(module._forward_hooks for module in model.modules())
    with NeuralCollapseProbe(model, K, layers=["0"], pool=lambda x: x) as probe:
        with pytest.raises(InvalidArgumentError, match="no sample"):
            probe.compute()
        with pytest.raises(EtfLayersError, match="run the model first"):
            probe.update(torch.arange(3))
        model(torch.randn(3, 1, 5, 5))
        with pytest.raises(InvalidArgumentError, match=r"pool must return \(B, d\)"):
            probe.update(torch.arange(3))
    lstm = nn.Sequential(nn.LSTM(4, 4))
    with (
        NeuralCollapseProbe(lstm, K, layers=["0"]),
        pytest.raises(InvalidArgumentError, match="must take and return one tensor"),
    ):
        lstm(torch.randn(3, 4))


class Module(nn.Module):
    """What the callback uses of a LightningModule."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make_model()
        self.logged: list[dict[str, Any]] = []

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def log_dict(self, metrics: dict[str, Any]) -> None:
        self.logged.append(metrics)


def validate(callback: NeuralCollapseCallback, module: Module, sanity_checking: bool = False) -> None:
    trainer = SimpleNamespace(sanity_checking=sanity_checking)
    callback.on_validation_epoch_start(trainer, module)
    for loader in (0, 1):
        for index, (images, targets) in enumerate(make_batches()):
            module(images)
            callback.on_validation_batch_end(trainer, module, None, (images, targets), index, loader)
    callback.on_validation_epoch_end(trainer, module)


def test_the_callback_logs_each_epoch_and_the_drift_from_the_last() -> None:
    module = Module()
    callback = NeuralCollapseCallback(K, layers=["net.0"], classifier="net.4", prefix="val/")
    validate(callback, module, sanity_checking=True)
    assert not module.logged
    validate(callback, module)
    first = {name for metrics in module.logged for name in metrics}
    assert {"val/net.0/nc1_trace", "val/net.4/nc3_cosine"} <= first
    assert not any("drift" in name for name in first)
    validate(callback, module)
    drift = module.logged[-1]["val/net.4/nc2_etf_drift_means"]
    assert 0 < drift.item() < 2
    assert not any(layer._forward_hooks for layer in module.modules())


def test_the_callback_measures_one_loader_only() -> None:
    module = Module()
    callback = NeuralCollapseCallback(K, classifier="net.4", dataloader_idx=1)
    trainer = SimpleNamespace(sanity_checking=False)
    callback.on_validation_epoch_start(trainer, module)
    for loader in (0, 1):
        images, targets = make_batches()[0]
        module(images)
        callback.on_validation_batch_end(trainer, module, None, (images, targets), 0, loader)
    assert callback.probe is not None
    assert callback.probe.metrics["net.4"].moments.counts.sum() == 12


def test_the_callback_asks_for_targets_it_cannot_find() -> None:
    module = Module()
    callback = NeuralCollapseCallback(K, classifier="net.4")
    callback.on_validation_epoch_start(None, module)
    with pytest.raises(InvalidArgumentError, match="pass targets="):
        callback.on_validation_batch_end(None, module, None, {"image": 1}, 0)
