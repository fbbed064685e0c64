"""What goes wrong around a run: damaged files, two runs in one folder, interruption, odd names, no screen."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

import collapse_study
import distill
import etflayers.storage as storage
from etflayers.distill import DistilledSet
from etflayers.errors import InvalidArgumentError
from lab import files, progress, ranks, results
from lab.claim import claimed
from lab.options import Options, command
from lab.results import Results, make_table

STATE = {"fingerprint": {"lr": 0.1}, "result": {"weight": torch.arange(64.0), "step": 3}}
LINEAR = ("linear", "--side", "2", "--starts", "4", "--images", "1")


def test_every_flipped_bit_and_every_cut_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    files.save(path, STATE)
    whole = path.read_bytes()
    assert torch.equal(torch.load(path, weights_only=True)["result"]["weight"], STATE["result"]["weight"])
    flips = [(byte, 1 << byte % 8) for byte in range(0, len(whole), 7)]
    damaged = [whole[:byte] + bytes([whole[byte] ^ bit]) + whole[byte + 1 :] for byte, bit in flips]
    for content in (*damaged, whole[: len(whole) // 2], whole[:-1], b"", b"no checkpoint"):
        path.write_bytes(content)
        with pytest.raises(InvalidArgumentError, match=r"run\.pt is damaged.*remove it"):
            files.load(path, STATE["fingerprint"])
    path.write_bytes(whole)
    assert files.load(path, STATE["fingerprint"])["result"]["step"] == 3


def test_what_has_changed_is_named_and_not_at_length(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    names = [f"class {number}" for number in range(2000)]
    files.save(path, {"fingerprint": {"lr": 0.1, "class names": names}, "result": 1})
    with pytest.raises(InvalidArgumentError, match=r"lr was 0\.1, is 0\.2") as caught:
        files.load(path, {"lr": 0.2, "class names": names[1:]})
    assert "class names was ['class 0'" in str(caught.value)
    assert len(str(caught.value)) < 600


def test_many_writers_of_one_file_leave_it_whole(tmp_path: Path) -> None:
    """Two processes at once: with one temporary name, reads were torn and writes failed."""
    path = tmp_path / "file"
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    child = os.fork()
    letter = b"a" if child else b"b"
    try:
        for _ in range(60):
            files.write_atomically(path, letter * 100_000)
            assert set(path.read_bytes()) in ({ord("a")}, {ord("b")})
    except BaseException:
        if child == 0:
            os._exit(1)
        raise
    if child == 0:
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_said_with_the_name_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.os, "fsync", full)
    assert distill.main([*LINEAR, "--out", str(tmp_path)]) == 1
    assert re.fullmatch(
        rf"error: \[Errno 28\] No space left on device: '{tmp_path}/.*'\n", capsys.readouterr().err
    )


def test_a_file_in_place_of_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert distill.main([*LINEAR, "--out", str(tmp_path / "file")]) == 1
    assert "file is a file: take the name of a folder" in capsys.readouterr().err
    assert distill.main([*LINEAR, "--out", str(tmp_path / "file" / "below")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_results_of_another_run_are_not_replaced_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Results, "figures", lambda self, makers: [])

    def run(*options: str, study: str = "linear") -> tuple[int, str]:
        arguments = LINEAR[1:] if study == "linear" else ()
        status = distill.main([study, *arguments, *options, "--out", str(tmp_path)])
        return status, capsys.readouterr().err

    assert run("--steps", "2") == (0, "")
    assert run("--steps", "2") == (0, "")  # the same numbers again
    before = contents(tmp_path)
    status, error = run("--steps", "3")
    assert (status, before) == (1, contents(tmp_path))
    assert "steps was 2, is 3" in error
    assert "add --overwrite" in error
    status, error = run("--steps", "3", "--resume")
    assert (status, before) == (1, contents(tmp_path))
    assert "belongs to a run with other settings (steps was 2, is 3)" in error
    status, error = run(study="kernel")
    assert (status, before) == (1, contents(tmp_path))
    assert "study was linear, is kernel" in error
    assert "give one of them" in run("--steps", "3", "--overwrite", "--resume")[1]
    assert run("--steps", "3", "--overwrite") == (0, "")
    assert contents(tmp_path)["linear.csv"] != before["linear.csv"]

    (tmp_path / "run.json").write_text("[]")
    assert "run.json is damaged" in run("--steps", "3")[1]


def test_a_run_that_leaves_nothing_is_forgotten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distill.main(["linear", "--side", "9", "--out", str(tmp_path / "new" / "out")]) == 1
    assert "--side 9 is more than" in capsys.readouterr().err
    assert not (tmp_path / "new" / "out").exists()


def test_one_run_at_a_time(tmp_path: Path) -> None:
    """A process that is alive keeps the folder, one that was killed does not."""
    pytest.importorskip("fcntl")
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        with claimed(tmp_path, "study", {}):
            (tmp_path / "result").touch()
            (tmp_path / ".0123456789abcdef.partial").touch()
            (tmp_path / ".mine.partial").touch()
            os.write(go, b"1")
            signal.pause()
        os._exit(1)
    os.read(ready, 1)
    with (
        pytest.raises(InvalidArgumentError, match=f"process {child} is writing into"),
        claimed(tmp_path, "study", {}, overwrite=True),
    ):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / ".lock").read_text() == str(child)
    with (
        pytest.raises(InvalidArgumentError, match="has not come to its end: add --resume"),
        claimed(tmp_path, "study", {}),
    ):
        pass
    with claimed(tmp_path, "study", {}, resume=True):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    assert {path.name for path in tmp_path.iterdir()} == {".mine.partial", "result", "run.json"}


@dataclass(frozen=True, kw_only=True)
class Made(Options):
    """Options of a study that tests make up."""

    default_out: ClassVar[str] = "never"


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C means what it means in a terminal: a shell has what it starts in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupted_run_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path / "two words"), "--seeds", "1", "2"]

    def interrupted(settings: Options) -> None:
        signal.raise_signal(signal.SIGINT)

    def later(settings: Options) -> None:
        files.save(settings.checkpoint("run"), STATE)
        interrupted(settings)

    assert command(Made, interrupted, arguments) == 130
    assert "nothing was kept" in capsys.readouterr().err
    assert command(Made, later, [*arguments, "--overwrite"]) == 130
    error = capsys.readouterr().err
    assert f"1 checkpoint(s) in {tmp_path / 'two words'}. To continue" in error
    assert f"--out '{tmp_path}/two words' --seeds 1 2 --resume" in error
    assert "--overwrite" not in error
    assert command(Made, lambda settings: None, [*arguments, "--resume"]) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")  # a handler, which the child does not inherit, and not "ignored"
def test_interrupted_process_has_no_traceback(tmp_path: Path) -> None:
    script = [sys.executable, distill.__file__, "kernel", "--quick", "--outer-steps", "100000"]
    run = subprocess.Popen(
        [*script, "--checkpoint-every", "1", "--out", tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "checkpoints" / "1-a-class-seed0.pt").exists():
        assert run.poll() is None
    run.send_signal(signal.SIGINT)
    _, error = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Traceback" not in error
    assert error.rstrip().endswith("--resume")


def lines_of(rows: Sequence[dict[str, Any] | None], **options: Any) -> list[str]:
    console = Console(width=20, force_terminal=False, **options)
    with console.capture() as captured, progress.bar(console, "[red] run", lambda row: f"{row['x']}") as bar:
        for step, row in enumerate(rows):
            bar(step, len(rows) - 1, row)
    assert "\x1b" not in captured.get()
    return captured.get().splitlines()


def test_a_line_now_and_then_where_there_is_no_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines_of([None] * 3) == []  # it has taken no time
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    rows = [{"x": f"accuracy {step}"} if step % 25 == 0 else None for step in range(101)]
    lines = lines_of(rows, markup=False)
    assert len(lines) == 10
    assert lines[0] == "[red] run: 10 of 100, 0 s, 0 s left, accuracy 0"
    assert lines[-1] == "[red] run: 100 of 100, 0 s, accuracy 100"


def test_the_time_left_is_that_of_the_steps_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: float(next(clock)))
    console = Console(width=80, force_terminal=False)
    with console.capture() as captured, progress.bar(console, "run") as bar:
        bar(60, 100)  # continued: these steps were taken before
        started = bar.started
        monkeypatch.setattr(progress.time, "perf_counter", lambda: started + 30.0)
        bar(70, 100)
    assert captured.get().splitlines()[-1] == "run: 70 of 100, 30 s, 90 s left"


@pytest.mark.parametrize("study", [collapse_study, distill])
def test_a_study_whose_processes_fail_ends_as_they_did(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only then is there an exit status other than that of a study, and the folder is free again."""
    statuses = iter((0, 3, 0))
    monkeypatch.setattr(
        ranks.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, next(statuses))
    )
    options = ["--devices", "2", "--out", str(tmp_path)]
    options = ["images", "--networks", "2", *options] if study is distill else options
    assert study.main(options) == 0
    with pytest.raises(SystemExit) as ended:
        study.main([*options, "--overwrite"])
    assert ended.value.code == 3
    assert study.main([*options, "--overwrite"]) == 0


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("launched", [False, True])
def test_a_rank_ends_without_the_end_of_python(launched: bool, fails: bool) -> None:
    """In which a thread of gloo may abort it, or hold it for ever; what it has printed is not lost."""
    script = "import atexit; from lab.ranks import end_with; atexit.register(print, 'late'); print('done'); "
    script += "end_with(lambda: 1 // 0)" if fails else "end_with(lambda: 3)"
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path)} | ({"LOCAL_RANK": "0"} if launched else {})
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == (1 if fails else 3)
    assert ended.stdout.split() == (["done"] if launched else ["done", "late"])
    assert ("ZeroDivisionError" in ended.stderr) == fails


ODD = ("cost$^$x", "[bold]", "[red]", "_hidden", ":smile:", "Käse Ω", "日本", "x" * 200)


def legible(make: Callable[[], Figure], shown: list[str], real: Any = results._legible) -> Figure:
    """A figure, with the names in its legend added to what is shown."""
    figure: Figure = real(make)
    shown += [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return figure


# All are labels in every run; as the name of folder and file one by one is a matter of seconds each.
@pytest.mark.parametrize("name", [ODD[0], *(pytest.param(name, marks=pytest.mark.slow) for name in ODD[1:])])
def test_odd_names_are_shown_as_they_are(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A set of such a name goes through console, tables, figures and files of a study."""
    folder = tmp_path / name
    for label in ODD:
        (folder / label).mkdir(parents=True)
        for number in range(4):
            Image.new("L", (8, 8), 30 * ODD.index(label) + number).save(folder / label / f"{number}.png")
    path = tmp_path / f"{name[:180]}.safetensors"
    DistilledSet.from_noise((1, 8, 8), len(ODD), per_class=1).save(path)
    shown: list[str] = []
    monkeypatch.setattr(results, "_legible", lambda make: legible(make, shown))
    options = ("--data", "folder", "--data-dir", str(folder), "--image-size", "8", "--sets", str(path))
    options += ("--network", "mlp", "--steps", "2", "--heads", "fixed", "--out", str(tmp_path / "out"))
    assert distill.main(["collapse", *options]) == 0
    assert (tmp_path / "out" / "real-images.png").read_bytes().startswith(b"\x89PNG")
    assert any(text.strip().startswith(name[: results.LONGEST]) for text in shown)


def test_house_console_prints_names_as_they_are() -> None:
    console = progress.make_console()
    with console.capture() as captured:
        for name in ("[/x]", *ODD[:-1]):
            console.print(make_table(name, [name], []))
    for name in ("[/x]", *ODD[:-1]):
        assert captured.get().count(name) == 2
