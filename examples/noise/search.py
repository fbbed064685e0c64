"""Knobs chosen by Ray Tune, which sees noisy validation labels and no test data.

A trial is a training like any other, with a checkpoint of its own. So a search that was killed is simply
started again: Ray proposes the same points, because its random numbers come from the seed (and with Optuna
from results that are the same), and a trial that had finished returns at once with the numbers that it had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Any

from etflayers.checks import require_module
from etflayers.errors import MissingDependencyError, NonFiniteError
from lab.data import load
from lab.files import Row
from lab.training import reproducible, threads
from lab.tuning import local_ray
from noise.data import NoisyData, with_noise
from noise.methods import Knobs, MethodName
from noise.settings import NoiseSettings
from noise.training import Key, NoiseRun

METRIC = "validation_accuracy"


def search_space(tune: Any) -> dict[str, Any]:
    """That of Nguyen et al. (2023, arXiv 2206.05530), and the weight decay, which is 1e-3 there."""
    return {
        "lr": tune.loguniform(1e-5, 0.5),
        "gamma": tune.choice([0.01, 0.1, 0.5]),
        "weight_decay": tune.loguniform(1e-5, 1e-2),
        "alpha": tune.uniform(0.01, 0.25),
    }


def choose(settings: NoiseSettings) -> dict[MethodName, list[Row]]:
    """The rows of all trials of each method, in the order in which they were proposed.

    Raises:
        MissingDependencyError: Ray, or with ``--search optuna`` Optuna, is not installed.
    """
    require_search(settings)
    settings = replace(settings, out=settings.folder.resolve())  # a worker runs in another folder
    with local_ray(settings.jobs) as tune:
        return {method: _search(method, settings, tune) for method in settings.methods}


def require_search(settings: NoiseSettings) -> None:
    """Raise :class:`~etflayers.errors.MissingDependencyError` for a search that is not installed."""
    if settings.search == "optuna" and find_spec("optuna") is None:
        raise MissingDependencyError(
            "--search optuna needs Optuna: pip install optuna, or take --search random"
        )


def _search(method: MethodName, settings: NoiseSettings, tune: Any) -> list[Row]:
    def trainable(config: Mapping[str, Any]) -> Row:
        row = run_trial(method, Knobs(**config), settings)
        return {METRIC: row[METRIC], "row": row}

    results = tune.Tuner(
        trainable,
        param_space=search_space(tune),
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="max",
            num_samples=settings.trials,
            search_alg=_algorithm(settings),
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(storage_path=str(settings.folder / "ray"), verbose=0),
    ).fit()
    for result in results:
        if result.error is not None:
            raise result.error
    return [result.metrics["row"] for result in results]


def _algorithm(settings: NoiseSettings) -> Any:
    """Random points are the same for all methods, because each search draws them from the same seed."""
    search = require_module("ray.tune.search", extra="sweeps")
    if settings.search == "random":
        return search.BasicVariantGenerator(random_state=settings.tune_seed)
    optuna = require_module("ray.tune.search.optuna", extra="sweeps").OptunaSearch(seed=settings.tune_seed)
    return search.ConcurrencyLimiter(optuna, max_concurrent=settings.jobs)


def run_trial(method: MethodName, knobs: Knobs, settings: NoiseSettings) -> Row:
    """Train once with these knobs; to diverge is an accuracy of 0, and no reason to end the search."""
    key = Key(settings.tune_eta, method, settings.tune_seed, knobs, trial=True)
    with threads(settings.threads), reproducible(settings.torch_device):
        run = NoiseRun(key, settings, _data_of(settings))
        try:
            run.finish(settings.checkpoint(key.name), resume=settings.resume, every=settings.checkpoint_every)
        except NonFiniteError:
            return {**key.row, METRIC: 0.0, "diverged": True}
    return {**run.history[-1], "diverged": False}


@cache
def _data_of(settings: NoiseSettings) -> NoisyData:
    """Made once for all trials of a worker."""
    noisy = with_noise(load(settings), settings.tune_eta, settings.tune_seed)
    return noisy.to(settings.torch_device)
