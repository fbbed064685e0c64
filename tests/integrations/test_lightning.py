"""Heads and the measuring callback under Lightning's Trainer."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from etflayers.metrics import NeuralCollapse, NeuralCollapseCallback
from etflayers.nn import NearestETFHead, capture_targets, provide_targets, replace_classifier

lightning = pytest.importorskip("lightning")
pytest.importorskip("torchmetrics")

pytestmark = pytest.mark.filterwarnings("ignore", r"error:::etflayers(\.|$)")

K, SAMPLES, EPOCHS = 4, 48, 6
LABELS = torch.arange(SAMPLES) % K
INPUTS = 3 * F.one_hot(LABELS, 8) + torch.randn(SAMPLES, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.fc = nn.Sequential(nn.Linear(8, 16), nn.ReLU()), nn.Linear(16, K)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        logits: Tensor = self.fc(self.body(x))
        return logits


class Module(lightning.LightningModule):  # type: ignore[misc]
    """A user's module; ``labels`` says whether its training step calls the network with them."""

    def __init__(self, labels: bool) -> None:
        super().__init__()
        self.net, self.labels = replace_classifier(Net(), NearestETFHead), labels
        if labels:
            capture_targets(self.net)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x, labels=y) if self.labels else self.net(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(-1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.02)


class Targets(lightning.Callback):  # type: ignore[misc]
    """The callback of docs/howto/heads.md, for a training step that keeps the labels to itself."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.block = ExitStack()
        self.block.enter_context(provide_targets(module, batch[1]))

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.block.close()


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fit_trains_measures_and_resumes(labels: bool, precision: str, tmp_path: Path) -> None:
    def trainer(epochs: int) -> Any:
        measure = NeuralCollapseCallback(K, classifier="net.fc", prefix="val/")
        return lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            precision=precision,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[measure] if labels else [measure, Targets()],
        )

    def module(seed: int = 0) -> Module:
        torch.manual_seed(seed)
        return Module(labels)

    loader = DataLoader(TensorDataset(INPUTS, LABELS), batch_size=12)
    fit, model = trainer(EPOCHS), module()
    fit.fit(model, loader, loader)
    assert isinstance(model.net.fc, NearestETFHead)
    assert model.net.fc.averages.counts.tolist() == [EPOCHS * SAMPLES // K] * K
    assert fit.callback_metrics["accuracy"] > 0.95

    # What was logged is what the metric says of the same features.
    logged = {name: float(value) for name, value in fit.callback_metrics.items() if name.startswith("val/")}
    expected = NeuralCollapse(K, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        expected.update(model.net.body(INPUTS).float(), LABELS)
    for name in ("nc1_trace", "nc2_equinorm_means"):
        assert logged[f"val/net.fc/{name}"] == pytest.approx(float(expected.compute()[name]), rel=1e-4)
    assert not any(part._forward_hooks for part in model.modules() if part is not model.net)

    # Half the way, a checkpoint, and the other half with a new module of other weights and a new trainer.
    first = trainer(EPOCHS // 2)
    first.fit(half := module(), loader, loader)
    first.save_checkpoint(tmp_path / "half.ckpt")
    trainer(EPOCHS).fit(resumed := module(seed=1), loader, loader, ckpt_path=tmp_path / "half.ckpt")
    assert half.net.fc.averages.counts.tolist() == [EPOCHS // 2 * SAMPLES // K] * K  # type: ignore[union-attr]
    torch.testing.assert_close(resumed.state_dict(), model.state_dict())
