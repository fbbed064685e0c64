import pytest
import torch

from etflayers.linalg import extreme_eigenvalues


@pytest.mark.parametrize("steps", [4, 12])
def test_extreme_eigenvalues_of_a_batch(steps):
    basis, _ = torch.linalg.qr(torch.randn(2, 12, 12, dtype=torch.float64))
    values = torch.linspace(-3, 5, 12, dtype=torch.float64)
    matrix = (basis * values) @ basis.mT
    start = torch.randn(2, 12, 1, dtype=torch.float64)
    smallest, largest = extreme_eigenvalues(lambda v: matrix @ v, start, steps=steps)
    assert bool((smallest >= -3 - 1e-12).all() & (largest <= 5 + 1e-12).all())
    if steps == 12:
        torch.testing.assert_close(smallest, torch.full_like(smallest, -3))
        torch.testing.assert_close(largest, torch.full_like(largest, 5))


def test_a_subspace_is_not_left():
    # Outside the first three coordinates the map is steeper, and the projection must hide it.
    scales = torch.tensor([1.0, 2.0, 3.0, 100.0], dtype=torch.float64)[:, None]
    inside = torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)[:, None]
    start = inside * torch.randn(1, 4, 1, dtype=torch.float64)
    mixing = torch.full((4, 4), 0.1, dtype=torch.float64)
    found = extreme_eigenvalues(
        lambda v: scales * v + mixing @ v, start, steps=3, project=lambda v: inside * v
    )
    exact = torch.linalg.eigvalsh((torch.diag(scales.flatten()) + mixing)[:3, :3])
    torch.testing.assert_close(torch.stack(found).flatten(), exact[[0, 2]])


def test_an_invariant_subspace_ends_it_and_nan_is_reported():
    start = torch.eye(3, 1, dtype=torch.float64).expand(2, 3, 1)
    scales = torch.tensor([[2.0], [torch.nan]], dtype=torch.float64)[..., None]
    smallest, largest = extreme_eigenvalues(lambda v: scales * v, start, steps=3)
    assert float(smallest[0]) == pytest.approx(2.0)
    assert float(largest[0]) == pytest.approx(2.0)
    assert bool(smallest[1].isnan() & largest[1].isnan())
