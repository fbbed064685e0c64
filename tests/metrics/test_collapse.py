"""The torchmetrics shells: forward, reset, copies, collections, and what they refuse."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection, MetricTracker
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from etflayers.errors import InvalidArgumentError, NonFiniteError
from etflayers.functional import nearest_etf
from etflayers.metrics import (
    CosineMargins,
    NeuralCollapse,
    center_disagreement,
    class_statistics,
    cosine_margins,
    equinorm,
    frame_distance,
    read_classifier,
)
from etflayers.nn import FixedETFHead, NearestETFHead
from tests.metrics.definitions import Data, direct_margins, ideal_data, make_data

BATCH = 25


def batches(data: Data) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(zip(data.features.split(BATCH), data.targets.split(BATCH), strict=True))


def fed(metric: NeuralCollapse, data: Data) -> NeuralCollapse:
    for features, targets in batches(data):
        metric.update(features, targets)
    return metric


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], rtol: float = 0.0) -> None:
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=rtol, atol=rtol, msg=name)


def test_forward_measures_the_batch_and_accumulates() -> None:
    data = make_data("offset")
    layer = nn.Linear(7, 5, dtype=torch.float64)
    metric = NeuralCollapse(5, 7, classifier=layer)
    for features, targets in batches(data):
        value = metric(features, targets)
        assert_equal(
            value,
            fed(NeuralCollapse(5, 7, classifier=layer), Data(features, targets, *data_rest(data))).compute(),
        )
    assert_equal(metric.compute(), fed(NeuralCollapse(5, 7, classifier=layer), data).compute(), rtol=1e-9)


def data_rest(data: Data) -> tuple[torch.Tensor, torch.Tensor]:
    return data.weight, data.bias


def test_reset_forgets_everything() -> None:
    layer = nn.Linear(7, 5, dtype=torch.float64)
    metric = fed(NeuralCollapse(5, 7, classifier=layer), make_data("wide"))
    metric.reset()
    data = make_data("random")
    assert_equal(fed(metric, data).compute(), fed(NeuralCollapse(5, 7, classifier=layer), data).compute())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda metric: pickle.loads(pickle.dumps(metric))])
def test_copies_go_on_by_themselves(duplicate: Callable[[NeuralCollapse], NeuralCollapse]) -> None:
    data = make_data("random")
    metric = fed(NeuralCollapse(5, 7), data)
    twin = duplicate(metric)
    assert_equal(twin.compute(), metric.compute())
    twin.update(*batches(make_data("wide"))[0])
    assert twin.compute()["nc1_trace"] != metric.compute()["nc1_trace"]


def test_the_classifier_is_no_part_of_the_metric() -> None:
    metric = NeuralCollapse(5, 7, classifier=nn.Linear(7, 5))
    assert not list(metric.parameters())
    assert not metric.state_dict()


def test_copies_measure_the_same_classifier() -> None:
    data = make_data("random", torch.float32)
    layer = nn.Linear(7, 5)
    metric = NeuralCollapse(5, 7, classifier=layer)
    clone, tracker = metric.clone(), MetricTracker(metric, maximize=False)
    tracker.increment()
    with torch.no_grad():
        layer.weight.copy_(data.weight)  # training goes on after the copy
    for duplicate in (metric, clone, tracker):
        fed(duplicate, data)  # type: ignore[arg-type]
    assert metric.compute().keys() >= {"nc3_distance", "accuracy"}
    assert_equal(clone.compute(), metric.compute())
    assert_equal(tracker.compute(), metric.compute())
    assert_equal(pickle.loads(pickle.dumps(metric)).compute(), metric.compute())


def test_a_copied_model_measures_its_own_classifier() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(7, 5)})
    model["metric"] = NeuralCollapse(5, 7, classifier=model["layer"])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            twin["layer"].weight.zero_()
        with pytest.raises(InvalidArgumentError, match="must not hold a zero row"):
            fed(twin["metric"], make_data("random", torch.float32)).compute()


def test_state_dict_carries_the_moments() -> None:
    data = make_data("random")
    metric = NeuralCollapse(5, 7)
    metric.persistent(True)
    fed(metric, data)
    other = NeuralCollapse(5, 7)
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    other.update(*batches(data)[0])
    metric.update(*batches(data)[0])
    assert_equal(other.compute(), metric.compute())


CASTS: list[Callable[[nn.Module], object]] = [
    nn.Module.half,
    nn.Module.bfloat16,
    nn.Module.float,
    lambda module: module.to(torch.float16),
    lambda module: module.to("cpu", torch.bfloat16),
    lambda module: module["collapse"].set_dtype(torch.float16),  # type: ignore[index]
]


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_of_the_module_around_it_leaves_the_state_as_it_is(
    cast: Callable[[nn.Module], object],
) -> None:
    data = make_data("offset", torch.float32)
    layer = nn.Linear(7, 5)
    first, second = [(f, t) for f, t in batches(data) if len(t.unique()) == 5][:2]
    module = nn.ModuleDict({"collapse": NeuralCollapse(5, 7, classifier=layer), "margins": CosineMargins()})
    plain = NeuralCollapse(5, 7, classifier=layer), CosineMargins()
    for collapse, margins in ((module["collapse"], module["margins"]), plain):
        collapse.update(*first)
        margins.update(*first, data.weight)
        if collapse is not plain[0]:
            cast(module)
        collapse.update(*second)
        margins.update(*second, data.weight)
        collapse.reset()
        for batch in (first, second):
            collapse.update(*batch)
    assert module["collapse"].packed.dtype == torch.float64
    assert_equal(module["collapse"].compute(), plain[0].compute())
    assert torch.equal(module["margins"].compute(), plain[1].compute())


def test_a_batch_that_is_refused_leaves_the_accumulated_state() -> None:
    data = make_data("random")
    layer = nn.Linear(7, 5, dtype=torch.float64)
    metric = fed(NeuralCollapse(5, 7, classifier=layer), data)
    before = metric.compute()
    lacking = data.targets < 4
    with pytest.raises(InvalidArgumentError, match="1 of 5 classes have no sample"):
        metric(data.features[lacking], data.targets[lacking])
    assert_equal(metric.compute(), before)
    with pytest.raises(NonFiniteError):
        metric(data.features * torch.nan, data.targets)
    assert_equal(metric.compute(), before)
    metric(*batches(data)[0])
    assert metric.samples == len(data.targets) + BATCH
    margins = CosineMargins()
    margins(data.features, data.targets, data.weight)
    with pytest.raises(NonFiniteError):
        margins(data.features * torch.nan, data.targets, data.weight)
    assert len(margins.compute()) == len(data.targets)


def test_ranks_keep_their_own_state_after_an_error_in_that_of_all() -> None:
    data = make_data("random")
    lacking = data.targets < 4
    two = {"dist_sync_fn": lambda state, group: [state, state], "distributed_available_fn": lambda: True}
    metric = NeuralCollapse(5, 7, **two)  # type: ignore[arg-type]
    metric.update(data.features[lacking], data.targets[lacking])
    for measure in (metric.compute, metric.statistics):
        with pytest.raises(InvalidArgumentError, match="1 of 5 classes"):
            measure()
        assert metric.moments.counts.sum() == lacking.sum()
    metric.update(data.features[~lacking], data.targets[~lacking])
    assert metric.statistics().counts.sum() == 2 * len(data.targets)


def test_a_collection_does_not_take_one_metric_for_another() -> None:
    data = make_data("random")
    layers = [nn.Linear(7, 5, dtype=torch.float64) for _ in range(2)]
    members: dict[str, Callable[[], NeuralCollapse]] = {
        "all": lambda: NeuralCollapse(5, 7),
        "some": lambda: NeuralCollapse(5, 7, ignore_index=4, unseen="exclude"),
        "first": lambda: NeuralCollapse(5, 7, classifier=layers[0]),
        "second": lambda: NeuralCollapse(5, 7, classifier=layers[1]),
    }
    collection = MetricCollection({name: make() for name, make in members.items()})
    # After an empty batch, or one without class 4, they look alike.
    order = data.targets.argsort()
    parts = [
        (data.features[:0], data.targets[:0]),
        (data.features[order[:40]], data.targets[order[:40]]),
        (data.features[order[40:]], data.targets[order[40:]]),
    ]
    alone = {name: make() for name, make in members.items()}
    for features, targets in parts:
        collection.update(features, targets)
        for metric in alone.values():
            metric.update(features, targets)
    measured = collection.compute()
    for name, metric in alone.items():
        for key, value in metric.compute().items():
            assert torch.equal(measured[f"{name}_{key}"], value), (name, key)
    margins = MetricCollection({"all": CosineMargins(), "some": CosineMargins(ignore_index=4)})
    for features, targets in parts[1:]:
        margins.update(features, targets, data.weight)
    assert len(margins["all"].compute()) - len(margins["some"].compute()) == (data.targets == 4).sum()


def test_merge_state() -> None:
    data = make_data("offset")
    half = len(data.targets) // 2
    first = fed(NeuralCollapse(5, 7), Data(data.features[:half], data.targets[:half], *data_rest(data)))
    second = fed(NeuralCollapse(5, 7), Data(data.features[half:], data.targets[half:], *data_rest(data)))
    first.merge_state(second)
    assert_equal(first.compute(), fed(NeuralCollapse(5, 7), data).compute(), rtol=1e-9)


def test_in_a_collection_with_metrics_of_torchmetrics() -> None:
    data = make_data("random")
    layer = nn.Linear(7, 5, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(3 * data.weight)
    collection = MetricCollection(
        {
            "collapse": NeuralCollapse(5, 7, classifier=layer),
            "other": NeuralCollapse(5, 7, scatter="none"),
            "acc": MulticlassAccuracy(5, average="micro"),
            "ece": MulticlassCalibrationError(5, n_bins=15, norm="l1"),
        }
    )
    with torch.no_grad():
        for features, targets in batches(data):
            logits = layer(features)
            collection.update(features=features, targets=targets, logits=logits, preds=logits, target=targets)
    result = collection.compute()
    assert result["collapse_accuracy"].item() == pytest.approx(result["acc"].item(), rel=1e-6)
    assert result["collapse_calibration_error"].item() == pytest.approx(result["ece"].item(), rel=1e-5)


def test_logits_given_win_over_the_linear_layer() -> None:
    data = ideal_data()
    metric = NeuralCollapse(5, 7, classifier=nn.Linear(7, 5))
    logits = nn.functional.one_hot((data.targets + 1) % 5, 5).double()
    metric.update(data.features, data.targets, logits)
    assert metric.compute()["accuracy"].item() == 0.0


def test_heads_are_read_with_scale_and_center() -> None:
    data = make_data("random", torch.float32)
    head = NearestETFHead(7, 5, scale=3.0)
    head(data.features, data.targets)
    head.eval()
    torch.testing.assert_close(read_classifier(head).logits(data.features), head(data.features))
    fixed = FixedETFHead(7, 5, scale=2.0, normalize=True)
    unit = nn.functional.normalize(data.features)
    torch.testing.assert_close(read_classifier(fixed).logits(unit), fixed(data.features))
    measured = fed(NeuralCollapse(5, 7, classifier=head), data).compute()
    assert measured["nc2_gram_weights"].item() < 1e-5
    assert measured["nc2_etf_distance_weights"].item() < 1e-5


def test_excluded_classes_leave_the_classifier_too() -> None:
    data = make_data("random")
    wide = nn.Linear(7, 8, dtype=torch.float64)
    kept = torch.tensor([0, 2, 3, 6, 7])
    small = nn.Linear(7, 5, dtype=torch.float64)
    with torch.no_grad():
        small.weight.copy_(wide.weight[kept])
        small.bias.copy_(wide.bias[kept])
    metric = NeuralCollapse(8, 7, classifier=wide, unseen="exclude")
    metric.update(data.features, kept[data.targets])
    expected = fed(NeuralCollapse(5, 7, classifier=small), data).compute()
    measured = metric.compute()
    geometry = {name for name in measured if name.startswith(("nc", "bias"))}
    assert_equal({n: measured[n] for n in geometry}, {n: expected[n] for n in geometry}, rtol=1e-9)


def test_ignored_samples_are_left_out_everywhere() -> None:
    data = make_data("random")
    layer = nn.Linear(7, 5, dtype=torch.float64)
    centers = class_statistics(data.features, data.targets, 5)
    metric = NeuralCollapse(5, 7, classifier=layer, centers=centers)
    extra = torch.full((4, 7), 100.0, dtype=torch.float64)
    metric.update(torch.cat((extra, data.features)), torch.cat((torch.full((4,), -100), data.targets)))
    expected = NeuralCollapse(5, 7, classifier=layer, centers=centers)
    expected.update(data.features, data.targets)
    # To rounding: a product with four rows of zeros more may be summed in another order.
    assert_equal(metric.compute(), expected.compute(), rtol=1e-12)


def test_drift_of_the_nearest_frame() -> None:
    data = make_data("random")
    metric = fed(NeuralCollapse(5, 7), data)
    frame = metric.nearest_frame()
    torch.testing.assert_close(frame, nearest_etf(metric.statistics().means))
    turned = Data(data.features.roll(1, dims=1), data.targets, *data_rest(data))
    other = fed(NeuralCollapse(5, 7), turned).nearest_frame()
    torch.testing.assert_close(other, frame.roll(1, dims=1))
    expected = (other - frame).square().sum().div(5).sqrt()
    torch.testing.assert_close(frame_distance(frame, other), expected)


@pytest.mark.parametrize("centered", [False, True])
def test_the_curve_of_margins(centered: bool) -> None:
    data = make_data("imbalanced")
    center = data.features.mean(0) if centered else None
    metric = CosineMargins(center=center)
    for features, targets in batches(data):
        metric.update(features, targets, data.weight)
    features, targets = data.arrays
    weight = data.weight.numpy()
    if centered:
        features, weight = features - features.mean(0), weight - weight.mean(0)
    expected = torch.from_numpy(direct_margins(features, targets, weight)).sort().values
    torch.testing.assert_close(metric.compute(), expected.float(), rtol=0, atol=1e-7)
    with pytest.raises(InvalidArgumentError, match=r"center must have shape"):
        cosine_margins(data.features, data.targets, data.weight, center=torch.zeros(3))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_classes": 1}, "num_classes must be at least 2"),
        ({"in_features": 0}, "in_features must be at least 1"),
        ({"global_mean": "both"}, "global_mean must be"),
        ({"scatter": "full"}, "scatter must be"),
        ({"unseen": "drop"}, "unseen must be"),
        ({"calibration_bins": 0}, "calibration_bins must be"),
        ({"classifier": nn.ReLU()}, "classifier must have a weight"),
        ({"classifier": nn.Linear(4, 5)}, "classifier must have a weight of shape"),
        ({"centers": class_statistics(torch.eye(2), torch.arange(2), 2)}, "centers need a classifier"),
        ({"centers": torch.eye(2), "classifier": nn.Linear(2, 2)}, "centers must be ClassStatistics"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidArgumentError, match=match):
        NeuralCollapse(**{"num_classes": 5, "in_features": 7, **options})


def test_bad_batches_are_refused_and_change_nothing() -> None:
    data = make_data("random", torch.float32)
    layer = nn.Linear(7, 5)
    metric = NeuralCollapse(5, 7, classifier=layer)
    fed(metric, data)
    before = metric.compute()
    with pytest.raises(InvalidArgumentError, match="logits must have shape"):
        metric.update(data.features, data.targets, torch.zeros(3, 5))
    with pytest.raises(InvalidArgumentError, match="features must have shape"):
        metric.update(data.features[:, :3], data.targets)
    with pytest.raises(InvalidArgumentError, match="targets must be class indices"):
        metric.update(data.features, data.targets + 1)
    with pytest.raises(NonFiniteError, match="features must be finite"):
        metric.update(data.features * torch.nan, data.targets)
    metric._computed = None
    assert_equal(metric.compute(), before)
    centers = class_statistics(data.features, data.targets % 4, 5, unseen="exclude")
    metric = NeuralCollapse(5, 7, classifier=layer, centers=centers)
    with pytest.raises(InvalidArgumentError, match="centers must hold every class"):
        metric.update(data.features, data.targets)
    assert not metric.moments.counts.any()


@pytest.mark.parametrize("offset", [1e4, 1e6])
def test_a_large_common_mean_takes_no_digits_of_the_margins(offset: float) -> None:
    # Multiples of a float32 number there, so that float32 features are exact data about a float64 mean.
    step = 1.0 if offset == 1e6 else 2.0**-6
    generator = torch.Generator().manual_seed(0)
    features = offset + step * torch.randint(-9, 10, (40, 7), generator=generator).float()
    targets = torch.arange(40) % 5
    weight = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    center = features.double().mean(0)
    metric = CosineMargins(center=center)
    metric.update(features, targets, weight)
    rows = features.double() - center, targets, weight - weight.mean(0)
    expected = torch.from_numpy(direct_margins(*(part.numpy() for part in rows)))
    measured = cosine_margins(features, targets, weight, center=center)
    torch.testing.assert_close(measured.double(), expected, rtol=0, atol=3e-7)
    torch.testing.assert_close(metric.compute().double(), expected.sort().values, rtol=0, atol=3e-7)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_decisions_that_do_not_exist_are_refused(bad: float) -> None:
    data = make_data("random", torch.float32)
    logits = torch.randn(len(data.targets), 5)
    logits[3, 2] = bad
    metric = NeuralCollapse(5, 7, classifier=nn.Linear(7, 5))
    with pytest.raises(NonFiniteError, match="logits must not hold NaN"):
        metric.update(data.features, data.targets, logits)
    assert not metric.samples
    with pytest.raises(NonFiniteError, match="logits must not hold NaN"):
        center_disagreement(data.features, logits, data.weight)
    logits[3, 2] = -torch.inf  # a class that is excluded
    metric.update(data.features, data.targets, logits)
    assert metric.samples == len(data.targets)
    features = data.features.clone()
    features[3, 2] = bad
    with pytest.raises(NonFiniteError, match="features must be finite"):
        center_disagreement(features, logits, data.weight)
    with pytest.raises(NonFiniteError, match="features must be finite"):
        CosineMargins().update(features, data.targets, data.weight)
    with pytest.raises(NonFiniteError, match="rows must be finite"):
        equinorm(features)


DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_dtype_of_the_targets_does_not_matter(dtype: torch.dtype) -> None:
    num_classes, ignored = (300, 7) if dtype != torch.int8 else (120, 7)
    present = torch.arange(num_classes).clamp(max=torch.iinfo(dtype).max).unique()
    targets = present.repeat(2)
    features = torch.randn(len(targets), 4)
    layer = nn.Linear(4, num_classes)
    for reference in (torch.int64, dtype):
        metric = NeuralCollapse(
            num_classes, 4, classifier=layer, ignore_index=ignored, scatter="none", unseen="exclude"
        )
        margins = CosineMargins(ignore_index=ignored)
        metric.update(features, targets.to(reference))
        margins.update(features, targets.to(reference), layer.weight)
        measured = {**metric.compute(), "margins": margins.compute()}
        counts = metric.moments.counts.clone()
        if reference == torch.int64:
            expected, right = measured, counts
    assert not counts[ignored]
    assert torch.equal(counts, right)
    assert_equal(measured, expected)


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        ([0, 1, 2], r"got list: pass torch.as_tensor\(targets\)"),
        (np.arange(3), r"got ndarray: pass torch.as_tensor\(targets\)"),
        (torch.tensor([True, False, True]), r"convert them with .long\(\)"),
        (torch.eye(3).long(), r"one-hot targets with .argmax\(-1\)"),
    ],
)
def test_targets_of_another_kind_are_told_what_to_become(targets: Any, match: str) -> None:
    features, layer = torch.randn(3, 4), nn.Linear(4, 3)
    for update in (
        NeuralCollapse(3, 4).update,
        NeuralCollapse(3, 4, classifier=layer).update,
        lambda f, t: CosineMargins().update(f, t, layer.weight),
    ):
        with pytest.raises(InvalidArgumentError, match=match):
            update(features, targets)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("in_features", [4, 5, 7])
def test_an_update_with_a_canonical_head_makes_no_matrix(
    normalize: bool, in_features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_data("random", torch.float32, d=in_features)
    head = FixedETFHead(in_features, 5, rotation="canonical", scale=3.0, normalize=normalize)
    layer = read_classifier(head)
    linear = nn.Linear(in_features, 5, bias=False)
    with torch.no_grad():
        linear.weight.copy_(layer.weight)
    inputs = nn.functional.normalize(data.features) if normalize else data.features
    expected = fed(
        NeuralCollapse(5, in_features, classifier=linear), Data(inputs, *list(vars(data).values())[1:])
    )
    metric = NeuralCollapse(5, in_features, classifier=head)
    with monkeypatch.context() as patch:
        patch.setattr("etflayers.nn.fixed.simplex_etf", None)
        fed(metric, data)
    assert_equal(metric.compute(), expected.compute(), rtol=2e-6)


def test_of_many_classes_an_update_touches_only_those_of_the_batch() -> None:
    # More classes than samples takes another path than fewer; parts of a batch take the other one.
    data = make_data("imbalanced", torch.float32, k=60, d=7)
    for size in (20, 59, 300):
        metric, whole = NeuralCollapse(60, 7), NeuralCollapse(60, 7)
        for features, targets in zip(data.features.split(size), data.targets.split(size), strict=True):
            metric.update(features, targets)
        whole.update(data.features, data.targets)
        assert_equal(metric.compute(), whole.compute(), rtol=1e-6)
