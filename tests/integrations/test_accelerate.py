"""Heads in a loop of Accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from etflayers.nn import NearestETFHead, capture_targets, provide_targets

accelerate = pytest.importorskip("accelerate")

pytestmark = pytest.mark.filterwarnings("ignore", r"error:::etflayers(\.|$)")

K, SAMPLES, EPOCHS = 4, 48, 10


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(8, 16), nn.ReLU()), NearestETFHead(16, K, scale=4.0)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits if labels is None else F.cross_entropy(logits, labels)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate has one state a process, and the first Accelerator decides its precision."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("captured", [True, False])
def test_a_loop_trains_accumulates_and_resumes(precision: str, captured: bool, tmp_path: Path) -> None:
    labels = torch.arange(SAMPLES) % K
    data = TensorDataset(3 * F.one_hot(labels, 8) + torch.randn(SAMPLES, 8), labels)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    net = Net()
    if captured:
        capture_targets(net)
    model, optimizer, loader = accelerator.prepare(
        net, torch.optim.Adam(net.parameters(), lr=0.02), DataLoader(data, batch_size=12)
    )
    steps, before = 0, net.body[0].weight.detach().clone()
    for _ in range(EPOCHS):
        for x, y in loader:
            with accelerator.accumulate(model):
                if captured:
                    loss = model(x, labels=y)
                else:
                    with provide_targets(model, y):
                        loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            changed = not torch.equal(net.body[0].weight, before)
            steps, before = steps + changed, net.body[0].weight.detach().clone()
    # The weights move at every second batch, and the class means see every one.
    assert steps == EPOCHS * SAMPLES // 12 // 2
    assert net.head.averages.counts.tolist() == [EPOCHS * SAMPLES // K] * K
    assert net.head.averages.means.dtype == torch.float32
    model.eval()
    x, y = data.tensors
    with torch.no_grad():
        logits = model(x)
    assert float((logits.argmax(-1) == y).float().mean()) > 0.95

    accelerator.save_state(tmp_path)
    after = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.zero_()
    accelerator.load_state(tmp_path)
    torch.testing.assert_close(net.state_dict(), after, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(model(x), logits)
