"""Ray on this machine alone: no dashboard, no report to anybody, no process that outlives the study."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from etflayers.checks import require_module


@contextmanager
def local_ray(jobs: int) -> Iterator[Any]:
    """Start Ray for so many trials at a time and give its module ``tune``; at the end all is stopped.

    A study that is killed takes its workers along: Ray watches over the process that started it.

    Raises:
        MissingDependencyError: Ray is not installed.
    """
    # Workers find the modules that this process has found.
    paths = os.pathsep.join(filter(None, sys.path))
    with _environment({"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": paths}):
        ray, tune = require_module("ray", extra="sweeps"), require_module("ray.tune", extra="sweeps")
        ray.init("local", num_cpus=jobs, include_dashboard=False, log_to_driver=False)
        try:
            yield tune
        finally:
            ray.shutdown()


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
