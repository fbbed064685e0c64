"""``python -m etflayers.demo``: its numbers are those of plain formulas, and it runs with PyTorch alone."""

from __future__ import annotations

import sys

import pytest
import torch

from etflayers.demo import HEADS, digits, gaussians, main, measure, perceptron, train


@pytest.mark.usefixtures("one_thread")
def test_measures_are_the_formulas() -> None:
    problem = gaussians(per_class=20)
    model = perceptron(HEADS["FixedETFHead"](), 64)
    train(model, problem, epochs=2)
    result = measure(model, problem)
    inputs, targets = problem.train
    with torch.no_grad():
        features = torch.nn.functional.normalize(model[:-1](inputs).double())
        right = (model(problem.test[0]).argmax(1) == problem.test[1]).sum()
    classes = [features[targets == k] for k in range(10)]
    means = torch.stack([each.mean(0) for each in classes])
    within = sum(((each - each.mean(0)) ** 2).sum() for each in classes) / len(targets)
    centered = means - means.mean(0)
    cosines = torch.nn.functional.normalize(centered) @ torch.nn.functional.normalize(centered).T
    off = ~torch.eye(10, dtype=torch.bool)
    assert result.nc1 == pytest.approx((within / (centered**2).sum(1).mean()).item(), rel=1e-5)
    assert result.nc2 == pytest.approx((cosines[off] + 1 / 9).abs().mean().item(), rel=1e-5)
    assert result.test_accuracy == right / len(problem.test[1])


def test_gaussian_classes_overlap_as_told() -> None:
    problem = gaussians(per_class=4000)
    means = torch.randn(10, 64, generator=torch.Generator().manual_seed(0)) / 2
    wrong = torch.cdist(problem.inputs, means).argmin(1) != problem.targets
    assert 0.015 < wrong.double().mean() < 0.025
    assert torch.equal(problem.targets.bincount(), torch.full((10,), 4000))


def test_splits_share_no_sample() -> None:
    pytest.importorskip("sklearn")
    problem = digits(seed=3)
    assert len(problem.train[1]) + len(problem.test[1]) == 1797
    assert not torch.equal(problem.targets, digits(seed=4).targets)
    assert problem.inputs.min() == 0
    assert problem.inputs.max() == 1


def test_without_scikit_learn_classes_are_gaussian(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    main(["--epochs", "1"])
    text = capsys.readouterr().out
    assert "scikit-learn" in text
    assert "1440 samples of Gaussian classes to train, 360 to test" in text
    assert [line.split()[0] for line in text.splitlines() if "%" in line] == list(HEADS)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), random)
    with pytest.raises(SystemExit, match="2"):
        main(["--data", "digits"])
    assert "pip install 'etflayers[distill]'" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--epochs=0", "--seed=-1", "--data=mnist", "--epochs=x"])
def test_options_that_make_no_sense_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([option])
    assert option[2:6] in capsys.readouterr().err


@pytest.mark.slow
def test_the_nearest_head_collapses_and_all_are_accurate(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    main([])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "%" in line]
    numbers = {row[0]: [float(cell.rstrip("%")) for cell in row[1:]] for row in rows}
    assert all(train == 100 and test > 97 for train, test, *_ in numbers.values())
    nearest, linear = numbers["NearestETFHead"], numbers["nn.Linear"]
    assert nearest[2] < linear[2] / 10
    assert nearest[3] < linear[3] / 5
