from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("rich")
pytest.importorskip("pymanopt")
pytest.importorskip("geoopt")
pytest.importorskip("cvxpylayers")

from benchmarks import (
    __main__ as command,
)
from benchmarks import (
    bench_accuracy,
    bench_learned,
    bench_memory,
    bench_metrics,
    bench_nearest_etf,
    bench_peers,
    bench_scaling,
    bench_solvers,
    bench_step,
    bench_stiefel,
    processes,
)
from benchmarks.figure import draw_scaling
from benchmarks.findings import Findings
from benchmarks.peers import five_products, tall_svd_frame
from benchmarks.record import merge, read, to_json, to_markdown, write
from benchmarks.report import Check, Claim, Report, Table
from benchmarks.timing import median_ratio, medians, quartiles
from etflayers.testing import relative_error, svd_frame

TINY = (6, 4)
ROOT = Path(command.__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def findings(benchmark: BenchmarkFixture) -> Findings:
    return Findings(benchmark, "tiny", quick=True)


def assert_complete(findings: Findings, tables: int = 1) -> None:
    """Checked, measured, and shown in tables whose rows are as wide as their columns."""
    report = findings.report
    assert report.checks
    assert not report.failures
    assert not report.claims  # of a quick run
    assert len(report.tables) == tables
    assert all(len(row) == len(table.columns) for table in report.tables for row in table.rows)


def test_node_suite(findings: Findings) -> None:
    bench_nearest_etf.test_node(findings, TINY, None)
    assert_complete(findings)
    assert len(findings.report.checks) == 2 * len(bench_nearest_etf.FRAMES)
    (measured,) = findings.report.samples.values()
    assert all(low <= middle <= high and count == 1 for low, middle, high, count in measured.values())


def test_peers_reach_the_same_accuracy(findings: Findings) -> None:
    bench_peers.test_forward(findings, TINY, None)
    assert_complete(findings)


TINY_CASE = bench_solvers.Case(*TINY, torch.float64, 3.0)


def test_every_solver_is_checked_before_it_is_timed(findings: Findings) -> None:
    bench_solvers.test_solvers(findings, TINY_CASE)
    assert_complete(findings)


def test_a_wrong_solver_or_a_wrong_oracle_fails_its_check() -> None:
    oracle = bench_solvers.Oracle.of(TINY_CASE)
    assert oracle.check(TINY_CASE).passed
    assert not oracle._replace(gradient=1.001 * oracle.gradient).check(TINY_CASE).passed
    wrong = bench_nearest_etf.forward_backward(lambda x: svd_frame(x) * 1.001, TINY_CASE.means())
    assert not any(c.passed for c in oracle.checks(TINY_CASE, "wrong", bench_solvers.IMPLICIT, wrong))


def test_learned_suite(findings: Findings) -> None:
    bench_learned.test_frame_and_gradient(findings, TINY)
    assert_complete(findings)


def test_step_suite(findings: Findings) -> None:
    bench_step.test_step(findings, 4)
    assert_complete(findings)


def test_metrics_suite(findings: Findings) -> None:
    bench_metrics.test_update(findings, (16, 6, 4))
    assert_complete(findings)
    assert len(findings.report.checks) == 5


def test_stiefel_suite(findings: Findings) -> None:
    bench_stiefel.test_solvers(findings, TINY)
    assert_complete(findings)


def test_a_training_step_of_every_head_lowers_the_loss() -> None:
    images, _, targets = bench_step.batch(8, 8, 4)
    for make in bench_step.HEADS.values():
        torch.manual_seed(0)
        step = bench_step.training_step(bench_step.resnet18_features(1), make(4), images, targets)
        losses = [float(step()) for _ in range(3)]
        assert losses[-1] < losses[0]


def test_accuracy_suite(findings: Findings) -> None:
    bench_accuracy.test_accuracy(findings, TINY, 10.0)
    assert_complete(findings, tables=2)


def test_scaling_suite(findings: Findings, tmp_path: Path) -> None:
    bench_scaling.test_scaling(findings, "K", TINY)
    assert_complete(findings)


def test_memory_counts_what_a_pass_allocates() -> None:
    found = bench_memory.measure_here(bench_nearest_etf.OURS, TINY)
    assert found["error"] < 1e-5
    assert 0 < found["before"] <= found["peak"]
    block = torch.ones(64, 1024, 1024, dtype=torch.uint8)
    assert processes.peak_mb() >= block.nbytes / 1024**2


@pytest.mark.slow
def test_memory_of_a_process_of_its_own() -> None:
    found = bench_memory.measure(bench_nearest_etf.OURS, (2048, 100))
    assert found["error"] < 1e-5
    frame_and_gradient = 2 * 4 * 2048 * 100 / 1024**2
    assert found["peak"] - found["before"] > frame_and_gradient


@pytest.mark.slow
def test_a_failing_child_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="invalid choice"):
        bench_memory.measure("nobody", TINY)


def test_a_wrong_rival_fails_its_check() -> None:
    means = bench_nearest_etf.gaussian_means(TINY)
    wrong = bench_nearest_etf.forward_backward(lambda x: svd_frame(x) * 1.001, means)
    found = bench_nearest_etf.checks({bench_nearest_etf.OURS: wrong}, means, "tiny")
    assert not any(check.passed for check in found)


def test_tall_svd_is_the_same_map() -> None:
    means = bench_nearest_etf.gaussian_means(TINY).double()
    assert relative_error(tall_svd_frame(means), svd_frame(means)) < 1e-12


def test_floor_is_of_the_size_of_the_problem() -> None:
    assert five_products(4, 6)().shape == (3, 6)


BENCHMARKS = """
import time
import pytest
from benchmarks.report import Check

@pytest.mark.bench
def test_turns(findings):
    calls = []

    def call(name):
        calls.append(name)
        time.sleep(1e-3)

    rivals = {name: lambda name=name: call(name) for name in "abc"}
    samples = findings.measure("turns", rivals, seconds=0.0, min_rounds=4, sample_seconds=1e-9)
    findings.claim("three rivals", len(samples), "at least", 3, "")
    assert {name: len(values) for name, values in samples.items()} == dict.fromkeys("abc", 4)
    assert "".join(calls[3:15]) == "abcacbabcacb"  # after a call of each to find out how long it takes
    assert all(1e-3 < value < 1 for values in samples.values() for value in values)

@pytest.mark.bench
def test_wrong(findings):
    findings.require(Check("frame", 1.0, 0.5))
    findings.measure("wrong", {"never": lambda: None}, seconds=1.0)
"""


def test_rivals_take_turns_and_a_wrong_one_is_not_timed(tmp_path: Path) -> None:
    (tmp_path / "bench_mine.py").write_text(BENCHMARKS)
    configuration = ["-c", str(ROOT / "pyproject.toml"), f"--rootdir={tmp_path}", "-p", "benchmarks.conftest"]
    options = ["-m", "bench", "--benchmark-enable", f"--benchmark-json={tmp_path / 'out.json'}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *configuration, *options, str(tmp_path / "bench_mine.py")],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")},
        capture_output=True,
        text=True,
    )
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "wrong: frame: error 1.00e+00 > 0.5" in done.stdout
    report = read(tmp_path / "out.json")
    assert [claim.what for claim in report.claims] == ["three rivals"]
    assert report.samples["turns"].keys() == set("abc")


def test_ratio_is_taken_within_rounds() -> None:
    samples = {"slow": [2.0, 20.0, 200.0], "fast": [1.0, 10.0, 100.0]}
    assert median_ratio(samples, "slow", "fast") == 2.0
    assert medians(samples) == {"slow": 20.0, "fast": 10.0}
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0, 7.0)


@pytest.mark.parametrize(("value", "sense", "met"), [(2.0, "at least", True), (2.0, "at most", False)])
def test_claims_know_their_sense(value: float, sense: Any, met: bool) -> None:
    claim = Claim("speed", value, sense, 1.5, "x")
    assert claim.met is met
    assert claim.cells()[-1] == ("met" if met else "MISSED")


def test_nan_fails_a_check() -> None:
    assert not Check("frame", math.nan, 1.0).passed


def _report(error: float = 0.0) -> Report:
    axes = {"K": ["(512, 10)", "(512, 20)"], "d": ["(64, 100)", "(128, 100)"]}
    columns = ["(d, K)", "ours", "peer", "floor"]
    return Report(
        "scaling",
        tables=[
            Table(f"Along {axis}", columns, [[shape, "1.5", "3", "1"] for shape in shapes], "a note")
            for axis, shapes in axes.items()
        ],
        claims=[Claim("speed", 1.0, "at least", 1.5, "x")],
        checks=[Check("frame", error, 1e-5)],
        samples={"case": {"ours": [1.0, 2.0, 3.0, 9], "peer": [4.0, 5.0, 6.0, 9]}},
    )


def test_record_keeps_the_suites_that_were_not_run(tmp_path: Path) -> None:
    first, second = _report(), Report("memory")
    write(merge(tmp_path / "cpu.json", [first], {"date": "first"}), ["scaling", "memory"], tmp_path)
    write(merge(tmp_path / "cpu.json", [second], {"date": "second"}), ["scaling", "memory"], tmp_path)
    record = json.loads((tmp_path / "cpu.json").read_text())
    assert list(record) == ["scaling", "memory"]
    kept = record["scaling"]["report"]
    assert kept["checks"] == {
        "passed": 1,
        "of": 1,
        "closest": {"what": "frame", "error": 0.0, "limit": 1e-5},
        "failed": [],
    }
    assert Report.from_record({**kept, "checks": [asdict(check) for check in first.checks]}) == first
    markdown = (tmp_path / "cpu.md").read_text()
    assert markdown == to_markdown(record)
    assert "| (512, 10) | 1.5 | 3 | 1 |" in markdown
    assert "| speed | 1x | at least 1.5x | MISSED |" in markdown
    assert "date: second" in markdown


def test_json_has_a_line_for_a_case_a_claim_and_a_row() -> None:
    case = {"ours": [1, 2, 3, 4], "peer": [5, 6, 7, 8]}
    value = {"rows": [["a", "b"], ["c", "d"]], "samples": {"case": case}}
    text = to_json(value)
    assert json.loads(text) == value
    assert '["a", "b"]' in text
    assert '"case": {"ours": [1, 2, 3, 4], "peer": [5, 6, 7, 8]}' in text


def test_parts_of_a_suite_are_joined() -> None:
    whole = Report("scaling")
    whole.join(_report())
    whole.join(_report(error=1.0))
    assert [len(table.rows) for table in whole.tables] == [4, 4]
    assert len(whole.checks) == 2
    assert len(whole.failures) == 1


def test_figure_is_a_picture(tmp_path: Path) -> None:
    draw_scaling(_report(), tmp_path / "time.png")
    assert (tmp_path / "time.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("status", [0, 1])
def test_only_wrong_results_fail_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int
) -> None:
    def finished(suite: str, output: Path, *, quick: bool) -> int:
        output.write_text(json.dumps({"benchmarks": [{"extra_info": asdict(_report())}]}))
        return status

    monkeypatch.setattr(command, "_pytest", finished)
    assert command.main(["--only", "scaling", "--output", str(tmp_path)]) == status
    printed = capsys.readouterr().out
    assert ("MISSED" in printed) is not bool(status)
    assert (tmp_path / "time.png").exists() is not bool(status)  # what is wrong is not kept


@pytest.mark.slow
def test_quick_run_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)  # pytest-benchmark measures nothing in a process of xdist
    assert command.main(["--quick", "--only", "nearest_etf", "--output", str(tmp_path)]) == 0
    assert not list(tmp_path.iterdir())
    assert "24 of 24 checks of correctness passed" in capfd.readouterr().out
