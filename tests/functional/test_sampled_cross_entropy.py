"""Cross-entropy over a random share of the classes: exact at rate 1, and otherwise right on average."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from etflayers.distill.peak_memory import PeakMemory
from etflayers.errors import InvalidArgumentError
from etflayers.functional import sampled_cross_entropy

IGNORE = -100
K, D = 120, 5


def problem(num_classes: int = K, samples: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with a standard deviation of 1, so that no class makes up the sum alone."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(samples, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(num_classes, D, generator=generator, dtype=torch.float64) / D**0.5
    targets = torch.randint(num_classes // 2, (samples,), generator=generator)
    targets[-1] = targets[0]
    return features.requires_grad_(), weight.requires_grad_(), targets


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_at_rate_1_it_is_the_cross_entropy(reduction: Any, smoothing: float) -> None:
    features, weight, targets = problem()
    targets[2] = IGNORE
    options: Any = {"reduction": reduction, "label_smoothing": smoothing}
    found = sampled_cross_entropy(features, weight, targets, rate=1, scale=3.0, **options)
    expected = F.cross_entropy(3 * features @ weight.mT, targets, **options)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    gradients = [torch.autograd.grad(loss.sum(), (features, weight)) for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_the_sum_of_exponentials_is_right_on_average() -> None:
    """exp(loss + own logit) is that sum, of each sample; its mean over draws has a known standard error."""
    features, weight, targets = (tensor.detach() for tensor in problem())
    logits = features @ weight.mT
    own = logits.gather(1, targets[:, None]).squeeze(1)
    draws, seeds = [], generator()
    for _ in range(1500):
        loss = sampled_cross_entropy(features, weight, targets, rate=0.1, reduction="none", generator=seeds)
        draws.append((loss + own).exp())
    sums = torch.stack(draws)
    error = sums.std(0) / len(sums) ** 0.5
    expected = logits.exp().sum(1)
    assert bool((error < 0.02 * expected).all())
    assert bool(((sums.mean(0) - expected).abs() < 4 * error).all())
    # The logarithm is concave: the loss itself is too small on average.
    losses = (sums.log() - own).mean(0)
    assert bool((losses < F.cross_entropy(logits, targets, reduction="none")).all())


def test_the_smoothed_mean_is_right_on_average() -> None:
    features, weight, targets = (tensor.detach() for tensor in problem())
    own = (features @ weight.mT).gather(1, targets[:, None]).squeeze(1)
    differences = []
    for seed in range(400):
        # The same draw with and without: what is left is the smoothing, own logit less mean of all logits.
        plain, smooth = (
            sampled_cross_entropy(
                features,
                weight,
                targets,
                rate=0.1,
                reduction="none",
                label_smoothing=e,
                generator=generator(seed),
            )
            for e in (0, 1)
        )
        differences.append(smooth - plain)
    found = torch.stack(differences)
    expected = own - (features @ weight.mT).mean(1)
    assert bool(((found.mean(0) - expected).abs() < 4 * found.std(0) / len(found) ** 0.5).all())


@pytest.mark.slow
def test_the_bias_of_the_gradient_shrinks_as_more_classes_are_drawn() -> None:
    features, weight, targets = problem()
    full = torch.autograd.grad(F.cross_entropy(features @ weight.mT, targets), features)[0]
    bias, error = [], []
    for rate in (0.03, 0.2, 0.7):
        seeds = generator()
        found = torch.stack(
            [
                torch.autograd.grad(
                    sampled_cross_entropy(features, weight, targets, rate=rate, generator=seeds), features
                )[0]
                for _ in range(1500)
            ]
        )
        bias.append(float((found.mean(0) - full).norm() / full.norm()))
        error.append(float((found.var(0) / len(found)).sum().sqrt() / full.norm()))
    assert bias[0] > 5 * error[0]  # there is one to see
    assert bias[0] > 2 * bias[1] > 4 * bias[2]
    assert bias[2] < 0.01


def test_without_the_correction_the_bias_would_be_larger() -> None:
    """What the negatives weigh: without it the share of each class of the batch is too large."""
    features, weight, targets = (tensor.detach() for tensor in problem())
    full = F.cross_entropy(features @ weight.mT, targets)
    seeds = generator()
    found = [
        float(sampled_cross_entropy(features, weight, targets, rate=0.1, generator=seeds)) for _ in range(300)
    ]
    plain = []
    for _ in range(300):
        others = torch.randperm(K, generator=seeds)[: K // 10]
        classes = torch.cat((targets, others)).unique()
        logits = features @ weight[classes].mT
        plain.append(float(F.cross_entropy(logits, torch.searchsorted(classes, targets))))
    gaps = [abs(sum(values) / 300 - float(full)) for values in (found, plain)]
    assert gaps[0] < 0.2 * gaps[1]


def test_only_drawn_rows_get_a_gradient_and_those_of_the_batch_always_do() -> None:
    features, weight, targets = problem()
    counts = torch.zeros(K)
    for seed in range(200):
        loss = sampled_cross_entropy(features, weight, targets, rate=0.1, generator=generator(seed))
        (gradient,) = torch.autograd.grad(loss, weight)
        counts += gradient.any(1)
        assert int(gradient.any(1).sum()) == len(targets) + K // 10
    kept = targets.unique()
    assert bool((counts[kept] == 200).all())
    others = counts[torch.ones(K, dtype=torch.bool).index_fill(0, kept, False)]
    share = (len(targets) + K // 10 - len(kept)) / (K - len(kept))
    # Each as often as any other: chi-squared of so many counts, whose standard deviation is known.
    deviations = (others - 200 * share) / (200 * share * (1 - share)) ** 0.5
    assert float(deviations.square().mean()) == pytest.approx(1, abs=0.6)
    assert float(deviations.abs().max()) < 4.5


def test_a_generator_repeats_the_draw() -> None:
    features, weight, targets = problem()
    first, again, other = (
        sampled_cross_entropy(features, weight, targets, rate=0.1, generator=generator(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(5)
    one = sampled_cross_entropy(features, weight, targets, rate=0.1)
    torch.manual_seed(5)
    assert torch.equal(one, sampled_cross_entropy(features, weight, targets, rate=0.1))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_derivatives_are_those_of_finite_differences(smoothing: float) -> None:
    features, weight, targets = problem(num_classes=20, samples=3)

    def loss(f: Tensor, w: Tensor) -> Tensor:
        return sampled_cross_entropy(
            f, w, targets, rate=0.3, scale=2.0, label_smoothing=smoothing, generator=generator()
        )

    assert torch.autograd.gradcheck(loss, (features, weight), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, (features, weight))


def test_ignored_samples_count_for_nothing() -> None:
    features, weight, targets = problem()
    targets[3:] = IGNORE
    features = features.detach()
    features[4] = torch.nan
    features.requires_grad_()
    for e in (0.0, 0.4):
        losses = sampled_cross_entropy(
            features, weight, targets, rate=0.2, label_smoothing=e, reduction="none", generator=generator()
        )
        assert not losses[3:].any()
        mean = sampled_cross_entropy(
            features, weight, targets, rate=0.2, label_smoothing=e, generator=generator()
        )
        torch.testing.assert_close(mean, losses[:3].mean())
        (gradient,) = torch.autograd.grad(mean, features)
        assert not gradient[3:].any()
        assert bool(gradient[:3].any(1).all())
    # A class may be the one to ignore, and then is one of the others.
    targets = torch.tensor([3, 7, 3])
    loss = sampled_cross_entropy(features[:3], weight, targets, rate=1.0, ignore_index=3)
    torch.testing.assert_close(loss, F.cross_entropy(features[1:2] @ weight.mT, targets[1:2]))
    nothing = sampled_cross_entropy(features[:3], weight, torch.full((3,), IGNORE), rate=0.2)
    assert nothing == 0
    assert not torch.autograd.grad(nothing, weight)[0].any()


def test_leading_dimensions_and_a_batch_with_every_class() -> None:
    features, weight, targets = problem()
    options: Any = {"rate": 0.2, "reduction": "none"}
    flat = sampled_cross_entropy(features, weight, targets, generator=generator(), **options)
    cube = sampled_cross_entropy(
        features.view(2, 2, 2, D), weight, targets.view(2, 2, 2), generator=generator(), **options
    )
    torch.testing.assert_close(cube, flat.view(2, 2, 2))
    few = weight[:4]
    found = sampled_cross_entropy(features, few, targets % 4, rate=0.01)
    torch.testing.assert_close(found, F.cross_entropy(features @ few.mT, targets % 4))
    empty = sampled_cross_entropy(features[:0], weight, targets[:0], rate=0.2)
    assert empty == 0


def test_half_precision_and_autocast_give_float32_losses() -> None:
    features, weight, targets = (tensor.detach() for tensor in problem())
    exact = sampled_cross_entropy(features, weight, targets, rate=0.1, generator=generator())
    half = sampled_cross_entropy(
        features.bfloat16(), weight.bfloat16(), targets, rate=0.1, generator=generator()
    )
    with torch.autocast("cpu", torch.bfloat16):
        mixed = sampled_cross_entropy(
            features.float(), weight.float(), targets, rate=0.1, generator=generator()
        )
    for loss in (half, mixed):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), exact, rtol=0, atol=0.03)


def test_compiles_as_one_graph() -> None:
    features, weight, targets = problem()
    compiled = torch.compile(sampled_cross_entropy, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    found = compiled(features, weight, targets, rate=0.1)
    torch.manual_seed(3)
    torch.testing.assert_close(found, sampled_cross_entropy(features, weight, targets, rate=0.1))


def test_memory_is_about_the_rate_times_that_of_all_classes() -> None:
    """64 features and 66,048 classes; what both have, the weight's gradient, is a small part of it."""
    features, weight = torch.randn(64, 2, requires_grad=True), torch.randn(66_048, 2, requires_grad=True)
    targets = torch.arange(64)
    peaks = []
    for loss in (
        lambda: sampled_cross_entropy(features, weight, targets, rate=0.1),
        lambda: F.cross_entropy(features @ weight.mT, targets),
    ):
        with PeakMemory() as memory:
            torch.autograd.grad(loss(), (features, weight))
        peaks.append(memory.peak)
    assert 0.1 < peaks[0] / peaks[1] < 0.15


@pytest.mark.parametrize("rate", [0, -0.1, 1.01, float("nan"), "half", True])
def test_a_bad_rate_is_refused(rate: Any) -> None:
    features, weight, targets = problem()
    with pytest.raises(InvalidArgumentError, match="rate must be"):
        sampled_cross_entropy(features, weight, targets, rate=rate)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(K, D + 1)}, r"features and weight must have shapes .* got \(8, 5\)"),
        ({"targets": torch.zeros(7).long()}, "targets must have the leading shape"),
        ({"targets": torch.full((8,), K)}, r"targets must be class indices in \[0, 120\)"),
        ({"targets": torch.full((8, K), 1 / K)}, "of soft targets every class"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"reduction": "median"}, "reduction must be"),
        ({"features": torch.ones(8, D).long()}, "features must have a real floating-point dtype"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    features, weight, targets = problem()
    given: dict[str, Any] = {"features": features, "weight": weight, "targets": targets, "rate": 0.1}
    with pytest.raises(InvalidArgumentError, match=message):
        sampled_cross_entropy(**(given | change))
