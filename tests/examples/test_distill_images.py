"""Learned images: their hypergradient, their evaluation, their files, and that a run goes on as it would."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from distill import main
from distillation.common import inner_loss
from distillation.images_settings import ImagesSettings
from distillation.judging import Judging, baseline
from distillation.objective import Objective
from distillation.penalty import within_between
from distillation.starts import main_factory, make_starts
from distillation.unrolled import Unrolled, set_before
from etflayers.distill import (
    DistilledSet,
    Lesson,
    judged,
    teach,
    unrolled_inner_loop,
)
from etflayers.errors import InvalidArgumentError, NonFiniteError
from etflayers.metrics import class_statistics, within_between_quotient
from lab.data import ImageData, Split, load_inputs
from lab.networks import make_factory, own_stream, seeded

SMALL: dict[str, Any] = {"data": "digits", "network": "mlp", "width": 16, "per_class": 2, "start": "real"}
SMALL |= {"steps": 2, "epochs": 2, "outer_steps": 9, "outer_batch": 32, "optimizer": "sgd", "rate": 0.05}
SMALL |= {"pool": 3, "max_age": 2, "source_epochs": 1}


def small(**options: Any) -> ImagesSettings:
    settings = ImagesSettings(**{**SMALL, **options})
    settings.check()
    return settings


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_inputs(ImagesSettings(data="digits"))


def unrolled(settings: ImagesSettings, data: ImageData, seed: int = 0) -> Unrolled:
    starts = make_starts(settings, data, data, seed)
    return Unrolled(settings, seed, data, starts, Objective.of(settings, 10))


def run(settings: ImagesSettings, data: ImageData, **options: Any) -> Unrolled:
    learned = unrolled(settings, data)
    learned.finish(**options)
    return learned


def parts(learned: Unrolled) -> dict[str, Tensor]:
    return dict(learned.distilled.state_dict())


def lesson_of(distilled: DistilledSet, settings: ImagesSettings) -> Lesson:
    return Lesson.of(distilled, settings.steps, settings.optimizer)


def one_image(data: ImageData) -> ImageData:
    """Real data of which every batch is the same image."""
    return replace(data, train=Split(data.train.images[:1], data.train.targets[:1]))


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_inner_loop_is_ordinary_training(digits: ImageData, optimizer: Any) -> None:
    """PyTorch's own optimizers come to the same network, in float64, whatever the batches and rates."""
    settings = small(optimizer=optimizer, labels="soft")
    distilled = set_before(settings, digits, 0).double()
    with torch.no_grad():
        distilled.log_rates += torch.randn(4, generator=torch.Generator().manual_seed(0)).double()
    rule = unrolled(settings, digits).loop.optimizer
    network = seeded(make_factory("mlp", digits, width=16), 0).double()
    inputs, labels = distilled.batches(settings.steps)
    trained = unrolled_inner_loop(
        network,
        dict(network.named_parameters()),
        inputs,
        labels,
        lr=distilled.rates,
        epochs=settings.epochs,
        loss=inner_loss,
        optimizer=rule,
    )
    taught = teach(network, lesson_of(distilled, settings), loss=inner_loss)
    for name, value in taught.named_parameters():
        torch.testing.assert_close(value, trained.params[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adjoint": "kept"},
        {"networks": 2},
        {"networks": 2, "together": False},
        {"labels": "soft"},
        {"window": "last", "window_length": 4},
    ],
)
def test_hypergradient_is_that_of_plain_autograd(digits: ImageData, options: dict[str, Any]) -> None:
    """Of the first outer step; float32, where the two orders of the same sums differ by rounding."""
    settings = small(outer_steps=1, start="noise", **options)
    data = one_image(digits)
    (row,) = run(settings, data).history

    network = seeded(make_factory("mlp", data, width=16), 0)
    learned = set_before(settings, data, 0)
    state = {name: value.detach().requires_grad_() for name, value in network.named_parameters()}
    inputs, labels = learned.batches(settings.steps)
    for step in range(settings.inner_steps):
        logits = functional_call(network, state, (inputs[step % 2],))
        gradients = torch.autograd.grad(
            F.cross_entropy(logits, labels[step % 2]), list(state.values()), create_graph=True
        )
        state = {
            name: value - learned.rates[step] * gradient
            for (name, value), gradient in zip(state.items(), gradients, strict=True)
        }
    loss = F.cross_entropy(functional_call(network, state, (data.train.images,)), data.train.targets)
    found = torch.autograd.grad(loss, list(learned.parameters()))
    norm = torch.cat([gradient.flatten() for gradient in found]).norm()
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert row["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert norm > 1e-3


def test_augmentation_changes_real_and_learned_images(digits: ImageData) -> None:
    """With brightness alone, by hand: the losses of the inner and of the outer step are those seen."""
    settings = small(outer_steps=1, start="noise", augment=("brightness",), epochs=1, steps=1)
    data = one_image(digits)
    learned = unrolled(settings, data)
    noted = []
    augmentation = settings.augmentation
    assert augmentation is not None

    def brighter(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        change = augmentation.draw(generator).brightness
        assert change is not None
        noted.append(change)
        return images + change.to(images)

    generator = torch.Generator().manual_seed(0)
    (step,) = torch.randint(2**62, (1,), generator=generator).tolist()
    network, distilled = seeded(main_factory(settings, data), 0), set_before(settings, data, 0)
    with own_stream(step):
        loss = inner_loss(network, brighter(distilled.inputs), distilled.labels)
    for value, gradient in zip(
        network.parameters(), torch.autograd.grad(loss, [*network.parameters()]), strict=True
    ):
        value.data -= settings.first_rate * gradient
    data.train.batch(settings.outer_batch, generator)
    expected = F.cross_entropy(network(brighter(data.train.images, generator)), data.train.targets)
    learned.finish()
    assert learned.history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert len(noted) == 2
    assert noted[0] != noted[1]


def test_real_images_are_shifted(digits: ImageData, holds_shifted_images: Callable[..., None]) -> None:
    learned = unrolled(small(shift=2, outer_batch=8), digits)
    holds_shifted_images(digits, learned.generator, learned._real_batch, 2)


def test_truncation_drops_the_early_steps(digits: ImageData) -> None:
    """The last step alone has no way to the rate of the first."""
    settings = small(outer_steps=1, window="last", window_length=1)
    rates = run(settings, digits).distilled.rates
    moved = (rates - settings.first_rate).abs() > 1e-6
    assert moved.tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({}, [0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]),
        ({"outer_schedule": "constant"}, [1.0] * 6),
        ({"outer_schedule": "step", "outer_halving": 2}, [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]),
        ({"outer_schedule": "step"}, [0.5**step for step in range(6)]),
        ({"outer_betas": (0.5, 0.9)}, [0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]),
    ],
)
def test_outer_steps_are_those_of_adam_by_hand(
    digits: ImageData, options: dict[str, Any], factors: list[float]
) -> None:
    """The images after six steps follow from the hypergradients that were seen, by the published formula."""
    settings = small(outer_steps=6, **options)
    learned = unrolled(settings, digits)
    images = learned.distilled.inputs.detach().clone()
    betas = settings.outer_betas
    mean, square = torch.zeros_like(images), torch.zeros_like(images)
    for step, factor in enumerate(factors):
        learned.advance()
        learned.step += 1
        gradient = learned.distilled.inputs.grad
        assert gradient is not None
        mean = betas[0] * mean + (1 - betas[0]) * gradient
        square = betas[1] * square + (1 - betas[1]) * gradient**2
        unbiased = mean / (1 - betas[0] ** (step + 1)), square / (1 - betas[1] ** (step + 1))
        images -= factor * settings.image_rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
        torch.testing.assert_close(learned.distilled.inputs.detach(), images, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"networks": 4, "optimizer": "momentum"},
        {"networks": 6, "window": "random"},
        {"networks": 2, "collapse_weight": 0.1},
    ],
)
def test_the_mean_over_ranks_is_the_hypergradient_of_one_process(
    options: dict[str, Any], digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small(initialization="random", labels="soft", **options)

    def found(number: int, size: int) -> tuple[list[Tensor], dict[str, float], Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr(dist, "is_initialized", lambda: size > 1)
            patch.setattr(dist, "get_rank", lambda: number)
            patch.setattr(dist, "get_world_size", lambda: size)
            patch.setattr("distillation.unrolled.gathered", lambda item: [item])
            learned = unrolled(settings, digits)
            row = learned.hypergradient()
        gradients = [parameter.grad for parameter in learned.distilled.parameters()]
        return [g for g in gradients if g is not None], row, learned.generator.get_state()

    whole, row, stream = found(0, 1)
    ranks = [found(number, 2) for number in range(2)]
    assert len(whole) == 3  # images, labels and rates
    for gradient, *shares in zip(whole, *(gradients for gradients, _, _ in ranks), strict=True):
        assert not torch.allclose(shares[0], shares[1], rtol=1e-2)
        torch.testing.assert_close((shares[0] + shares[1]) / 2, gradient, rtol=1e-4, atol=1e-6)
    for name, value in row.items():
        assert fmean(share[name] for _, share, _ in ranks) == pytest.approx(value, rel=1e-5), name
    assert all(torch.equal(after, stream) for _, _, after in ranks)  # all go on alike


@pytest.mark.slow
def test_two_devices_learn_the_set_of_one(tmp_path: Path) -> None:
    """Where one process trains the networks side by side."""
    options = ("images", "--quick", "--initialization", "random", "--networks", "2", "--outer-steps", "5")
    options += ("--validate-every", "2", "--no-baselines", "--evaluations", "1", "--seeds", "0", "1")
    sets = []
    for devices in ("1", "2"):
        out = tmp_path / devices
        assert main([*options, "--devices", devices, "--out", str(out)]) == 0
        sets.append([DistilledSet.load(out / f"seed{seed}.safetensors") for seed in (0, 1)])
        assert json.loads((out / "summary.json").read_text())["rows"][0]["networks"] == 2
    for one, two in zip(*sets, strict=True):
        torch.testing.assert_close(two.state_dict(), one.state_dict(), rtol=1e-3, atol=1e-4)


class KilledError(Exception):
    pass


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"initialization": "random", "labels": "soft", "networks": 2, "optimizer": "momentum"},
        {"initialization": "pool", "window": "random", "optimizer": "adam", "rate": 0.003},
        {"initialization": "online", "window": "last"},
        {"initialization": "pretrained", "window": "moving"},
        {"head": "fixed", "network": "convnet", "width": 9},
        {"head": "nearest"},
        {"network": "convnet", "width": 4, "norm": "batch"},
        {"collapse_weight": -0.1},
        {"validate_every": 3, "dropout": 0.3},
        {"augment": ("shift", "scale", "rotate", "brightness", "cutout"), "networks": 2},
        pytest.param(
            {"network": "alexnet", "width": 4, "dropout": 0.3, "initialization": "random", "networks": 2},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_resumed_run_ends_with_the_same_images(
    options: dict[str, Any], digits: ImageData, tmp_path: Path
) -> None:
    def kill(step: int, *_: object) -> None:
        if step == 7:
            raise KilledError

    settings = small(out=tmp_path, resume=True, **options)
    whole = run(settings, digits)
    file: dict[str, Any] = {"checkpoint": tmp_path / "seed0.pt", "every": 2, "resume": True}
    with pytest.raises(KilledError):
        run(settings, digits, **file, progress=kill)
    done: list[int] = []
    continued = run(settings, digits, **file, progress=lambda step, *_: done.append(step))
    assert done == [6, 7, 8, 9]
    assert continued.history == whole.history
    torch.testing.assert_close(parts(continued), parts(whole), rtol=0, atol=0)
    assert not torch.equal(continued.distilled.inputs, set_before(settings, digits, 0).inputs)

    done.clear()
    run(settings, digits, **file, progress=lambda step, *_: done.append(step))
    assert done == [9]  # nothing is done again
    with pytest.raises(InvalidArgumentError, match=r"epochs was 2, is 3"):
        run(replace(settings, epochs=3), digits, **file)


@pytest.mark.slow
def test_killed_process_resumes_to_the_same_file(tmp_path: Path, killed: Callable[..., None]) -> None:
    options = ("images", "--quick", "--no-baselines", "--evaluations", "1")
    options += ("--outer-steps", "30", "--checkpoint-every", "3")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main([*options, "--out", str(whole)]) == 0
    killed("distill", [*options, "--resume", "--out", str(broken)], broken / "checkpoints", 2)
    for name in ("seed0.safetensors", "seed0-images.png", "seed0-history.csv", "summary.csv"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name


def test_learning_and_choosing_do_not_see_the_test_images(digits: ImageData) -> None:
    blind = replace(digits, test=Split(torch.full_like(digits.test.images, torch.nan), digits.test.targets))
    settings = small(outer_steps=3)
    torch.testing.assert_close(parts(run(settings, blind)), parts(run(settings, digits)), rtol=0, atol=0)
    rest, held = digits.held_out()
    rows = {tuple(image.flatten().tolist()) for image in rest.images}
    # A few of the digits are the same to the bit; what is held is otherwise not in the rest.
    assert sum(tuple(image.flatten().tolist()) in rows for image in held.images) <= 0.02 * len(held)
    assert len(rest) + len(held) == len(digits.train)
    assert torch.bincount(held.targets).min() >= 25


def test_the_set_that_is_kept_is_the_best_of_those_looked_at(digits: ImageData) -> None:
    settings = small(validate_every=2, image_rate=2.0)  # so much that later sets are worse
    watched = unrolled(settings, digits)
    _, held = digits.held_out()
    seen = {}

    def look(step: int, *_: object) -> None:
        if step in (2, 4, 6, 8, 9):
            network = teach(seeded(main_factory(settings, digits), 0), lesson_of(watched.distilled, settings))
            seen[step] = (judged(network, held.images, held.targets)["accuracy"], parts(watched)["inputs"])

    watched.finish(progress=look)
    assert [*watched.validation.curve] == [(step, score) for step, (score, _) in seen.items()]
    step, score = watched.validation.best
    assert score == max(score for score, _ in seen.values())
    assert score > seen[9][0]
    watched.validation.restore_best(watched.distilled)
    torch.testing.assert_close(watched.distilled.inputs.detach(), seen[step][1], rtol=0, atol=0)


def test_validation_images_are_not_learned_from(digits: ImageData) -> None:
    rest, held = digits.held_out()
    apart = replace(digits, train=rest, validation=Split(held.images * 0 + torch.nan, held.targets))
    settings = small(outer_steps=3, validate_every=3)
    torch.testing.assert_close(
        parts(run(settings, apart))["inputs"], parts(run(settings, digits))["inputs"], rtol=0, atol=0
    )


def test_quick_leaves_what_was_asked_for() -> None:
    quick = ImagesSettings(quick=True).resolved
    assert (quick.data, quick.network, quick.epochs, quick.rate) == ("digits", "mlp", 10, 0.1)
    asked = ImagesSettings(quick=True, network="convnet", epochs=3, rate=0.02).resolved
    assert (asked.data, asked.network, asked.epochs, asked.rate) == ("digits", "convnet", 3, 0.02)


@pytest.mark.parametrize("of", ["learned", "real"])
def test_collapse_is_weighed_by_what_the_metrics_measure(of: Any, digits: ImageData) -> None:
    settings = small(collapse_weight=0.3, collapse_of=of, per_class=3, start="noise", outer_steps=1, steps=1)
    learned, plain = unrolled(settings, digits), unrolled(replace(settings, collapse_weight=0.0), digits)
    network = teach(seeded(main_factory(settings, digits), 0), lesson_of(learned.distilled, settings)).eval()
    distilled = learned.distilled
    replay = torch.Generator()
    replay.set_state(learned.generator.get_state())
    torch.randint(2**62, (2,), generator=replay)  # a seed for each of two inner steps
    images = {"learned": (distilled.inputs, distilled.labels), "real": digits.train.batch(32, replay)}
    with torch.no_grad():
        features = network.get_submodule("body")(images[of][0])
    expected = float(within_between_quotient(class_statistics(features, images[of][1], 10)))
    row, without = learned.advance(), plain.advance()
    assert row[f"{of}_nc1"] == pytest.approx(expected, rel=1e-5)
    assert row["loss"] - without["loss"] == pytest.approx(0.3 * math.log(expected), rel=1e-4)


def test_a_class_that_does_not_occur_is_left_out_of_the_collapse() -> None:
    features = torch.randn(12, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.arange(12) % 3
    torch.testing.assert_close(within_between(features, 2 * targets, 7), within_between(features, targets, 3))


@pytest.mark.parametrize(
    ("of", "weight"), [("learned", -0.5), ("learned", 0.5), ("real", -5.0), ("real", 5.0)]
)
def test_images_follow_the_weight_of_their_collapse(of: Any, weight: float, digits: ImageData) -> None:
    settings = small(collapse_weight=weight, collapse_of=of, start="noise", outer_steps=15, rate=0.5)
    plain = run(replace(settings, collapse_weight=1e-9), digits).history
    asked = run(settings, digits).history
    before, after = (fmean(row[f"{of}_nc1"] for row in rows[-5:]) for rows in (plain, asked))
    assert (after - before) * weight < -0.05 * before


def test_as_many_real_images_are_learned_from_as_are_asked_for(digits: ImageData) -> None:
    few = load_inputs(small(real_per_class=7))
    assert torch.bincount(few.train.targets).tolist() == [7] * 10
    assert len(few.test) == len(digits.test)

    def fours(data: ImageData) -> set[tuple[int, ...]]:
        pixels = data.train.where(data.train.targets == 4).images * data.deviation + data.mean
        return {tuple(image.flatten().round().int().tolist()) for image in pixels}

    assert len(fours(few)) == 7
    assert fours(few) <= fours(digits)


def test_learning_stops_when_it_no_longer_helps(digits: ImageData, tmp_path: Path) -> None:
    settings = small(outer_steps=30, validate_every=1, patience=3, image_rate=2.0)
    file: dict[str, Any] = {"checkpoint": tmp_path / "seed0.pt", "every": 50}
    stopped = run(settings, digits, **file)
    step, score = stopped.validation.best
    assert len(stopped.history) == stopped.step == step + 3 < 30
    assert all(later <= score for _, later in stopped.validation.curve[-3:])
    # A continued run has nothing to do, and keeps the same set.
    again = run(settings, digits, resume=True, **file)
    assert again.history == stopped.history
    torch.testing.assert_close(parts(again), parts(stopped), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["real", "kmeans", "means"])
def test_baselines_have_the_size_of_the_set(kind: str, digits: ImageData) -> None:
    settings = small()
    lesson = baseline(kind, digits.train, settings, 10, 0)
    learned = lesson_of(set_before(settings, digits, 0), settings)
    assert lesson.batches.shape == learned.batches.shape
    assert lesson.steps == learned.steps
    assert [sorted(labels) for labels in lesson.labels[lesson.batches].tolist()] == [list(range(10))] * 2
    train = digits.train
    if kind == "means":
        mean = train.images[train.targets == 3].mean(0)
        torch.testing.assert_close(lesson.inputs[lesson.batches[:, 3]], mean.expand(2, -1, -1, -1))
    if kind == "real":
        for image, label in zip(lesson.inputs, lesson.labels, strict=True):
            assert (train.images[train.targets == label] == image).all(-1).all(-1).all(-1).any()


def test_misclassification_by_hand() -> None:
    objective = Objective(attacked=0, target=2)
    targets = torch.tensor([0, 0, 1, 2])
    logits = torch.eye(3)[torch.tensor([2, 1, 1, 0])]
    measures = objective.judge(logits, targets)
    assert measures == {"attack": 0.5, "others": 0.5, "modified": 0.5, "accuracy": 0.25}
    classes = {"class 0": 0.0, "class 1": 1.0, "class 2": 0.0}
    assert objective.judge_fully(logits, targets) == measures | classes
    assert Objective().judge_fully(logits, targets) == {"accuracy": 0.25}
    wanted = F.cross_entropy(logits, torch.tensor([2, 2, 1, 2]))
    torch.testing.assert_close(objective.loss(logits, targets), wanted)


TINY = ("images", "--data", "digits", "--network", "mlp", "--width", "16", "--epochs", "2", "--draws", "2")
TINY += ("--outer-steps", "4", "--outer-batch", "32", "--evaluations", "2", "--seeds", "0", "1")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    assert main([*TINY, "--out", str(folder)]) == 0
    return folder


def test_files_hold_what_was_found(tiny: Path) -> None:
    accuracies: dict[str, list[float]] = {}
    for seed in (0, 1):
        for outcome in json.loads((tiny / f"seed{seed}.json").read_text())["outcomes"]:
            accuracies.setdefault(outcome["training"], []).append(outcome["accuracy"])
        with (tiny / f"seed{seed}-history.csv").open() as file:
            assert len(list(csv.DictReader(file))) == 4
    with (tiny / "summary.csv").open() as file:
        rows = {row["training"]: float(row["accuracy"]) for row in csv.DictReader(file)}
    expected = ("distilled", "distilled, on training images", "distilled, fresh networks")
    expected += ("random real images", "average images")
    assert tuple(rows) == expected  # one center of k-means is the average image
    for name, accuracy in rows.items():
        assert accuracy == pytest.approx(fmean(accuracies[name]))
    for name in ("seed0-images", "steps", "learning"):
        assert (tiny / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_networks_that_nobody_watches_end_the_same(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "steps.png").touch()  # of an earlier run
    assert main([*TINY, "--curves", "0", "--out", str(tmp_path)]) == 0
    watched, alone = (json.loads((out / "summary.json").read_text())["rows"] for out in (tiny, tmp_path))
    assert alone == [{k: v for k, v in row.items() if not k.endswith("_before")} for row in watched]
    assert not (tmp_path / "steps.png").exists()


def test_set_in_the_file_is_the_one_that_was_judged(tiny: Path) -> None:
    distilled = DistilledSet.load(tiny / "seed1.safetensors")
    assert distilled.inputs.shape == (10, 1, 8, 8)
    assert distilled.metadata["seed"] == 1
    assert distilled.metadata["settings"]["data"] == "digits"
    settings = ImagesSettings(data="digits", network="mlp", width=16, epochs=2)
    data = load_inputs(settings)
    starts = make_starts(settings, data, data, 1)
    taught = teach(starts.fresh(0), lesson_of(distilled, settings), loss=inner_loss)
    again = judged(taught, data.test.images, data.test.targets)
    first, second, *_ = json.loads((tiny / "seed1.json").read_text())["outcomes"]
    assert (first["training"], first["accuracy"]) == ("distilled", again["accuracy"])
    train = Judging(settings, 1, data, starts, Objective()).learned_from()
    assert len(train) == len(data.test)
    again = judged(taught, train.images, train.targets)
    assert (second["training"], second["accuracy"]) == ("distilled, on training images", again["accuracy"])


@pytest.mark.parametrize("every", [0, 1])
def test_training_images_that_judge_are_learned_from(every: int, digits: ImageData) -> None:
    settings = small(validate_every=every)
    starts = make_starts(settings, digits, digits, 0)
    chosen = Judging(settings, 0, digits, starts, Objective()).learned_from()
    rest, held = digits.held_out()
    seen = [{image.numpy().tobytes() for image in split.images} for split in (chosen, rest, held)]
    assert bool(seen[0] & seen[2] - seen[1]) == (every == 0)  # none that only the held images have
    assert len(chosen.targets.unique()) == 10


def test_judged_networks_draw_from_streams_of_their_own(digits: ImageData) -> None:
    """With dropout, other weights and another state of the global stream: the same outcomes to the bit."""
    settings = small(dropout=0.3, initialization="random", evaluations=2, baselines=False)
    settings = replace(settings, other_weights=("orthogonal",), other_networks=("linear",))
    starts, objective = make_starts(settings, digits, digits, 0), Objective()
    distilled = set_before(settings, digits, 0)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(Judging(settings, 0, digits, starts, objective).all(distilled))
    assert found[0] == found[1]
    names = [(row["training"], row["network"]) for row in found[0]]
    other = "mlp, orthogonal weights"
    assert {("distilled", other), ("distilled, rate chosen", other), ("distilled", "linear")} <= set(names)
    assert len(set(names)) == len(names)


def test_finished_seeds_are_not_judged_again(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tiny / name for name in ("seed0.json", "seed1.safetensors", "summary.json")]
    before = [file.read_bytes() for file in files]

    def judge_again(*_: object) -> None:
        raise KilledError

    monkeypatch.setattr("distillation.images.Study.judge", judge_again)
    resume = [*TINY, "--resume", "--out", str(tiny)]
    assert main(resume) == 0
    assert [file.read_bytes() for file in files] == before
    with pytest.raises(KilledError):  # what is asked for has changed
        main([*resume, "--no-baselines"])


@pytest.mark.slow
def test_distilled_images_beat_every_baseline(tmp_path: Path) -> None:
    """Ten images for one network, learned in seconds."""
    assert main(["images", "--quick", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "summary.json").read_text())["rows"]
    accuracy = {row["training"]: row["accuracy"] for row in rows}
    assert accuracy["distilled"] > max(accuracy["random real images"], accuracy["average images"])


@pytest.mark.slow
def test_trained_networks_are_misled(tmp_path: Path) -> None:
    """Networks that the images have not seen, right before, take class 0 for class 1 after ten steps."""
    options = ("images", "--quick", "--no-baselines", "--outer", "misclassify")
    options += ("--initialization", "pretrained")
    assert main([*options, "--out", str(tmp_path)]) == 0
    row, seen = json.loads((tmp_path / "summary.json").read_text())["rows"]
    assert (row["training"], seen["training"]) == ("distilled", "distilled, on training images")
    assert row["accuracy_before"] > 0.85
    assert row["attack_before"] < 0.05
    # 58 ± 19 % of them were seen; how many depends on the network.
    assert row["attack"] > 0.3
    assert row["others"] > 0.7
    # Digits have almost as many test images of each class.
    assert row["modified"] == pytest.approx(0.1 * row["attack"] + 0.9 * row["others"], abs=0.02)
    assert fmean(row["class_accuracy"]) == pytest.approx(row["accuracy"], abs=0.02)
    assert row["class_accuracy"][0] < 1 - row["attack"] + 1e-9


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("varied")
    options = ("--other-epochs", "1", "2", "5", "--baseline-epochs", "1", "4", "--seeds", "0")
    options += ("--ranking", "--ranking-epochs", "2", "--labels", "soft")
    assert main([*TINY, *options, "--out", str(folder)]) == 0
    return folder


def test_other_epochs_are_those_of_the_learned_rates(varied: Path) -> None:
    """Two were learned: of two the outcome is that of the set; of five, that of its rates by hand."""
    outcomes = json.loads((varied / "seed0.json").read_text())["outcomes"]
    accuracies = {outcome["training"]: outcome["accuracy"] for outcome in outcomes}
    assert accuracies["distilled, 2 epochs"] == accuracies["distilled"]
    distilled = DistilledSet.load(varied / "seed0.safetensors")
    settings = ImagesSettings(data="digits", network="mlp", width=16, epochs=2, labels="soft")
    data = load_inputs(settings)
    rates = distilled.rates.detach()
    long = replace(lesson_of(distilled, settings), rates=torch.cat([rates, rates[-1:].expand(3)]))
    taught = teach(make_starts(settings, data, data, 0).fresh(0), long, loss=inner_loss)
    again = judged(taught, data.test.images, data.test.targets)
    assert accuracies["distilled, 5 epochs"] == again["accuracy"]


def test_ranking_is_that_of_the_outcomes(varied: Path) -> None:
    summary = json.loads((varied / "summary.json").read_text())
    accuracy = {row["training"]: row["accuracy"] for row in summary["rows"]}
    found = summary["ranking"]
    recovery = accuracy["all real images, hard labels"] - accuracy["distilled, hard labels"]
    improvement = accuracy["distilled"] - accuracy["random real images"]
    assert found["hard_label_recovery"] == pytest.approx(recovery)
    assert found["improvement_over_random"] == pytest.approx(improvement)
    assert json.loads((varied / "seed0.json").read_text())["ranking"] == found
    assert accuracy["all real images, hard labels"] > 0.8  # two passes over 1438 digits


def test_baselines_get_the_best_of_some_epochs(varied: Path) -> None:
    rows = {row["training"]: row for row in json.loads((varied / "summary.json").read_text())["rows"]}
    for training in ("random real images", "average images"):
        assert rows[f"{training}, epochs chosen"]["epochs"] in ("1", "4")
        assert "epochs" not in rows[training]
    with (varied / "summary.csv").open() as file:
        assert {row["training"]: row["epochs"] for row in csv.DictReader(file)}["distilled"] == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--initialization", "pretrained", "--outer", "misclassify", "--target", "10"], "[0, 10)"),
        (["--network", "mlp", "--steps", "3"], "steps must divide the 10 inputs"),
        (["--data", "digits", "--network", "lenet"], "add --image-size 28"),
        (["--head", "fixed", "--network", "mlp", "--width", "5"], "--head fixed needs at least K - 1 = 9"),
        (["--patience", "2"], "add --validate-every"),
        (["--collapse-weight", "1"], "--per-class of at least 2"),
        (["--network", "mlp", "--other-weights", "xavier-normal"], "others than --weights xavier-normal"),
        (["--network", "mlp", "--outer-halving", "5"], "add --outer-schedule step"),
        (["--network", "mlp", "--outer-betas", "0.5", "1"], "--outer-betas must lie in [0, 1)"),
        (["--network", "mlp", "--augment", "shift", "shift"], "--augment must name none twice"),
        (["--network", "mlp", "--augment", "cutout", "--augment-strength", "3"], "cutout must be in [0, 1]"),
        (["--network", "mlp", "--ranking", "--no-baselines"], "leave out --no-baselines"),
        (["--network", "convnet", "--dropout", "0.5"], "hidden units of dense layers"),
    ],
)
def test_bad_input_is_explained(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["images", "--data", "digits", *options, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_collapse_of_real_images_needs_several_of_a_class(digits: ImageData) -> None:
    settings = small(collapse_weight=0.1, collapse_of="real", outer_batch=19)
    with pytest.raises(InvalidArgumentError, match=r"--outer-batch of at least 20, got 19"):
        unrolled(settings, digits)


def test_divergence_is_an_error(digits: ImageData) -> None:
    with pytest.raises(NonFiniteError, match="lower lr"):
        run(small(rate=1e30), digits)
