"""The explorer: its projection against what geometry knows, its files, and resuming."""

from __future__ import annotations

import copy
import json
import math
import sys
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import collapse_study
import explorer
from collapse_study import StudySettings
from etflayers import simplex_etf
from etflayers.errors import InvalidArgumentError, MissingDependencyError
from etflayers.metrics import ClassStatistics
from lab.classifiers import Trained, train
from lab.data import load
from lab.explorer import exploration, read_exploration, write_exploration, write_page
from lab.results import Results
from lab.settings import Settings
from lab.views import (
    MOST_EPOCHS,
    MOST_FEATURES,
    Moment,
    class_coordinates,
    corners,
    is_exact,
    is_kept,
    moment_of,
    pictures,
)

pytest.importorskip("plotly", reason="pip install 'etflayers[examples]'")

QUICK: dict[str, Any] = {"data": "digits", "classes": 4, "per_class": 40, "epochs": 3, "batch_size": 40}


def made_up(num_classes: int, dim: int, seed: int, features: int = 40) -> Moment:
    """A state of no particular shape, in float64."""
    draws = torch.Generator().manual_seed(seed)

    def noise(rows: int) -> Tensor:
        return torch.randn(rows, dim, generator=draws, dtype=torch.float64)

    targets = torch.arange(features) % num_classes
    means = 3 + noise(num_classes)
    return {
        "epoch": seed,
        "means": means,
        "variances": torch.rand(num_classes, generator=draws, dtype=torch.float64),
        "frame": 5 * noise(num_classes) - 1,
        "features": means[targets] + 0.3 * noise(features),
        "targets": targets,
    }


def collapsed(num_classes: int, dim: int) -> Moment:
    """A simplex ETF, turned, moved and stretched, with all features at their mean and a dual classifier."""
    generator = torch.Generator().manual_seed(num_classes)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64)).Q
    means = 2 + 7 * simplex_etf(num_classes, dim, dtype=torch.float64) @ rotation
    targets = torch.arange(3 * num_classes) % num_classes
    own = {"means": means, "variances": torch.zeros(num_classes), "frame": 0.1 * means - 4}
    return {"epoch": 1, **own, "features": means[targets], "targets": targets}


def linear_map(now: Moment, points: Tensor) -> Tensor:
    """The matrix that took the features, about the mean of the class means, to these points."""
    return torch.linalg.lstsq(now["features"] - now["means"].mean(0), points).solution


@pytest.mark.parametrize("num_classes", range(2, 14))
def test_coordinates_of_classes_are_orthonormal_and_centered(num_classes: int) -> None:
    columns = class_coordinates(num_classes)
    rank = min(3, num_classes - 1)
    torch.testing.assert_close(columns.mT @ columns, torch.eye(rank).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(columns.sum(0), torch.zeros(rank).double(), atol=1e-12, rtol=0)
    # No two corners of the picture coincide, and their root mean square length is 1.
    assert torch.pdist(corners(num_classes)).min() > 0.1
    assert corners(num_classes).square().sum(1).mean() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("num_classes", [2, 3, 4])
def test_few_class_means_keep_all_their_distances(num_classes: int) -> None:
    recording = [made_up(num_classes, 16, seed) for seed in range(3)]
    for now, picture in zip(recording, pictures(recording), strict=True):
        centered = now["means"] - now["means"].mean(0)
        unit = centered.square().sum(1).mean().sqrt()
        distances = torch.pdist(picture.means)
        torch.testing.assert_close(distances, torch.pdist(centered) / unit, rtol=1e-6, atol=0)
        assert picture.shares[0] == pytest.approx(1, abs=1e-12)
        assert all(0 < share < 1 for share in picture.shares[1:])


@pytest.mark.parametrize("num_classes", [2, 3, 4, 5, 10, 33])
def test_collapse_stands_in_the_corners(num_classes: int) -> None:
    (picture,) = pictures([collapsed(num_classes, num_classes + 3)])
    expected = corners(num_classes)
    for points in (picture.means, picture.frame, picture.features[:num_classes]):
        torch.testing.assert_close(points, expected, atol=1e-9, rtol=0)
    share = min(1.0, 3 / (num_classes - 1))
    assert picture.shares[0] == pytest.approx(share, abs=1e-9)
    assert picture.shares[2] == pytest.approx(share, abs=1e-9)
    torch.testing.assert_close(picture.distances, torch.zeros(num_classes).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(picture.cosines, torch.ones(num_classes).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(picture.spreads, torch.zeros(num_classes).double(), atol=1e-9, rtol=0)


def test_four_corners_are_a_regular_tetrahedron_and_six_an_octahedron() -> None:
    tetrahedron, octahedron = torch.pdist(corners(4)), torch.pdist(corners(6)).sort().values
    # On the unit sphere: edges sqrt(8/3); 12 edges sqrt(2) and 3 diagonals 2.
    torch.testing.assert_close(
        tetrahedron, torch.full((6,), math.sqrt(8 / 3), dtype=torch.float64), atol=1e-12, rtol=0
    )
    lengths = torch.tensor([math.sqrt(2)] * 12 + [2.0] * 3, dtype=torch.float64)
    torch.testing.assert_close(octahedron, lengths, atol=1e-12, rtol=0)


def test_many_classes_are_seen_by_one_orthogonal_projection() -> None:
    """The map is found again from the features, which span everything: it is one map for all epochs."""
    recording = [made_up(7, 12, seed) for seed in range(3)]
    maps = []
    for now, picture in zip(recording, pictures(recording), strict=True):
        centered = now["means"] - now["means"].mean(0)
        unit = centered.square().sum(1).mean().sqrt()
        maps.append(unit * linear_map(now, picture.features))
        projected = centered @ maps[-1]
        torch.testing.assert_close(picture.means, projected / unit, atol=1e-9, rtol=0)
        # What the page says is lost: 1 - share of the squares, less the magnification of the picture.
        magnification = (7 - 1) / 3
        share = float(projected.square().sum() / magnification / centered.square().sum())
        assert picture.shares[0] == pytest.approx(share, rel=1e-9)
        torch.testing.assert_close(
            maps[-1].mT @ maps[-1], magnification * torch.eye(3).double(), atol=1e-9, rtol=0
        )
    for other in maps[1:]:
        torch.testing.assert_close(other, maps[0], atol=1e-9, rtol=0)
    assert not is_exact(7)


def test_four_classes_are_seen_by_an_orthogonal_projection_of_each_epoch() -> None:
    recording = [made_up(4, 12, seed) for seed in range(2)]
    maps = [
        linear_map(now, picture.features) for now, picture in zip(recording, pictures(recording), strict=True)
    ]
    for one in maps:
        gram = one.mT @ one
        torch.testing.assert_close(gram, gram[0, 0] * torch.eye(3).double(), atol=1e-9, rtol=0)
    assert (maps[0] - maps[1]).norm() > 0.1


def test_numbers_of_the_hover_texts_equal_their_definitions() -> None:
    now = made_up(4, 9, 0)
    (picture,) = pictures([now])
    centered = now["means"] - now["means"].mean(0)
    rows = now["frame"] - now["frame"].mean(0)
    unit = centered.square().sum(1).mean().sqrt()
    for k in range(4):
        spread = now["variances"][k].sqrt() / unit
        assert float(picture.spreads[k]) == pytest.approx(float(spread), rel=1e-9)
        cosine = rows[k] @ centered[k] / rows[k].norm() / centered[k].norm()
        assert float(picture.cosines[k]) == pytest.approx(float(cosine), rel=1e-9)
    # The picture is exact: the distance from the corner can be measured in it.
    torch.testing.assert_close(picture.distances, (picture.means - corners(4)).norm(dim=1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("num_classes", [4, 6])
def test_coinciding_means_stand_in_the_middle(num_classes: int) -> None:
    dead = made_up(num_classes, 8, 0)
    dead |= {"means": torch.ones(num_classes, 8), "features": torch.ones(40, 8)}
    (picture,) = pictures([dead])
    assert picture.means.abs().max() == picture.features.abs().max() == 0
    assert all(
        bool(tensor.isfinite().all()) for tensor in (picture.frame, picture.distances, picture.cosines)
    )
    assert all(math.isfinite(share) for share in picture.shares)


@pytest.mark.parametrize(("num_classes", "dim"), [(4, 2), (1, 8), (10, 8)])
def test_too_few_dimensions_are_refused(num_classes: int, dim: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{num_classes} classes and {dim} features"):
        pictures([made_up(num_classes, dim, 0)])
    with pytest.raises(InvalidArgumentError, match="at least one epoch"):
        pictures([])


def test_too_few_features_are_refused_before_training(tmp_path: Path) -> None:
    settings = Settings(**QUICK, feature_dim=2, out=tmp_path)
    with pytest.raises(InvalidArgumentError, match="4 classes and 2 features"):
        train("linear", 0, settings, load(settings), recorded=True)
    assert list(tmp_path.iterdir()) == []


def test_a_moment_keeps_the_first_images_of_every_class() -> None:
    targets = torch.tensor([0, 1] * 200 + [2, 0, 2])  # the third class is rare
    features = torch.arange(len(targets), dtype=torch.float64).unsqueeze(1).expand(-1, 5)
    means, counts = torch.zeros(3, 5), targets.bincount()
    statistics = ClassStatistics(torch.arange(3), counts, means, torch.ones(3), torch.zeros(0))
    kept = moment_of(2, statistics, means, features, targets)
    each = MOST_FEATURES // 3
    expected = [*range(0, 2 * each, 2), *range(1, 2 * each, 2), 400, 402]
    assert kept["features"][:, 0].tolist() == expected
    assert kept["targets"].tolist() == [0] * each + [1] * each + [2, 2]
    assert kept["features"].untyped_storage().nbytes() == kept["features"].numel() * 4  # no view of all


@pytest.mark.parametrize("epochs", [1, 2, MOST_EPOCHS, MOST_EPOCHS + 1, 200, 999])
def test_long_trainings_are_thinned(epochs: int) -> None:
    kept = [epoch for epoch in range(epochs + 1) if is_kept(epoch, epochs)]
    assert {0, epochs} <= set(kept)
    assert min(epochs, MOST_EPOCHS // 2) < len(kept) <= MOST_EPOCHS + 2


class InterruptionError(Exception):
    pass


def written(run: Trained, path: Path) -> bytes:
    names = ("0", "1", "2", "3")
    return write_exploration(path, exploration([run], "digits", names)).read_bytes()


def test_interrupted_run_resumes_to_the_same_file(tmp_path: Path) -> None:
    def until(end: int) -> Any:
        def progress(step: int, total: int, row: object) -> None:
            if step == end:
                raise InterruptionError

        return progress

    whole = Settings(**QUICK, out=tmp_path / "whole")
    data = load(whole)
    expected = written(train("nearest", 0, whole, data, recorded=True), tmp_path / "whole.json")
    broken = Settings(**QUICK, out=tmp_path / "broken", checkpoint_every=1)
    with pytest.raises(InterruptionError):
        train("nearest", 0, broken, data, recorded=True, progress=until(6))
    again = Settings(**QUICK, out=tmp_path / "broken", resume=True)
    with pytest.raises(InterruptionError):  # a run that is recorded goes on so, asked for or not
        train("nearest", 0, again, data, progress=until(10))
    assert written(train("nearest", 0, again, data, recorded=True), tmp_path / "again.json") == expected
    content = read_exploration(tmp_path / "again.json")
    assert content["runs"][0]["epochs"] == [0, 1, 2, 3]


def test_epochs_that_were_not_recorded_cannot_be_shown(tmp_path: Path) -> None:
    settings = Settings(**QUICK | {"epochs": 1}, out=tmp_path)
    data = load(settings)
    run = train("fixed", 0, settings, data)
    with pytest.raises(InvalidArgumentError, match=r"recorded=True.*fixed-seed0"):
        exploration([run], "digits", data.class_names)
    with pytest.raises(InvalidArgumentError, match=r"not recorded.*--overwrite"):
        train("fixed", 0, Settings(**QUICK | {"epochs": 1}, out=tmp_path, resume=True), data, recorded=True)


def test_study_writes_the_page_and_again_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Results, "figures", lambda self, makers: [])
    arguments = [
        "--data",
        "digits",
        "--classes",
        "4",
        "--per-class",
        "40",
        "--batch-size",
        "40",
        "--epochs",
        "2",
    ]
    arguments += ["--head", "linear", "fixed", "--seeds", "0", "--explorer", "--out", str(tmp_path)]
    assert collapse_study.main(arguments) == 0
    before = {name: (tmp_path / name).read_bytes() for name in ("explorer.json", "explorer.html")}
    assert collapse_study.main([*arguments, "--resume"]) == 0
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    content = read_exploration(tmp_path)
    assert [run["head"] for run in content["runs"]] == ["linear", "fixed"]
    history = json.loads((tmp_path / "fixed-seed0.json").read_text())["history"]
    measures = content["runs"][1]["measures"]
    for name, measure in (
        ("nc1", "train_nc1_trace"),
        ("nc2", "train_nc2_etf_distance_means"),
        ("nc3", "train_nc3_distance"),
    ):
        assert measures[name] == pytest.approx([row[measure] for row in history], rel=1e-3)
    assert measures["test_accuracy"] == pytest.approx([row["test_accuracy"] for row in history], rel=1e-3)


def test_missing_plotly_is_said_before_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(MissingDependencyError, match=r"etflayers\[examples\]"):
        StudySettings(explorer=True, out=tmp_path).check()
    StudySettings(out=tmp_path).check()


def made_up_content(names: tuple[str, ...] = ("a", "b", "c", "d")) -> dict[str, Any]:
    """As a study writes it, of two made-up heads and epochs."""
    rows = [
        {"epoch": epoch, "train_nc1_trace": 0.5 / (1 + epoch), "train_accuracy": 0.5} for epoch in range(2)
    ]
    recording = [made_up(len(names), 8, seed) for seed in range(2)]
    runs = [Trained(head, 0, rows, {}, torch.nn.Identity(), recording) for head in ("linear", "fixed")]
    return exploration(runs, "Made up & <new>", names)


def test_points_are_kept_to_a_thousandth_and_what_does_not_exist_is_null(tmp_path: Path) -> None:
    content = made_up_content()
    assert read_exploration(write_exploration(tmp_path / "explorer.json", content)) == json.loads(
        json.dumps(content)
    )
    expected = pictures([made_up(4, 8, seed) for seed in range(2)])
    for frame, picture in zip(content["runs"][0]["frames"], expected, strict=True):
        for name in ("means", "frame", "features"):
            points = torch.tensor(frame[name], dtype=torch.float64).view(-1, 3) / 1000
            torch.testing.assert_close(points, getattr(picture, name), atol=5e-4, rtol=0)
    assert content["runs"][0]["measures"]["nc1"] == [0.5, 0.25]
    assert content["runs"][0]["measures"]["nc2"] == [None, None]


class References(HTMLParser):
    """What a page refers to, and the texts of its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str | None] = []
        self.policy = ""
        self.scripts: list[str] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        values = dict(attrs)
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"] or ""
        self.inside = tag == "script"
        if self.inside:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] += data


def test_page_has_everything_in_it(tmp_path: Path) -> None:
    hostile = ("</script><b>", "<!--", "a & b", "'\"")
    content = made_up_content(hostile)
    page = References()
    page.feed(write_page(tmp_path / "explorer.html", [content]).read_text(encoding="utf-8"))
    assert page.references == ["data:,"]
    # The browser is forbidden to load anything, whatever the libraries inside would like to.
    assert page.policy.startswith("default-src 'none';")
    assert "http" not in page.policy
    data, plotly, own = page.scripts
    assert json.loads(data)["trainings"] == [json.loads(json.dumps(content))]
    assert len(plotly) > 1_000_000
    assert "plotly.js" in plotly[:200]
    assert own.strip().endswith("})();")


def broken(change: Any) -> str:
    content = copy.deepcopy(made_up_content())
    change(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no JSON", "got None"),
        ("[1, 2]", "got None"),
        ('{"format": "etflayers explorer 9"}', "got 'etflayers explorer 9'"),
        ('{"format": "etflayers explorer 1"}', "damaged: it lacks 'classes'"),
        (broken(lambda content: content["runs"].clear()), "damaged: it has no training"),
        (
            broken(lambda content: content["runs"][0]["frames"].pop()),
            "linear-seed0 has 2 epochs and 1 of frames",
        ),
        (
            broken(lambda content: content["runs"][1]["frames"][1]["means"].pop()),
            "fixed-seed0 must have 4 points",
        ),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "explorer.json"
    path.write_text(text)
    with pytest.raises(InvalidArgumentError, match=f"explorer.json .*{message}"):
        read_exploration(tmp_path)


def test_what_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"does not exist.*--explorer"):
        read_exploration(tmp_path)
    with pytest.raises(InvalidArgumentError, match="at least one"):
        write_page(tmp_path / "page.html", [])
    with pytest.raises(InvalidArgumentError, match="at least one training"):
        exploration([], "nothing", ())
    with pytest.raises(InvalidArgumentError, match="must name the 4 classes of the trainings, got 2"):
        exploration([Trained("linear", 0, [], {}, torch.nn.Identity(), [made_up(4, 8, 0)])], "", ("a", "b"))


def test_command_writes_the_page_of_the_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explorer.main(["--out", str(tmp_path / "demo.html")]) == 0
    page = References()
    page.feed((tmp_path / "demo.html").read_text(encoding="utf-8"))
    shown = json.loads(page.scripts[0])["trainings"]
    assert [(len(training["classes"]), training["exact"]) for training in shown] == [(4, True), (10, False)]
    for training in shown:  # it is a page about collapse, and the trainings do
        for run in training["runs"]:
            assert run["measures"]["nc1"][-1] < 0.5 * run["measures"]["nc1"][0]
            assert max(run["frames"][-1]["distances"]) < 0.5
    assert sum(path.stat().st_size for path in explorer.DEMO) <= 400_000
    assert explorer.main([str(tmp_path), "--out", str(tmp_path / "none.html")]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "none.html").exists()


def test_edges_join_different_corners() -> None:
    for count in (2, 3, 4):
        names = tuple("abcd"[:count])
        assert made_up_content(names)["edges"] == list(combinations(range(count), 2))
    edges = made_up_content(tuple("abcdefg"))["edges"]
    assert len({frozenset(edge) for edge in edges}) == 14
    assert all(i != j for i, j in edges)
