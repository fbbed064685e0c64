"""Images learned by regression on features of a pool: gradients by differences, the pool's life, resume."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from distillation.inducing import Inducing
from distillation.kernel import learn_kernel_set
from distillation.kernel_settings import KernelSettings
from distillation.pooled import Pooled
from etflayers.distill import centered_one_hot
from etflayers.errors import InvalidArgumentError, NonFiniteError
from lab.data import ImageData, load_inputs


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_inputs(KernelSettings(data="digits"))


@pytest.fixture
def in_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def small(**options: Any) -> KernelSettings:
    given = {"data": "digits", "kernel": "features", "feature_network": "mlp", "feature_pool": 3}
    return KernelSettings(**{**given, "outer_batch": 60, "outer_steps": 8, **options})


def made(settings: KernelSettings, data: ImageData, size: int = 2) -> Pooled:
    return Pooled(settings, size, 0, data)


@pytest.mark.parametrize("network", ["mlp", "convnet"])
def test_gradients_are_those_of_regression_on_the_features(
    network: Any, digits: ImageData, in_float64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of images and labels, against differences of the loss of ridge regression in the space of features."""
    train = replace(digits.train, images=digits.train.images.double())
    settings = small(feature_network=network, feature_width=6, ridge=1e-2, bias_variance=0.0, outer_batch=20)
    run = made(settings, replace(digits, train=train), size=1)
    images, labels = (value.detach().clone() for value in (run.distilled.inputs, run.distilled.labels))
    found: dict[str, Tensor] = {}
    batches: list[tuple[Tensor, Tensor]] = []
    drawn_batch = run.batch

    def batch() -> tuple[Tensor, Tensor]:
        batches.append(drawn_batch())
        return batches[-1]

    def note(*_: Any) -> None:
        found.update(images=run.distilled.inputs.grad.clone(), labels=run.distilled.labels.grad.clone())

    monkeypatch.setattr(run, "batch", batch)
    monkeypatch.setattr(run.networks, "train", note)
    loss = run.update()["loss"]
    real, classes = batches[0]

    @torch.no_grad()
    def by_weights(images: Tensor, labels: Tensor) -> Tensor:
        """The primal solution: W = (phi'phi + r I)^-1 phi'y, r = ridge tr(phi phi')/n."""
        phi = run.networks.body(images)
        system = phi.mT @ phi + 1e-2 * phi.square().sum() / len(phi) * torch.eye(phi.shape[1])
        weight = torch.linalg.solve(system, phi.mT @ labels)
        return (run.networks.body(real) @ weight - centered_one_hot(classes, 10)).square().sum(-1).mean()

    assert loss == pytest.approx(by_weights(images, labels).item(), rel=1e-9)
    generator, size = torch.Generator().manual_seed(1), 1e-6
    for name, value in {"images": images, "labels": labels}.items():
        for _ in range(3):
            direction = torch.randn(value.shape, generator=generator)
            sides = [
                by_weights(**{**{"images": images, "labels": labels}, name: value + sign * size * direction})
                for sign in (1, -1)
            ]
            slope = float(sides[0] - sides[1]) / (2 * size)
            assert float((found[name] * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_no_gradient_reaches_a_network_and_its_training_none_the_set(digits: ImageData) -> None:
    run = made(small(), digits)
    before = {name: value.clone() for name, value in run.networks.drawn.state_dict().items()}
    age = run.networks.draw(run.generator)
    state = deepcopy(run.networks.pool.states[run.networks.pool.drawn or 0])
    Inducing.update(run)
    assert age == run.networks.pool.ages[run.networks.pool.drawn or 0]
    for name, value in run.networks.drawn.named_parameters():
        assert not value.requires_grad
        assert value.grad is None
        assert torch.equal(value, state.params[name])  # the step on images has left it as it was drawn
        assert "bias" in name or not torch.equal(value, before[name])
    gradients = [value.grad.clone() for value in run.distilled.parameters() if value.grad is not None]
    images = run.distilled.inputs.detach().clone()
    run.networks.train(run.distilled.inputs, run.distilled.labels, 2)
    after = [value.grad for value in run.distilled.parameters() if value.grad is not None]
    assert all(torch.equal(*pair) for pair in zip(gradients, after, strict=True))
    assert torch.equal(images, run.distilled.inputs)


def test_drawn_network_trains_on_the_updated_set_and_is_put_back(digits: ImageData) -> None:
    """Two visits of one network are an unbroken training by Adam on the set as each visit finds it."""
    run = made(small(feature_pool=1, feature_steps=2, feature_rate=1e-2), digits)
    replay = deepcopy(run.networks.trainee)
    first = run.networks.pool.states[0]
    replay.load_state_dict({**first.params, **first.buffers})
    adam = torch.optim.Adam(replay.parameters(), 1e-2)
    for _ in range(2):
        before = run.distilled.inputs.detach().clone()
        run.advance()
        run.step += 1
        assert not torch.equal(before, run.distilled.inputs)
        for _ in range(2):
            adam.zero_grad()
            errors = replay(run.distilled.inputs.detach()) - run.distilled.labels.detach()
            errors.square().sum(-1).mean().backward()
            adam.step()
    assert run.networks.pool.ages == [4]
    for name, value in replay.named_parameters():
        torch.testing.assert_close(run.networks.pool.states[0].params[name], value.detach())


def test_networks_age_and_are_replaced_by_new_ones(digits: ImageData) -> None:
    run = made(small(feature_pool=2, feature_max_age=4, feature_steps=2, outer_steps=12), digits)
    run.finish()
    noted = [row["age"] for row in run.history]
    assert max(noted) <= 4 - 1  # one that has come to its age is replaced before it is used
    assert noted.count(0) > 2  # more than were there in the beginning: some are new ones
    for averages, age in zip(run.networks.averages, run.networks.pool.ages, strict=True):
        if (
            averages
        ):  # a new network has a new Adam; only the second began at an age, 2, that it had not lived
            steps = {int(state["step"]) for state in averages["state"].values()}
            assert steps <= {age, age - 2}


def test_learned_set_is_better_than_its_start_for_unseen_networks(digits: ImageData) -> None:
    settings = small(outer_steps=40, outer_batch=200, feature_pool=5, feature_max_age=20)
    run = made(settings, digits)
    start = (run.distilled.inputs.detach().clone(), run.distilled.labels.detach().clone())
    run.finish()
    unseen = Pooled(settings, 2, 1, digits)  # another seed: other networks
    errors = []
    for images, labels in (start, (run.distilled.inputs.detach(), run.distilled.labels.detach())):
        unseen.generator.manual_seed(0)
        unseen.networks.draw(unseen.generator)
        outputs = unseen.loop.predict(digits.train.images, images, labels)
        targets = centered_one_hot(digits.train.targets, 10)
        errors.append(float((outputs - targets).square().sum(-1).mean()))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("network", ["mlp", "convnet"])
def test_resumed_run_ends_with_the_same_set_and_pool(network: Any, digits: ImageData, tmp_path: Path) -> None:
    options = {"feature_network": network, "feature_width": 8, "feature_max_age": 4, "outer_steps": 9}
    settings = small(**options, shift=1, checkpoint_every=2, resume=True, out=tmp_path)
    whole = made(settings, digits)
    whole.finish()

    def kill(step: int, *_: object) -> None:
        if step == 7:
            raise KilledError

    with pytest.raises(KilledError):
        made(settings, digits).learn("run", kill)
    steps: list[int] = []
    continued = made(settings, digits)
    continued.learn("run", lambda step, *_: steps.append(step))
    assert steps == [6, 7, 8, 9]
    assert continued.history == whole.history
    for part in ("distilled", "optimizer", "networks"):
        found, expected = (run.parts[part].state_dict() for run in (continued, whole))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with pytest.raises(InvalidArgumentError, match=r"feature_max_age was 4, is 5"):
        made(replace(settings, feature_max_age=5), digits).learn("run")


def test_diverged_network_is_an_error_and_stays_out_of_the_pool(digits: ImageData) -> None:
    run = made(small(feature_rate=1e30, feature_steps=3), digits)
    with pytest.raises(NonFiniteError, match="take a smaller --feature-rate"):
        run.advance()
    assert all(
        value.isfinite().all() for state in run.networks.pool.states for value in state.params.values()
    )


def test_only_finite_networks_judge(tmp_path: Path) -> None:
    options = {"per_class": (2,), "outer_steps": 2, "networks": ("mlp",), "evaluations": 1, "draws": 2}
    options |= {"training_steps": 2, "rate_grid": (1e-3,), "out": tmp_path}
    rows = learn_kernel_set(small(**options), Console(quiet=True))
    judged = {(row["learner"], row["images"], row["labels"]) for row in rows}
    assert judged == {
        ("mlp", "learned", "learned"),
        ("mlp", "random images", "one-hot"),
        ("mlp", "k-means centers", "one-hot"),
    }
    assert len(rows) == 3
    assert json.loads((tmp_path / "summary.json").read_text())["full"] is None
    with (tmp_path / "2-a-class-seed0-history.csv").open() as file:
        assert [float(row["age"]) for row in csv.DictReader(file)] != []
    assert learn_kernel_set(small(**options, resume=True), Console(quiet=True)) == rows


def test_images_too_small_for_the_network_are_refused(digits: ImageData) -> None:
    with pytest.raises(InvalidArgumentError, match="at least 12x12 pixels"):
        made(small(feature_network="lenet"), digits)
