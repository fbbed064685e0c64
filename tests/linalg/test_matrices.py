import pytest
import torch

from etflayers.linalg import spectral_bounds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_classes", [2, 7, 60])
def test_bounds_enclose_the_spectrum(num_classes, dtype):
    root = torch.randn(5, num_classes, num_classes, dtype=torch.float64)
    almost_identity = torch.eye(num_classes, dtype=torch.float64) + 1e-4 * root @ root.mT / num_classes
    one_outlier = torch.diag_embed(torch.tensor([9.0] + [1.0] * (num_classes - 1), dtype=torch.float64))
    for gram in (root @ root.mT, almost_identity, one_outlier):
        lowest, highest = spectral_bounds(gram.to(dtype))
        values = torch.linalg.eigvalsh(gram.to(dtype).double())
        slack = num_classes * torch.finfo(dtype).eps * values[..., -1]
        assert (values[..., -1] <= highest.squeeze()).all()
        assert (lowest.squeeze() <= values[..., 0] + slack).all()
        trace = values.sum(-1)
        assert (highest.squeeze() <= trace * (1 + 1e-4)).all()
    # Exact at neural collapse.
    lowest, highest = spectral_bounds(3 * torch.eye(num_classes, dtype=dtype))
    assert float(highest / lowest) == pytest.approx(1, abs=1e-4)
