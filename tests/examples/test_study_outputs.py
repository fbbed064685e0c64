"""What a study writes: tables, figures, the report and logs, of runs that are made up."""

from __future__ import annotations

import base64
import json
import math
import struct
import sys
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from rich.console import Console

from collapse_study import HEADLINES, headline_table, summary_rows, tidy_rows
from etflayers import simplex_etf
from etflayers.errors import MissingDependencyError
from lab import pictures as figures
from lab.classifiers import Trained
from lab.figures import HEAD_COLORS, STYLE
from lab.loggers import loggers
from lab.measures import MEASURES
from lab.report import write_report
from lab.results import Results

HEADS = ("linear", "standard", "fixed", "nearest", "nearest-detached", "learned")
EPOCHS = 12
FEW = ("nc1_trace", "nc4_disagreement", "margin_mean")


def made_up_run(head: str, seed: int, num_classes: int, epochs: int = EPOCHS) -> Trained:
    """Curves that fall towards their ideals at a pace of the head, with noise of the seed."""
    generator = np.random.default_rng([seed, HEADS.index(head), num_classes])
    pace = 0.15 + 0.08 * HEADS.index(head)
    is_frame = head not in ("linear", "standard")
    history = []
    for epoch in range(epochs + 1):
        row = {"epoch": epoch, "seconds": 0.0 if epoch == 0 else 3 + generator.random()}
        fallen = math.exp(-pace * epoch)
        for part, floor in (("train", 0.002), ("test", 0.05)):
            for name, measure in MEASURES.items():
                noise = math.exp(0.2 * generator.normal())
                if name == "nc2_etf_drift_means" and part == "test":
                    continue
                value = (floor + fallen) * noise
                if measure.ideal == 1:
                    value = max(0.0, 1 - value)
                elif name == "margin_mean":
                    value = num_classes / (num_classes - 1) * (1 - min(1.0, value))
                elif name.endswith("_weights") and is_frame:
                    value = 1e-7 * noise
                elif name == "nc4_disagreement" and part == "train":
                    value = max(0.0, fallen - 0.3)
                row[f"{part}_{name}"] = value
        row["train_accuracy"] = 1.0 if fallen < 0.2 else 1 - fallen
        row["train_nc2_etf_drift_means"] = math.nan if epoch == 0 else fallen * 0.3
        history.append(row)
    frame = simplex_etf(num_classes, 16, dtype=torch.float64)
    draws = torch.Generator().manual_seed(seed)

    def noisy(size: float) -> torch.Tensor:
        noise = torch.randn(frame.shape, generator=draws, dtype=torch.float64)
        return frame + size * noise / 4

    def margins(mean: float, count: int) -> torch.Tensor:
        return (mean + 0.3 * torch.randn(count, generator=draws, dtype=torch.float64)).sort().values

    targets = torch.arange(40) % num_classes
    snapshots = {
        "first_class_means": noisy(1.5),
        "last_class_means": 7 + noisy(0.2 * pace),
        "first_frame": frame if is_frame else noisy(2),
        "last_frame": frame if is_frame else noisy(0.3),
        "first_train_margins": margins(-0.3, 300),
        "last_train_margins": margins(0.9 - 0.05 / pace, 300),
        "last_test_margins": margins(0.7 - 0.05 / pace, 100),
    }
    if num_classes == 4:
        features = snapshots["last_class_means"][targets]
        snapshots["last_features"] = features + 0.1 * torch.randn(40, 16, generator=draws).double()
        snapshots["last_features_targets"] = targets
    return Trained(head, seed, history, snapshots, torch.nn.Identity())


@pytest.fixture(scope="module")
def runs() -> list[Trained]:
    return [made_up_run(head, seed, 4) for head in HEADS for seed in range(3)]


@pytest.fixture(scope="module")
def pictures(runs: list[Trained], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:  # fewer panels: drawing takes most of the time here
        patch.setattr(figures, "all_of", lambda part: [f"{part}_{name}" for name in FEW])
        patch.setattr(figures, "COLLAPSE", [f"train_{name}" for name in FEW])
        patch.setitem(STYLE, "figure.dpi", 90)
        results = Results(tmp_path_factory.mktemp("figures"), Console(quiet=True))
        return results.figures(figures.study_pictures(runs, "Made up"))


def last_values(runs: list[Trained], head: str, measure: str) -> np.ndarray:
    return np.array([run.history[-1][measure] for run in runs if run.head == head])


def without(run: Trained, *words: str) -> Trained:
    """The run without the measures whose name has one of the words."""
    history = [
        {name: value for name, value in row.items() if not any(word in name for word in words)}
        for row in run.history
    ]
    return Trained(run.head, run.seed, history, run.snapshots, run.model)


def test_long_table_has_every_number_that_exists(runs: list[Trained]) -> None:
    found = {
        (row["head"], row["seed"], row["epoch"], row["measure"]): row["value"] for row in tidy_rows(runs)
    }
    expected = {
        (run.head, run.seed, epoch, name): value
        for run in runs
        for epoch, row in enumerate(run.history)
        for name, value in row.items()
        if name != "epoch" and value == value
    }
    assert found == expected
    assert ("fixed", 0, 1, "train_nc2_etf_drift_means") in found
    assert ("fixed", 0, 0, "train_nc2_etf_drift_means") not in found


@pytest.mark.parametrize("measure", ["train_nc1_trace", "test_accuracy", "train_nc2_etf_drift_means"])
def test_summary_equals_numpy(runs: list[Trained], measure: str) -> None:
    for head in HEADS:
        (row,) = [r for r in summary_rows(runs) if (r["head"], r["measure"]) == (head, measure)]
        values = last_values(runs, head, measure)
        assert row["mean"] == pytest.approx(values.mean(), rel=1e-12)
        assert row["std"] == pytest.approx(values.std(ddof=1), rel=1e-12)
        assert row["median"] == np.median(values)
        assert (row["min"], row["max"], row["seeds"]) == (values.min(), values.max(), 3)


def test_one_seed_has_no_deviation(runs: list[Trained]) -> None:
    assert {row["std"] for row in summary_rows(runs[:1])} == {None}


def test_epochs_until_something_is_reached() -> None:
    distance = "train_nc2_etf_distance_means"
    histories = (
        [(0, 0.5, 0.9), (1, 1.0, 0.2), (2, 1.0, 0.07)],
        [(0, 0.5, 0.9), (1, 0.9, 0.3), (2, 1.0, 0.15)],
    )
    runs = [
        Trained(
            "fixed",
            seed,
            [{"epoch": epoch, "train_accuracy": accuracy, distance: d} for epoch, accuracy, d in history],
            {},
            torch.nn.Identity(),
        )
        for seed, history in enumerate(histories)
    ]
    rows = {row["measure"]: row for row in summary_rows(runs)}
    assert (rows["epochs_to_100"]["min"], rows["epochs_to_100"]["max"]) == (1, 2)
    assert rows["epochs_to_etf_0.2"]["mean"] == 1.5
    # One seed got to 0.1, none to 0.05: no mean over those that did.
    assert (rows["epochs_to_etf_0.1"]["mean"], rows["epochs_to_etf_0.1"]["seeds"]) == (None, 1)
    assert (rows["epochs_to_etf_0.05"]["mean"], rows["epochs_to_etf_0.05"]["seeds"]) == (None, 0)


def test_terminal_table_fits_eighty_columns(runs: list[Trained]) -> None:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(headline_table(summary_rows(runs), "Made up"))
    text = captured.get()
    assert "…" not in text
    for head in HEADS:
        assert f"{100 * last_values(runs, head, 'test_accuracy').mean():.2f}" in text


def test_what_does_not_exist_is_a_dash(runs: list[Trained]) -> None:
    table = headline_table(summary_rows([without(runs[0], "etf")]), "")
    assert [list(column.cells) for column in table.columns].count(["–"]) == 1


def test_every_figure_shows_every_head(pictures: list[Path]) -> None:
    assert {path.stem for path in pictures} == {
        "collapse",
        "measures",
        "measures_test",
        "etf_distances",
        "margins",
        "cosines",
        "accuracy",
        "loss",
        "class_means_3d",
    }
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            counts = {color: count for count, color in picture.convert("RGB").getcolors(2**24)}
        for head in HEADS:
            assert counts.get(ImageColor.getrgb(HEAD_COLORS[head]), 0) > 20, (path.name, head)


def test_the_tetrahedron_is_for_four_classes() -> None:
    assert "class_means_3d" not in figures.study_pictures([made_up_run("fixed", 0, 10)], "")
    assert "class_means_3d" in figures.study_pictures([made_up_run("fixed", 0, 4)], "")


def test_panels_are_for_measures_that_exist(runs: list[Trained]) -> None:
    narrow = [without(run, "etf") for run in runs]  # as with fewer than K - 1 features
    whole = figures.measure_figure(figures.COLLAPSE, 4, runs, "")
    figure = figures.measure_figure(figures.COLLAPSE, 4, narrow, "")
    assert len(whole.axes) == len(figures.COLLAPSE)
    assert len(figure.axes) == len(figures.COLLAPSE) - 1


def test_axis_is_logarithmic_where_curves_fall_towards_zero(runs: list[Trained]) -> None:
    names = ("train_nc1_trace", "train_nc2_equinorm_weights", "train_margin_mean", "train_nc3_cosine")
    axes = figures.measure_figure(names, 4, runs, "").axes
    assert [one.get_yscale() for one in axes] == ["log", "log", "linear", "linear"]
    low, high = axes[1].get_ylim()  # frames are ETFs up to 1e-7: that must not squeeze the other curves
    assert high / low < 1e5


class Page(HTMLParser):
    """Checks that tags match; collects references, pictures and the text of table cells."""

    VOID = ("meta", "img", "br", "link", "hr")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.ids: set[str] = set()
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data"):
                self.references.append(value or "")
            if name == "id":
                self.ids.add(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


@pytest.fixture(scope="module")
def report(runs: list[Trained], pictures: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"lr": 0.0123, "note": "<script>alert(1)</script>"}
    folder = tmp_path_factory.mktemp("report")
    command = "python study.py --out 'a b'"
    return write_report(folder, runs, summary_rows(runs), HEADLINES, pictures, settings, "A < B & C", command)


def read(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text())
    page.close()
    assert page.open == []
    return page


def test_report_refers_to_nothing_outside(report: Path, pictures: list[Path]) -> None:
    page = read(report)
    embedded = [ref for ref in page.references if ref.startswith("data:image/png;base64,")]
    anchors = [ref for ref in page.references if ref.startswith("#")]
    assert len(embedded) + len(anchors) == len(page.references)
    assert {ref[1:] for ref in anchors} <= page.ids
    assert [base64.b64decode(ref.partition(",")[2]) for ref in embedded] == [p.read_bytes() for p in pictures]
    assert not any(word in report.read_text() for word in ("http:", "https:", "url(", "@import", "<script"))


def test_report_has_all_numbers(report: Path, runs: list[Trained]) -> None:
    texts = read(report).texts
    rows = summary_rows(runs)
    start = texts.index("All numbers", texts.index("Figures") + 1)
    for row in rows:  # in order: the cells behind the name of the measure, in the table of the head
        start = texts.index(row["measure"], start)
        cells = [text for text in texts[start + 1 : start + 20] if text][:6]
        expected = [row[name] for name in ("mean", "std", "median", "min", "max", "seeds")]
        assert cells == ["–" if value is None else f"{value:.4g}" for value in expected]


def test_report_says_how_it_was_made(report: Path) -> None:
    texts = read(report).texts
    assert "A < B & C" in texts
    assert "python study.py --out 'a b'" in texts
    assert "0.0123" in texts
    assert "<script>alert(1)</script>" in texts
    assert torch.__version__ in texts
    for name, measure in MEASURES.items():
        assert texts[texts.index(measure.label) :][:8].count(measure.formula) == 1, name


def log_twice(folder: Path, **options: Any) -> None:
    """As of a training that logs the epochs 0 to 3, is killed, and continues after epoch 1."""
    wanted = {"tensorboard": False, "wandb": "off", **options}
    for epochs, factor in ((range(4), 1), (range(2, 6), 10)):
        with loggers(folder, "fixed-seed0", {}, **wanted) as log:
            for epoch in epochs:
                drift = math.nan if epoch == 0 else 0.5
                log({"epoch": epoch, "train_loss": factor * epoch, "train_nc2_etf_drift_means": drift})


def test_tensorboard_has_every_epoch_once(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log_twice(tmp_path, tensorboard=True)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "fixed-seed0")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(0, 0), (1, 1), (2, 20), (3, 30), (4, 40), (5, 50)]
    assert [event.step for event in events.Scalars("train/nc2_etf_drift_means")] == [1, 2, 3, 4, 5]


def test_wandb_keeps_the_rows_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    wandb = pytest.importorskip("wandb")
    log_twice(tmp_path, wandb="offline")
    wandb.teardown()  # ends the process that writes
    first, second = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert first.name == second.name  # one run on the server
    before, after = logged_offline(first), logged_offline(second)
    assert [row["train/loss"] for row in before] == [0, 1, 2, 3]
    assert [(row["_step"], row["train/loss"]) for row in after] == [(2, 20), (3, 30), (4, 40), (5, 50)]
    assert "train/nc2_etf_drift_means" not in before[0]


def logged_offline(path: Path) -> list[dict[str, Any]]:
    """The rows in a file of Weights & Biases.

    7 bytes of head, then blocks of 32 KiB of records, each with a checksum (4 bytes), a length (2) and a kind
    (1; 1 is a record in one piece) before its content.
    """
    protocol = import_module("wandb.proto.wandb_internal_pb2")
    content, position, rows = path.read_bytes(), 7, []
    assert content.startswith(b":W&B")
    assert len(content) < 2**15
    while position < len(content):
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        assert kind == 1
        record = protocol.Record.FromString(content[position + 7 : position + 7 + length])
        position += 7 + length
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            rows.append({key: json.loads(value) for key, value in items.items()})
    return rows


def test_no_logger_leaves_no_trace(tmp_path: Path) -> None:
    log_twice(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "options"),
    [("torch.utils.tensorboard", {"tensorboard": True}), ("wandb", {"wandb": "offline"})],
)
def test_missing_logger_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str, options: dict[str, object]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    with pytest.raises(MissingDependencyError, match=r"etflayers\[tracking\]"):
        log_twice(tmp_path, **options)
