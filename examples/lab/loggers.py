"""Where the rows of a training go while it runs: TensorBoard and Weights & Biases.

A continued training hands over new rows alone. Those that an interrupted one had logged after its last
checkpoint are trained again to the same numbers; each logger says what becomes of the first copy.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from etflayers.checks import require_module
from lab.files import Row
from lab.measures import existing

PROJECT = "etflayers"
WandbMode = Literal["off", "offline", "online"]


class Logger(Protocol):
    """Takes the rows of one training, in the order of their epochs."""

    def log(self, row: Row) -> None: ...

    def close(self) -> None: ...


class TensorBoardLogger:
    """Scalars in an event file.

    The file opens with the first row and supersedes what older files of the folder hold from that epoch on.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensorboard = require_module("torch.utils.tensorboard", extra="tracking")
        self.writer: Any = None

    def log(self, row: Row) -> None:
        epoch = int(row["epoch"])
        if self.writer is None:
            self.writer = self.tensorboard.SummaryWriter(str(self.folder), purge_step=epoch)
        for tag, value in _tagged(row).items():
            self.writer.add_scalar(tag, value, epoch)
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class WandbLogger:
    """A run of Weights & Biases, by default a folder that `wandb sync` can send later.

    Name and folder decide the id of the run: a continued training writes a further offline folder with the
    id of the first, and its rows join those on the server, where the first copy of an epoch stands.
    """

    def __init__(self, folder: Path, name: str, config: Mapping[str, Any], mode: WandbMode) -> None:
        if mode == "offline":  # else it reports errors of its own over the network, whatever the mode
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self.wandb = require_module("wandb", extra="tracking")
        identity = hashlib.sha256(f"{folder.resolve()}/{name}".encode()).hexdigest()[:16]
        self.options = {"dir": folder, "name": name, "id": identity, "project": PROJECT, "mode": mode}
        self.options |= {"config": dict(config), "resume": "allow" if mode == "online" else None}
        self.run: Any = None

    def log(self, row: Row) -> None:
        if self.run is None:
            self.options["dir"].mkdir(parents=True, exist_ok=True)
            quiet = self.wandb.Settings(silent=True, console="off")
            self.run = self.wandb.init(settings=quiet, **self.options)
        self.run.log(_tagged(row), step=int(row["epoch"]))

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()


@contextmanager
def loggers(
    folder: Path, name: str, config: Mapping[str, Any], *, tensorboard: bool, wandb: WandbMode
) -> Iterator[list[Logger]]:
    """The loggers that are asked for, for the run of this name, open inside the block.

    Raises:
        MissingDependencyError: TensorBoard or Weights & Biases is asked for and not installed.
    """
    members: list[Logger] = []
    if tensorboard:
        members.append(TensorBoardLogger(folder / "tensorboard" / name))
    if wandb != "off":
        members.append(WandbLogger(folder, name, config, wandb))
    with ExitStack() as stack:
        for member in members:
            stack.callback(member.close)
        yield members


def _tagged(row: Row) -> Row:
    """The measures that exist, in two groups: ``train/...`` and ``test/...``."""
    return {
        name.replace("train_", "train/", 1).replace("test_", "test/", 1): value
        for name, value in existing(row).items()
    }
