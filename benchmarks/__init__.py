"""Time, memory and accuracy, measured against peers: `python -m benchmarks` runs everything.

Each `bench_*.py` is a suite of pytest-benchmark; `benchmarks/findings.py` shows how to write one. The times
of two commits can be compared as those of any benchmark of it:

    pytest benchmarks/bench_nearest_etf.py -m "bench and not quick" --benchmark-enable --benchmark-autosave
"""
