"""Options: what the command lines refuse, in words that name the option, what was got and what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import distill
import sweep
import train_heads
import ufm
from collapse_study import StudySettings
from distillation.collapse import CollapseSettings
from distillation.images_settings import ImagesSettings
from distillation.kernel_settings import KernelSettings
from distillation.linear import LinearSettings
from etflayers.errors import InvalidArgumentError
from lab.options import Options
from lab.settings import Settings
from sweep import SweepSettings
from unconstrained.descent import Settings as FreeFeatures

PRETRAINED = {"initialization": "pretrained"}
BAD: list[tuple[type[Options], dict[str, Any], str]] = [
    (Options, {"seeds": (1, 1)}, "--seeds must name at least one and none twice, got (1, 1)"),
    (Options, {"seeds": ()}, "--seeds must name at least one and none twice, got ()"),
    (Options, {"seeds": (0, -1)}, "--seeds must lie in [0, 2**31), got (0, -1)"),
    (Options, {"checkpoint_every": 0}, "--checkpoint-every must be at least 1, got 0"),
    (Options, {"device": "abacus"}, "--device abacus is not known: take cpu or cuda"),
    (Settings, {"classes": 1}, "--classes must be at least 2"),
    (Settings, {"image_size": 3}, "--image-size must be at least 4"),
    (Settings, {"data": "folder"}, "--data folder needs --data-dir"),
    (Settings, {"batch_size": 1}, "batch normalization needs two images"),
    (Settings, {"epochs": 0}, "--epochs must be at least 1"),
    (Settings, {"lr": -1.0}, "--lr must be a positive number"),
    (Settings, {"lr": float("nan")}, "--lr must be a positive number"),
    (Settings, {"loss": "dr"}, "add --head fixed nearest learned"),
    (Settings, {"loss": "mse", "label_smoothing": 0.1}, "--label-smoothing is a part of cross-entropy"),
    (Settings, {"label_smoothing": 1.0}, "--label-smoothing must lie in [0, 1)"),
    (Settings, {"feature_decay": -1.0}, "--feature-decay must be a finite number >= 0"),
    (Settings, {"weight_decay": float("inf")}, "--weight-decay must be a finite number >= 0"),
    (Settings, {"imbalance_ratio": 0.5}, "--imbalance-ratio must be at least 1"),
    (Settings, {"per_class": 0}, "--per-class must be at least 1"),
    (Settings, {"shift": -1}, "--shift must be at least 0"),
    (Settings, {"width": 0.0}, "--width must be a positive number"),
    (Settings, {"amp": "fp16", "device": "cpu"}, "--amp fp16 needs a CUDA device"),
    (StudySettings, {"devices": 0}, "--devices must be at least 1"),
    (StudySettings, {"devices": 3}, "--batch-size 64 must be a multiple of --devices 3"),
    (SweepSettings, {"head": ("fixed", "nearest")}, "--head must name one head to sweep"),
    (SweepSettings, {"jobs": 0}, "--jobs must be at least 1"),
    (FreeFeatures, {"classes": (1,)}, "--classes must be at least 2"),
    (FreeFeatures, {"features": 5}, "K - 1 = 99"),
    (FreeFeatures, {"lr_grid": (0.1, 0.0)}, "--lr-grid must be a positive number"),
    (FreeFeatures, {"spacing": 1.0}, "--spacing must be greater than 1"),
    (FreeFeatures, {"sgd_momentum": 1.0}, "--sgd-momentum must lie in [0, 1)"),
    (FreeFeatures, {"classifier_rate": -1.0}, "--classifier-rate must be a finite number >= 0"),
    (FreeFeatures, {"sweep": True, "theory": True}, "--sweep and --theory are two experiments"),
    (ImagesSettings, {"rate": 0.0}, "--rate must be a positive number"),
    (ImagesSettings, {"window_length": 31}, "--window-length must lie in [1, 30]"),
    (ImagesSettings, {"source": "digits"}, "add --initialization pretrained"),
    (ImagesSettings, {"outer": "misclassify"}, "needs trained networks to mislead"),
    (ImagesSettings, {"outer": "misclassify", "target": 0, **PRETRAINED}, "must be two classes, got 0"),
    (ImagesSettings, {"other_networks": ("mlp",), **PRETRAINED}, "are trained from scratch"),
    (ImagesSettings, {"other_networks": ("lenet",)}, "must be others than --network lenet"),
    (ImagesSettings, {"networks": 3, "devices": 2}, "--networks 3 must be a multiple of --devices 2"),
    (
        ImagesSettings,
        {"initialization": "online", "networks": 2, "devices": 2},
        "one pool, which --devices cannot share",
    ),
    (ImagesSettings, {"initialization": "online", "window": "random"}, "take --window full or last"),
    (KernelSettings, {"per_class": (0,)}, "--per-class must be at least 1"),
    (KernelSettings, {"ridge": -1.0}, "--ridge must be a finite number >= 0"),
    (KernelSettings, {"rate_grid": ()}, "--rate-grid must name at least one"),
    (KernelSettings, {"labels": "solved", "outer_batch": 100}, "ten times --per-class 50"),
    (KernelSettings, {"pool_after": (1,)}, "is of --kernel conv-ntk and conv-nngp, not of ntk"),
    (KernelSettings, {"kernel": "conv-ntk", "pool_after": (2,)}, "from 1 to --depth 1"),
    (KernelSettings, {"kernel": "nngp", "parametrization": "standard"}, "not of nngp"),
    (KernelSettings, {"kernel_width": 64}, "for --parametrization standard only"),
    (KernelSettings, {"kernel": "rbf", "depth": 2}, "is of --kernel ntk, nngp, conv-ntk and conv-nngp, not"),
    (KernelSettings, {"feature_pool": 5}, "--feature-pool is of --kernel features, not of ntk"),
    (KernelSettings, {"kernel": "features", "depth": 2}, "not of features"),
    (KernelSettings, {"kernel": "features", "bandwidth": 1.0}, "--bandwidth is of --kernel rbf, not of fe"),
    (KernelSettings, {"kernel": "features", "labels": "solved"}, "take --labels learned or fixed"),
    (KernelSettings, {"kernel": "features", "networks": ()}, "name at least one in --networks"),
    (
        KernelSettings,
        {"kernel": "features", "feature_network": "lenet", "feature_width": 8},
        "no meaning for --feature-network lenet",
    ),
    (KernelSettings, {"kernel": "features", "feature_max_age": 0}, "--feature-max-age must be at least 1"),
    (LinearSettings, {"cases": ()}, "--cases must name at least one"),
    (LinearSettings, {"images": (0,)}, "--images must be at least 1"),
    (LinearSettings, {"deviation": 0.0}, "--deviation must be a positive number"),
    (CollapseSettings, {"heads": ()}, "--heads must name at least one"),
    (CollapseSettings, {"sets": (Path("nowhere"),)}, "--sets nowhere: there is no such file"),
]


@pytest.mark.parametrize(("kind", "options", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_options_are_refused(kind: type[Options], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=re.escape(message)):
        kind(**options).check()


@pytest.mark.parametrize(
    "kind", [Options, Settings, StudySettings, FreeFeatures, ImagesSettings, KernelSettings, CollapseSettings]
)
def test_defaults_are_good_and_decide_what_they_should(kind: type[Options]) -> None:
    settings = kind()
    settings.check()
    fingerprint = settings.fingerprint()
    assert not {"seeds", "out", "resume", "checkpoint_every", "data_dir"} & fingerprint.keys()
    assert fingerprint["device"] == settings.torch_device.type
    assert kind(seeds=(7,), resume=True, out=Path("elsewhere")).fingerprint() == fingerprint


@pytest.mark.parametrize(
    ("main", "command"),
    [
        (train_heads.main, ["--lr", "-1"]),
        (sweep.main, ["--trials", "lr -1"]),
        (ufm.main, ["--heads", "nearest", "--proximity", "-1"]),
        (distill.main, ["images", "--clip", "0"]),
        (distill.main, ["kernel", "--depth", "0"]),
        (distill.main, ["linear", "--starts", "0"]),
        (distill.main, ["collapse", "--scale", "0"]),
    ],
)
def test_command_line_says_it_in_one_line(
    main: Any, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert command[-2].lstrip("-") in error or "--lr" in error
    assert list(tmp_path.iterdir()) == []
