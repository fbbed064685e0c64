"""Hooks that measure layers of a running model, and the callback that logs what they measure."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from etflayers.errors import EtfLayersError, InvalidArgumentError, MissingDependencyError
from etflayers.metrics import NeuralCollapse, NeuralCollapseCallback, NeuralCollapseProbe, read_classifier
from etflayers.nn import FixedETFHead, NearestETFHead
from etflayers.nn.base import CodeHead

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
            last.update(model[:4](images), targets, logits)
            probe.discard()  # what the hooks saw in the two lines above
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


class Chain(nn.Module):
    """A body whose parts change their input in place, and a classifier whose logits are changed, too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True))
        self.last = nn.Linear(8, K)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.last(input=self.body(inputs))
        return logits


def test_what_is_changed_in_place_later_is_measured_as_it_was() -> None:
    torch.manual_seed(0)
    model, inputs, targets = Chain(), torch.randn(60, 4), torch.arange(60) % K
    first, last = NeuralCollapse(K, 8), NeuralCollapse(K, 8, classifier=model.last)
    with torch.no_grad():
        first.update(model.body[0](inputs), targets)
        last.update(model.body(inputs), targets, model(inputs))
        with NeuralCollapseProbe(model, K, layers=["body.0"], classifier="last", pool=lambda x: x) as probe:
            logits = model(inputs)
            logits.zero_()[torch.arange(60), targets] = 1
            probe.update(targets)
    measured = probe.compute()
    assert measured["last"]["accuracy"] < 0.7
    for name, metric in (("body.0", first), ("last", last)):
        for key, value in metric.compute().items():
            torch.testing.assert_close(measured[name][key], value, msg=key)


def test_a_classifier_read_once_does_not_follow_training() -> None:
    layer = nn.Linear(4, K)
    classifier = read_classifier(layer)
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(classifier.weight, before)


@pytest.mark.parametrize("make_head", [FixedETFHead, NearestETFHead])
def test_a_head_that_normalizes_is_measured_at_what_it_sees(
    make_head: Callable[..., CodeHead],
) -> None:
    torch.manual_seed(0)
    head = make_head(8, K, normalize=True, scale=3.0)
    model = nn.Sequential(nn.Linear(4, 8), head)
    inputs, targets = torch.randn(60, 4), torch.arange(60) % K
    with torch.no_grad():
        features = model[0](inputs)
        head(features, targets)
        model.eval()
        with NeuralCollapseProbe(model, K, classifier="1") as probe:
            logits = model(inputs)
            probe.update(targets)
    expected = NeuralCollapse(K, 8, classifier=head)
    expected.update(nn.functional.normalize(features), targets, logits)
    by_weight = NeuralCollapse(K, 8, classifier=head)
    by_weight.update(features, targets)
    for key, value in expected.compute().items():
        torch.testing.assert_close(probe.compute()["1"][key], value, rtol=1e-5, atol=1e-6, msg=key)
        torch.testing.assert_close(by_weight.compute()[key], value, rtol=1e-5, atol=1e-6, msg=key)
    plain = NeuralCollapse(K, 8)
    plain.update(features, targets)
    assert plain.compute()["nc1_trace"] != pytest.approx(expected.compute()["nc1_trace"].item(), rel=0.01)


class Twice(nn.Module):
    """One activation in two places, as in a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Linear(4, 4), nn.Linear(4, K), nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.act(self.second(self.act(self.first(inputs))))
        return logits


def test_more_than_one_run_before_an_update_is_refused() -> None:
    model, (images, targets) = make_model(), make_batches()[0]
    with NeuralCollapseProbe(model, K, layers=["0"]) as probe:
        model(images)
        model(images)
        with pytest.raises(EtfLayersError, match="the model ran 2 times since the last update"):
            probe.update(targets)
        model[0](images)  # not by way of the model
        model[0](images)
        with pytest.raises(EtfLayersError, match="layer '0' ran 2 times"):
            probe.update(targets)
        assert not probe.metrics
        model(images)
        probe.discard()
        model(images)
        probe.update(targets)
        assert probe.metrics["0"].moments.counts.sum() == len(targets)
    twice = Twice()
    with NeuralCollapseProbe(twice, K, layers=["act"]) as probe:
        twice(torch.randn(6, 4))
        with pytest.raises(EtfLayersError, match="layer 'act' ran 2 times"):
            probe.update(torch.arange(6) % K)


def test_layers_that_are_run_again_for_the_backward_pass() -> None:
    first, last = nn.Linear(4, 8), nn.Linear(8, K)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = first, last

        def forward(self, inputs: Tensor) -> Tensor:
            logits: Tensor = last(checkpoint(first, inputs, use_reentrant=False))
            return logits

    model, targets = Checkpointed(), torch.arange(12) % K
    with NeuralCollapseProbe(model, K, layers=["first"], classifier="last") as probe:
        for _ in range(3):
            loss = model(torch.randn(12, 4)).square().sum()
            probe.update(targets)
            loss.backward()
    assert probe.metrics["first"].moments.counts.sum() == 36


def test_a_model_that_was_compiled_and_run_before() -> None:
    model, (images, targets) = make_model(), make_batches()[0]
    compiled = torch.compile(model, backend="eager")
    compiled(images)
    expected = NeuralCollapse(K, 6)
    with torch.no_grad():
        expected.update(model[0](images).mean((2, 3)), targets)
    for _ in range(2):
        with NeuralCollapseProbe(model, K, layers=["0"]) as probe:
            compiled(images)
            probe.update(targets)
        torch.testing.assert_close(probe.compute()["0"]["nc1_trace"], expected.compute()["nc1_trace"])
    probe = NeuralCollapseProbe(model, K, layers=["0"])
    compiled(images)
    with pytest.raises(EtfLayersError, match=r"within `with NeuralCollapseProbe"):
        probe.update(targets)
    probe.remove()


def test_the_probe_and_the_callback_say_at_once_that_torchmetrics_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(MissingDependencyError, match=r"etflayers\[metrics\]"):
        NeuralCollapseProbe(make_model(), K, layers=["0"])
    with pytest.raises(MissingDependencyError, match=r"etflayers\[metrics\]"):
        NeuralCollapseCallback(K, classifier="net.4")


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
    unflat = nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (2, 2, 2)))
    with NeuralCollapseProbe(unflat, K, layers=["0", "1"], pool=lambda x: x) as probe:
        unflat(torch.randn(3, 4))
        with pytest.raises(InvalidArgumentError, match=r"pool must return \(B, d\)"):
            probe.update(torch.arange(3))
        assert not probe.metrics  # of no layer
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


def test_the_callback_leaves_an_epoch_out_that_lacks_a_class() -> None:
    module, trainer = Module(), SimpleNamespace(sanity_checking=False)
    callback = NeuralCollapseCallback(K, layers=["net.0"], classifier="net.4")
    callback.on_validation_epoch_start(trainer, module)
    images, targets = make_batches()[0]
    module(images)
    callback.on_validation_batch_end(trainer, module, None, (images, targets % 2), 0)
    with pytest.warns(UserWarning, match=r"'net\.\d' in this epoch: 1 of 3 classes") as caught:
        callback.on_validation_epoch_end(trainer, module)
    assert len(caught) == 2
    assert not module.logged
    validate(callback, module)
    assert len(module.logged) == 2
    callback.on_validation_epoch_start(trainer, module)
    callback.on_exception(trainer, module, KeyboardInterrupt())
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
    callback.on_validation_epoch_end(trainer, module)


def test_the_callback_asks_for_targets_it_cannot_find() -> None:
    module = Module()
    callback = NeuralCollapseCallback(K, classifier="net.4")
    callback.on_validation_epoch_start(None, module)
    with pytest.raises(InvalidArgumentError, match="pass targets="):
        callback.on_validation_batch_end(None, module, None, {"image": 1}, 0)
    assert not any(layer._forward_hooks for layer in module.modules())


def test_models_compile_again_after_a_validation_that_was_abandoned() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    module = Module()
    callback = NeuralCollapseCallback(K, classifier="net.4")
    torch.compile(nn.Linear(3, 3), backend=record)(torch.ones(1, 3))
    assert len(graphs) == 1
    callback.on_validation_epoch_start(None, module)
    torch.compile(nn.Linear(4, 3), backend=record)(torch.ones(1, 4))
    assert len(graphs) == 1
    del callback
    gc.collect()
    assert not any(layer._forward_hooks for layer in module.modules())
    torch.compile(nn.Linear(5, 3), backend=record)(torch.ones(1, 5))
    assert len(graphs) == 2
