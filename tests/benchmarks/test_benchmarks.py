from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

pytest.importorskip("rich")
pytest.importorskip("pymanopt")
pytest.importorskip("geoopt")
pytest.importorskip("cvxpylayers")

from benchmarks import (
    bench_accuracy,
    bench_memory,
    bench_nearest_etf,
    bench_peers,
    bench_scaling,
    bench_solvers,
    bench_step,
)
from benchmarks.__main__ import main
from benchmarks.figure import draw_scaling
from benchmarks.peers import five_products, tall_svd_frame
from benchmarks.record import merge, to_markdown, write
from benchmarks.report import Check, Claim, Report, Table
from benchmarks.timing import interleaved, median_ratio, medians
from etflayers.testing import relative_error, svd_frame

TINY = (6, 4)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("rival", bench_nearest_etf.FRAMES)
def test_node_suite_checks_what_it_times(benchmark: BenchmarkFixture, rival: str) -> None:
    bench_nearest_etf.test_forward_backward(benchmark, rival, TINY)


@pytest.mark.parametrize("solver", ["etflayers", *bench_peers.BOUNDS])
def test_peers_reach_the_same_accuracy(benchmark: BenchmarkFixture, solver: str) -> None:
    bench_peers.test_forward(benchmark, solver, TINY)


TINY_CASE = bench_solvers.Case(*TINY, torch.float64, 3.0)
TINY_RIVALS = [(name, kind) for name, kind, _ in bench_solvers.rivals(TINY_CASE)]


@pytest.mark.parametrize(("name", "kind"), TINY_RIVALS)
def test_every_solver_is_checked_before_it_is_timed(
    benchmark: BenchmarkFixture, name: str, kind: str
) -> None:
    bench_solvers.test_solver(benchmark, TINY_CASE, name, kind)


def test_a_wrong_solver_or_a_wrong_oracle_fails_its_check() -> None:
    oracle = bench_solvers.Oracle.of(TINY_CASE)
    assert oracle.check(TINY_CASE).passed
    assert not oracle._replace(gradient=1.001 * oracle.gradient).check(TINY_CASE).passed
    wrong = bench_nearest_etf.forward_backward(lambda x: svd_frame(x) * 1.001, TINY_CASE.means())
    assert not any(c.passed for c in oracle.checks(TINY_CASE, "wrong", bench_solvers.IMPLICIT, wrong))


@pytest.mark.parametrize("head", bench_step.HEADS)
def test_heads_send_back_the_float64_gradient(benchmark: BenchmarkFixture, head: str) -> None:
    bench_step.test_head(benchmark, head, 4)


def test_a_training_step_of_every_head_lowers_the_loss() -> None:
    images, _, targets = bench_step.batch(8, 8, 4)
    for make in bench_step.HEADS.values():
        torch.manual_seed(0)
        step = bench_step.training_step(bench_step.resnet18_features(1), make(4), images, targets)
        losses = [float(step()) for _ in range(3)]
        assert losses[-1] < losses[0]


def test_accuracy_suite(benchmark: BenchmarkFixture) -> None:
    bench_accuracy.test_accuracy(benchmark, TINY, 10.0)


def test_scaling_suite(benchmark: BenchmarkFixture) -> None:
    bench_scaling.test_scaling(benchmark, TINY)


def test_memory_counts_what_a_pass_allocates() -> None:
    found = bench_memory.measure_here(bench_nearest_etf.OURS, TINY)
    assert found["error"] < 1e-5
    assert 0 < found["before"] <= found["peak"]
    block = torch.ones(64, 1024, 1024, dtype=torch.uint8)
    assert bench_memory.peak_mb() >= block.nbytes / 1024**2


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


def test_interleaved_takes_turns() -> None:
    calls: list[str] = []
    rivals = {name: lambda name=name: calls.append(name) for name in "abc"}
    samples = interleaved(rivals, seconds=0.0, min_rounds=4, sample_seconds=0.0)
    assert {name: len(values) for name, values in samples.items()} == dict.fromkeys("abc", 4)
    assert calls[-12:] == [*"abc", *"bca", *"cab", *"abc"]


def test_ratio_is_taken_within_rounds() -> None:
    samples = {"slow": [2.0, 20.0, 200.0], "fast": [1.0, 10.0, 100.0]}
    assert median_ratio(samples, "slow", "fast") == 2.0
    assert medians(samples) == {"slow": 20.0, "fast": 10.0}


@pytest.mark.parametrize(("value", "sense", "met"), [(2.0, "at least", True), (2.0, "at most", False)])
def test_claims_know_their_sense(value: float, sense: str, met: bool) -> None:
    claim = Claim("speed", value, sense, 1.5, "x")
    assert claim.met is met
    assert claim.cells()[-1] == ("met" if met else "MISSED")


def test_nan_fails_a_check() -> None:
    assert not Check("frame", math.nan, 1.0).passed


def _report(error: float) -> Report:
    return Report(
        "scaling",
        tables=[Table("Times", ["(d, K)", "ms"], [["(6, 4)", "1.5"]], "a note")],
        claims=[Claim("speed", 1.0, "at least", 1.5, "x")],
        checks=[Check("frame", error, 1e-5)],
        samples={
            axis: {name: [[10, 1e-3], [20, 2e-3]] for name in ("ours", "peer", "floor")}
            for axis in ("K", "d")
        },
    )


def test_record_keeps_the_suites_that_were_not_run(tmp_path: Path) -> None:
    first, second = _report(0.0), Report("memory")
    write(merge(tmp_path / "cpu.json", [first], {"date": "first"}), ["scaling", "memory"], tmp_path)
    write(merge(tmp_path / "cpu.json", [second], {"date": "second"}), ["scaling", "memory"], tmp_path)
    record = json.loads((tmp_path / "cpu.json").read_text())
    assert list(record) == ["scaling", "memory"]
    assert Report.from_record(record["scaling"]["report"]) == first
    markdown = (tmp_path / "cpu.md").read_text()
    assert markdown == to_markdown(record)
    assert "| (6, 4) | 1.5 |" in markdown
    assert "| speed | 1x | at least 1.5x | MISSED |" in markdown
    assert "date: second" in markdown


def test_figure_is_a_picture(tmp_path: Path) -> None:
    draw_scaling(_report(0.0), tmp_path / "time.png")
    assert (tmp_path / "time.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("error", "status"), [(0.0, 0), (1.0, 1), (math.nan, 1)])
def test_only_wrong_results_fail_the_run(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    error: float,
    status: int,
) -> None:
    monkeypatch.setitem(main.__globals__["SUITES"], "scaling", lambda quick: _report(error))
    assert main(["--only", "scaling", "--output", str(tmp_path)]) == status
    printed = capsys.readouterr().out
    assert "MISSED" in printed
    assert ("wrong:" in printed) is bool(status)
    assert (tmp_path / "time.png").exists()


def test_quick_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--only", "nearest_etf", "--output", str(tmp_path)]) == 0
    assert not list(tmp_path.iterdir())
    assert "24 of 24 checks of correctness passed" in capsys.readouterr().out
