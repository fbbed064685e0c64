import copy
import errno
import json
import math
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from etflayers.distill import (
    DistilledSet,
    centered_one_hot,
    image_grid,
    kmeans_centers,
    partial_means,
    per_class,
    random_samples,
    unrolled_inner_loop,
    write_png,
)
from etflayers.errors import InvalidArgumentError, MissingDependencyError, NonFiniteError
from etflayers.storage import write_tensors

STARTS = [random_samples, partial_means, kmeans_centers]


def real_data(count=60, classes=3):
    """Images of class k around the value 10 k, in random order."""
    targets = (torch.arange(count) % classes)[torch.randperm(count)]
    return 10.0 * targets[:, None, None, None] + torch.randn(count, 1, 4, 4), targets


def soft_set():
    return DistilledSet(
        torch.randn(6, 3, 4, 4),
        torch.randn(6, 3),
        rates=torch.tensor([0.1, 1e-3]),
        mean=torch.tensor([0.1, 0.2, 0.3]),
        std=torch.tensor([0.5, 0.6, 0.7]),
        metadata={"source": "noise", "classes": ["a", "b", "c"]},
    )


def hard_set():
    return DistilledSet.from_noise((5,), 3, per_class=2)


def test_hard_labels_are_kept_and_soft_ones_learned():
    assert {name for name, _ in hard_set().named_parameters()} == {"inputs"}
    assert set(hard_set().state_dict()) == {"inputs", "labels", "mean", "std"}
    assert {name for name, _ in soft_set().named_parameters()} == {"inputs", "labels", "log_rates"}


def test_rates_stay_positive_whatever_the_step():
    distilled = soft_set()
    torch.testing.assert_close(distilled.rates.detach(), torch.tensor([0.1, 1e-3]))
    optimizer = torch.optim.SGD([distilled.log_rates], lr=20.0)
    distilled.rates.sum().backward()
    optimizer.step()
    assert (distilled.rates > 0).all()
    # d rate / d log rate = rate
    torch.testing.assert_close(distilled.log_rates.grad, torch.tensor([0.1, 1e-3]))
    without = hard_set()
    with pytest.raises(InvalidArgumentError, match="without rates"):
        _ = without.rates
    assert not hasattr(without, "rates")
    assert getattr(without, "rates", 0.1) == 0.1
    with pytest.raises(AttributeError, match="no attribute 'rate'"):
        _ = without.rate


def test_the_number_of_inputs_is_of_each_class():
    images, targets = real_data()
    assert len(DistilledSet.from_data(images, targets, per_class=2).inputs) == 6
    assert len(DistilledSet.from_noise((4,), 3, per_class=2).inputs) == 6
    for make in (
        lambda: DistilledSet.from_data(images, targets, count=2),
        lambda: DistilledSet.from_noise((4,), 3, count=2),
    ):
        with pytest.warns(DeprecationWarning, match="count is now per_class"):
            assert len(make().inputs) == 6


@pytest.mark.parametrize("representatives", STARTS)
@pytest.mark.parametrize("count", [1, 4])
def test_starts_balanced_and_class_by_class_in_turn(representatives, count):
    images, targets = real_data()
    distilled = DistilledSet.from_data(images, targets, per_class=count, representatives=representatives)
    assert torch.equal(distilled.labels, torch.arange(3).repeat(count))
    nearest = (distilled.inputs.detach().mean((1, 2, 3)) / 10).round().long()
    assert torch.equal(nearest, distilled.labels)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16])
def test_targets_of_every_integer_dtype(dtype):
    images, targets = real_data()
    expected = DistilledSet.from_data(images, targets, per_class=2, representatives=partial_means)
    found = DistilledSet.from_data(images, targets.to(dtype), per_class=2, representatives=partial_means)
    assert torch.equal(found.labels, expected.labels)
    means = [each.inputs.detach()[each.labels == 1].mean(0) for each in (found, expected)]
    torch.testing.assert_close(*means)
    assert DistilledSet(torch.zeros(3, 2), torch.arange(3).to(dtype)).labels.dtype == torch.int64
    assert torch.equal(centered_one_hot(torch.arange(3).to(dtype), 3), centered_one_hot(torch.arange(3), 3))


def test_samples_are_real_and_different():
    images, targets = real_data()
    chosen, classes = per_class(images, targets, count=20)  # all there are
    order = [torch.cdist(chosen[classes == k].flatten(1), images[targets == k].flatten(1)) for k in range(3)]
    for distances in order:
        assert ((distances < 1e-5).sum(0) == 1).all()


def test_partial_means_average_to_the_class_mean():
    images, targets = real_data()
    chosen, classes = per_class(images, targets, count=5, representatives=partial_means)
    for k in range(3):
        torch.testing.assert_close(chosen[classes == k].mean(0), images[targets == k].mean(0))
    assert len(torch.unique(chosen.flatten(1), dim=0)) == 15


def test_kmeans_centers_are_the_means_of_what_is_nearest_to_them():
    images = torch.randn(80, 1, 2, 3)
    centers = kmeans_centers(images, 4, None)
    assigned = torch.cdist(images.flatten(1), centers.flatten(1)).argmin(1)
    for k in range(4):
        torch.testing.assert_close(centers[k], images[assigned == k].mean(0))


@pytest.mark.parametrize("representatives", STARTS)
def test_a_generator_decides_all_that_is_random(representatives):
    images, targets = real_data()

    def chosen(seed):
        options = {"count": 4, "representatives": representatives}
        return per_class(images, targets, generator=torch.Generator().manual_seed(seed), **options)[0]

    assert torch.equal(chosen(1), chosen(1))
    if representatives is not kmeans_centers:  # whose best of several starts may be the same
        assert not torch.equal(chosen(1), chosen(2))


@pytest.mark.parametrize(("kind", "total"), [("one-hot", 1.0), ("centered", 0.0)])
def test_soft_labels_start_at_the_class(kind, total):
    distilled = DistilledSet.from_noise((4,), 3, per_class=2, labels=kind)
    assert distilled.labels.requires_grad
    assert torch.equal(distilled.labels.argmax(1), torch.arange(3).repeat(2))
    torch.testing.assert_close(distilled.labels.sum(1).detach(), torch.full((6,), total))


@pytest.mark.parametrize("make", [soft_set, hard_set])
def test_a_file_gives_back_the_same_set_to_the_bit(make, tmp_path):
    distilled = make()
    distilled.save(tmp_path / "set.safetensors")
    loaded = DistilledSet.load(tmp_path / "set.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["set.safetensors"]
    assert loaded.state_dict().keys() == distilled.state_dict().keys()
    for name, tensor in distilled.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert {name for name, _ in loaded.named_parameters()} == {n for n, _ in distilled.named_parameters()}
    assert (loaded.num_classes, loaded.metadata) == (distilled.num_classes, distilled.metadata)


def test_the_record_in_the_file_is_json_that_others_can_read(tmp_path):
    soft_set().save(tmp_path / "set.safetensors")
    with safe_open(tmp_path / "set.safetensors", framework="np") as file:
        record = json.loads(file.metadata()["etflayers"])
    assert record["num_classes"] == 3
    assert record["metadata"]["classes"] == ["a", "b", "c"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "set.safetensors"
    hard_set().save(path)
    before = path.read_bytes()
    bad = hard_set()
    bad.metadata["model"] = nn.Linear(1, 1)
    with pytest.raises(InvalidArgumentError, match="JSON"):
        bad.save(path)
    assert path.read_bytes() == before


def test_says_what_is_wrong_with_a_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        DistilledSet.load(tmp_path / "none.safetensors")
    (tmp_path / "text").write_text("no tensors here")
    with pytest.raises(InvalidArgumentError, match="no safetensors file"):
        DistilledSet.load(tmp_path / "text")
    save_file({"inputs": torch.zeros(1, 2)}, tmp_path / "foreign")
    with pytest.raises(InvalidArgumentError, match="not written by etflayers"):
        DistilledSet.load(tmp_path / "foreign")
    save_file({"inputs": torch.zeros(1, 2)}, tmp_path / "later", {"etflayers": '{"format": 99}'})
    with pytest.raises(InvalidArgumentError, match="format 99"):
        DistilledSet.load(tmp_path / "later")
    write_tensors(tmp_path / "other", {"inputs": torch.zeros(1, 2)}, {})
    with pytest.raises(InvalidArgumentError, match="other does not hold a distilled set"):
        DistilledSet.load(tmp_path / "other")
    for record in ("{", "[1]", "{}"):
        save_file({"inputs": torch.zeros(1, 2)}, tmp_path / "record", {"etflayers": record})
        with pytest.raises(InvalidArgumentError, match=r"record (is damaged|has format None)"):
            DistilledSet.load(tmp_path / "record")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        DistilledSet.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log_rates": torch.tensor([0.0, math.nan])}, "rates must be finite"),
        ({"log_rates": torch.tensor(math.inf)}, "rates must be finite"),
        ({"log_rates": torch.tensor(1e9)}, "rates must be finite"),
        ({"log_rates": torch.tensor(-1e9)}, "rates must be finite numbers > 0"),
        ({"log_rates": torch.zeros(2, 2)}, r"shape \(T,\), got \(2, 2\)"),
        ({"log_rates": torch.ones(2, dtype=torch.int64)}, "floating-point"),
        ({"num_classes": 3.5}, "num_classes must be an integer.*3.5"),
        ({"num_classes": 10**12}, "num_classes must be an integer.*10{12}"),
        ({"num_classes": None}, "num_classes must be an integer"),
        ({"num_classes": 2}, r"labels must lie in \[0, 2\)"),
        ({"metadata": "text"}, "metadata must be a dictionary"),
        ({"labels": torch.zeros(2)}, "soft labels must have shape"),
        ({"std": torch.tensor(0.0)}, "std must be positive"),
    ],
)
def test_a_file_is_held_against_what_a_set_can_be(change, message, tmp_path):
    path = tmp_path / "set.safetensors"
    tensors, record = hard_set().state_dict(), {"num_classes": 3, "metadata": {}}
    for name, value in change.items():
        (tensors if isinstance(value, torch.Tensor) else record)[name] = value
    write_tensors(path, tensors, record)
    with pytest.raises(InvalidArgumentError, match=message) as caught:
        DistilledSet.load(path)
    assert str(path) in str(caught.value)


def test_rates_that_half_precision_rounds_to_zero_come_back(tmp_path):
    distilled = DistilledSet(torch.zeros(2, 3), torch.tensor([0, 1]), rates=1e-9).half()
    distilled.save(tmp_path / "set.safetensors")
    assert torch.equal(DistilledSet.load(tmp_path / "set.safetensors").log_rates, distilled.log_rates)


def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path):
    path = tmp_path / "set.safetensors"
    distilled = DistilledSet(torch.randn(2, 3), torch.tensor([0, 1]), rates=0.1, metadata={"a": 1})
    distilled.save(path)
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    blanks = range(8 + len(content[8:end].rstrip()), end)  # after the header
    for place in range(0, 8 * len(content), 3):  # two or three of every byte
        damaged = bytearray(content)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        if place // 8 not in blanks:
            with pytest.raises(InvalidArgumentError, match=str(path)):
                DistilledSet.load(path)


def test_a_file_without_a_checksum_loads_with_a_warning(tmp_path):
    distilled = soft_set()
    record = {"format": 1, "num_classes": 3, "metadata": {"source": "before"}}
    tensors = {name: value.contiguous() for name, value in distilled.state_dict().items()}
    save_file(tensors, tmp_path / "old", {"etflayers": json.dumps(record)})
    with pytest.warns(UserWarning, match="old has no checksum.*save it again"):
        loaded = DistilledSet.load(tmp_path / "old")
    assert torch.equal(loaded.inputs, distilled.inputs)
    loaded.save(tmp_path / "new")
    assert DistilledSet.load(tmp_path / "new").metadata == {"source": "before"}
    # A file of now that has lost its checksum is no file of before.
    record["format"] = 2
    save_file(tensors, tmp_path / "lost", {"etflayers": json.dumps(record)})
    with pytest.raises(InvalidArgumentError, match="lost is damaged"):
        DistilledSet.load(tmp_path / "lost")


def test_writers_and_readers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "set.safetensors"
    sets = [DistilledSet(torch.full((200, 50), float(i)), torch.arange(200) % 3) for i in range(4)]
    sets[0].save(path)

    def write(distilled):
        for _ in range(25):
            distilled.save(path)

    def read(_):
        return [DistilledSet.load(path).inputs.unique().numel() for _ in range(25)]

    with ThreadPoolExecutor(6) as pool:
        writing = [pool.submit(write, distilled) for distilled in sets]
        reading = [pool.submit(read, index) for index in range(2)]
        for job in writing:
            job.result()
        assert all(job.result() == [1] * 25 for job in reading)
    assert [each.name for each in tmp_path.iterdir()] == ["set.safetensors"]


def test_an_error_of_the_system_names_the_file(tmp_path, monkeypatch):
    distilled = hard_set()
    (tmp_path / "file").write_text("no folder")
    for path, kind in [
        (tmp_path / "none" / "set", FileNotFoundError),
        (tmp_path / "file" / "set", NotADirectoryError),
        (tmp_path, IsADirectoryError),
    ]:
        with pytest.raises(kind) as caught:
            distilled.save(path)
        assert caught.value.filename == str(path)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        distilled.save(tmp_path / "set")
    assert caught.value.filename == str(tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_state_dict_and_copies():
    first, second = soft_set(), soft_set()
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.inputs, second.inputs)
    assert torch.equal(copy.deepcopy(first).rates, second.rates)
    assert first.double().inputs.dtype == torch.float64


def test_is_a_data_set_like_any_other():
    distilled = hard_set()
    (inputs, labels), *rest = DataLoader(distilled.dataset(), batch_size=4)
    assert len(rest) == 1
    assert torch.equal(inputs, distilled.inputs[:4])
    assert torch.equal(labels, distilled.labels[:4])
    assert not inputs.requires_grad
    inputs_of_dataset = distilled.dataset().tensors[0]
    inputs_of_dataset.zero_()
    assert distilled.inputs.abs().sum() > 0


@pytest.mark.parametrize("kind", ["hard", "one-hot"])
def test_learns_through_the_unrolled_loop(kind):
    images, targets = real_data()
    distilled = DistilledSet.from_noise((1, 4, 4), 3, per_class=2, labels=kind, rates=torch.full((2,), 0.01))
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    optimizer = torch.optim.Adam(distilled.parameters(), lr=0.1)

    def step():
        optimizer.zero_grad()
        parameters = dict(model.named_parameters())
        trained = unrolled_inner_loop(model, parameters, *distilled.batches(2), lr=distilled.rates, epochs=2)
        loss = F.cross_entropy(functional_call(model, trained.params, (images,)), targets)
        loss.backward()
        return loss.item()

    losses = [optimizer.step(step) for _ in range(20)]
    assert all(parameter.grad.norm() > 0 for parameter in distilled.parameters())
    assert losses[-1] < losses[0] / 2


def test_batches_split_in_order():
    distilled = soft_set()
    inputs, labels = distilled.batches(3)
    assert torch.equal(inputs[1], distilled.inputs[2:4])
    assert torch.equal(labels[1], distilled.labels[2:4])
    with pytest.raises(InvalidArgumentError, match="6 inputs"):
        distilled.batches(4)


def test_images_are_shown_in_their_own_units(tmp_path):
    real = torch.rand(6, 3, 4, 4)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.6, 0.7])
    normalized = (real - mean[:, None, None]) / std[:, None, None]
    distilled = DistilledSet(normalized, torch.arange(3).repeat(2), mean=mean, std=std)
    torch.testing.assert_close(distilled.denormalized(), real)
    grid = distilled.images(padding=1)
    assert grid.shape == (3, 2 * 5 + 1, 3 * 5 + 1)
    expected = (real[4] * 255).round().to(torch.uint8)  # second row, second column
    assert ((grid[:, 6:10, 6:10].int() - expected.int()).abs() <= 1).all()  # a rounding at one half
    write_png(tmp_path / "grid.png", grid)
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.mode == "RGB"
        pixels = torch.tensor(list(picture.tobytes()), dtype=torch.uint8)
    assert torch.equal(pixels.view(11, 16, 3).permute(2, 0, 1), grid)


def test_grey_images_and_the_range_of_values(tmp_path):
    grid = image_grid(torch.tensor([-5.0, 0.0, 1.0, 7.0]).view(4, 1, 1), padding=0)
    assert grid.tolist() == [[[0, 0, 255, 255]]]
    write_png(tmp_path / "grid.png", grid)
    with Image.open(tmp_path / "grid.png") as picture:
        assert (picture.mode, picture.size) == ("L", (4, 1))


IMAGES, TARGETS = torch.zeros(4, 1, 2, 2), torch.tensor([0, 0, 0, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DistilledSet(torch.zeros(2), torch.zeros(2).long()), "inputs must have shape"),
        (lambda: DistilledSet(torch.zeros(2, 3).long(), torch.zeros(2).long()), "floating-point"),
        (lambda: DistilledSet(torch.zeros(2, 3), torch.zeros(3).long()), "2 class indices"),
        (lambda: DistilledSet(torch.zeros(2, 3), torch.zeros(2)), "soft labels must have shape"),
        (lambda: DistilledSet(torch.zeros(2, 3), torch.zeros(2, 4), num_classes=5), r"\(2, 5\)"),
        (lambda: DistilledSet(torch.zeros(2, 3), torch.tensor([0, 5]), num_classes=5), r"\[0, 5\)"),
        (lambda: DistilledSet(torch.zeros(2, 3), torch.tensor([0, -1])), "got -1"),
        (lambda: DistilledSet(torch.zeros(2, 3), torch.zeros(2).long(), rates=0.0), "rates"),
        (lambda: DistilledSet(torch.zeros(2, 3), torch.zeros(2).long(), rates=torch.ones(2, 2)), "rates"),
        (lambda: DistilledSet(torch.zeros(2, 3), torch.zeros(2).long(), std=0.0), "std"),
        (lambda: DistilledSet(torch.zeros(2, 3), torch.zeros(2).long(), mean=torch.ones(2)), "mean"),
        (lambda: DistilledSet.from_noise((3,), 2, per_class=0), "per_class, the number"),
        (lambda: DistilledSet.from_noise((3,), 2), "per_class, the number.*got None"),
        (lambda: DistilledSet.from_noise((3,), 2, per_class=1, count=1), "old name of per_class"),
        (lambda: DistilledSet.from_data(IMAGES, TARGETS, per_class=1.0), "per_class, the number.*got 1.0"),
        (lambda: per_class(IMAGES, TARGETS, count=1.5), "count, the number"),
        (lambda: per_class(IMAGES, TARGETS.bool(), count=1), "targets must be integers"),
        (lambda: per_class(IMAGES, TARGETS.tolist(), count=1), "targets must be a tensor, got list"),
        (lambda: per_class(IMAGES, TARGETS, count=1, representatives="means"), "representatives must be a"),
        (lambda: DistilledSet(torch.zeros(2, 3), [0, 1]), "labels must be a tensor, got list"),
        (lambda: DistilledSet([[0.0]], torch.zeros(1).long()), "inputs must be a tensor, got list"),
        (lambda: DistilledSet.from_noise(4, 2, per_class=1), "shape must be a tuple"),
        (lambda: DistilledSet(torch.zeros(2, 3), torch.zeros(2).long(), num_classes=3.5), "3.5"),
        (lambda: DistilledSet(torch.zeros(2, 3), torch.zeros(2).long(), num_classes=10**12), "num_classes"),
        (lambda: DistilledSet(torch.zeros(2, 3), torch.zeros(2).long(), num_classes=True), "num_classes"),
        (lambda: DistilledSet(torch.zeros(2, 3), torch.zeros(2).long(), metadata="text"), "metadata"),
        (lambda: DistilledSet.from_noise((3,), 2, per_class=1, labels="soft"), "'one-hot'"),
        (lambda: DistilledSet.from_data(IMAGES, TARGETS, per_class=2), "class 1 has 1"),
        (lambda: DistilledSet.from_data(IMAGES, TARGETS, per_class=1, num_classes=3), "class 2 has 0"),
        (lambda: DistilledSet.from_data(IMAGES, TARGETS[:3], per_class=1), "one for each image"),
        (lambda: DistilledSet.from_data(IMAGES, TARGETS - 1, per_class=1), "got -1"),
        (lambda: hard_set().images(), "images must have shape"),
        (lambda: image_grid(IMAGES, columns=0), "columns"),
        (lambda: image_grid(IMAGES, padding=-1), "padding"),
        (lambda: write_png("none.png", IMAGES[0]), "uint8"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(InvalidArgumentError, match=message):
        call()


def test_refuses_what_is_not_finite():
    with pytest.raises(NonFiniteError, match="inputs"):
        DistilledSet(torch.full((2, 3), torch.nan), torch.zeros(2).long())
    with pytest.raises(NonFiniteError, match="images"):
        DistilledSet.from_data(IMAGES + torch.inf, TARGETS, per_class=1)


@pytest.mark.parametrize(
    ("missing", "call"),
    [
        ("safetensors", lambda path: hard_set().save(path)),
        ("safetensors", DistilledSet.load),
        ("PIL", lambda path: write_png(path, torch.zeros(1, 1, 1, dtype=torch.uint8))),
        ("sklearn", lambda path: kmeans_centers(IMAGES, 1, None)),
    ],
)
def test_names_the_extra_that_is_missing(missing, call, monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingDependencyError, match=r"etflayers\[distill\]"):
        call(tmp_path / "file")


def test_a_reader_unpickles_nothing(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("unpickled")

    soft_set().save(tmp_path / "set.safetensors")
    for module in (pickle, torch):
        monkeypatch.setattr(module, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    assert DistilledSet.load(tmp_path / "set.safetensors").num_classes == 3


def test_the_same_set_is_the_same_file(tmp_path):
    """safetensors writes several entries of metadata in an order that changes from file to file."""
    distilled = DistilledSet.from_noise((1, 4, 4), 3, per_class=2)
    files = [tmp_path / f"{i}.safetensors" for i in range(12)]
    for file in files:
        distilled.save(file)
    assert len({file.read_bytes() for file in files}) == 1
