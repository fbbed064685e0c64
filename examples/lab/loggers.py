"""Where the rows of a training go while it runs: TensorBoard and Weights & Biases.

A continued training hands over new rows alone. Those that an interrupted one had logged after its last
checkpoint are trained again to the same numbers; each logger says what becomes of the first copy.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

from etflayers.checks import require_module
from lab.files import Row
from lab.measures import existing

PROJECT = "etflayers"
WandbMode = Literal["off", "offline", "online"]
Log = Callable[[Row], None]


@contextmanager
def loggers(
    folder: Path, name: str, config: Mapping[str, Any], *, tensorboard: bool, wandb: WandbMode
) -> Iterator[Log]:
    """Where to log rows, in the order of their epochs, to all that are asked for, inside the block.

    Raises:
        MissingDependencyError: TensorBoard or Weights & Biases is asked for and not installed.
    """
    with ExitStack() as stack:
        members = []
        if tensorboard:
            members.append(stack.enter_context(_tensorboard(folder / "tensorboard" / name)))
        if wandb != "off":
            members.append(stack.enter_context(_wandb(folder, name, config, wandb)))

        def log(row: Row) -> None:
            for member in members:
                member(row)

        yield log


@contextmanager
def _tensorboard(folder: Path) -> Iterator[Log]:
    """Scalars in an event file.

    It opens with the first row and supersedes what older files of the folder hold from that epoch on.
    """
    tensorboard = require_module("torch.utils.tensorboard", extra="tracking")
    writer: Any = None

    def log(row: Row) -> None:
        nonlocal writer
        epoch = int(row["epoch"])
        if writer is None:
            writer = tensorboard.SummaryWriter(str(folder), purge_step=epoch)
        for tag, value in _tagged(row).items():
            writer.add_scalar(tag, value, epoch)
        writer.flush()

    try:
        yield log
    finally:
        if writer is not None:
            writer.close()


@contextmanager
def _wandb(folder: Path, name: str, config: Mapping[str, Any], mode: WandbMode) -> Iterator[Log]:
    """A run of Weights & Biases, by default a folder that `wandb sync` can send later.

    Name and folder decide the id of the run: a continued training writes a further offline folder with the
    id of the first, and its rows join those on the server, where the first copy of an epoch stands.
    """
    if mode == "offline":  # else it reports errors of its own over the network, whatever the mode
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    wandb = require_module("wandb", extra="tracking")
    identity = hashlib.sha256(f"{folder.resolve()}/{name}".encode()).hexdigest()[:16]
    options = {"dir": folder, "name": name, "id": identity, "project": PROJECT, "mode": mode}
    options |= {"config": dict(config), "resume": "allow" if mode == "online" else None}
    run: Any = None

    def log(row: Row) -> None:
        nonlocal run
        if run is None:
            folder.mkdir(parents=True, exist_ok=True)
            run = wandb.init(settings=wandb.Settings(silent=True, console="off"), **options)
        run.log(_tagged(row), step=int(row["epoch"]))

    try:
        yield log
    finally:
        if run is not None:
            run.finish()


def _tagged(row: Row) -> Row:
    """The measures that exist, in two groups: ``train/...`` and ``test/...``."""
    return {
        name.replace("train_", "train/", 1).replace("test_", "test/", 1): value
        for name, value in existing(row).items()
    }
