"""Time, memory and accuracy, measured against peers. `python -m benchmarks` runs everything.

Each `bench_*.py` offers `run(quick) -> Report`, whose ratios come from interleaved rounds, and the same
cases as a pytest-benchmark suite, whose JSON can be compared between two commits:

    pytest benchmarks/bench_nearest_etf.py -m bench --benchmark-enable --benchmark-autosave
"""
