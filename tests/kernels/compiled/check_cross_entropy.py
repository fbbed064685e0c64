"""What the cross-entropy kernels ask of a GPU at the sizes that they are dispatched to."""

from __future__ import annotations

import pytest

from etflayers.kernels.cross_entropy import triton as kernels
from tests.kernels.compiled.limits import ARCHITECTURES, SPILLED, resources

POINTERS = {
    "rows": "*fp32",
    "targets": "*i64",
    "losses": "*fp32",
    "shifts": "*fp32",
    "logs": "*fp32",
    "grad": "*fp32",
    "gradient": "*fp32",
    "factor": "fp32",
    "smoothing": "fp32",
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("classes", "dtype"), [(10, "*fp32"), (1000, "*bf16"), (32768, "*fp32")])
def test_losses_and_gradient(architecture: int, classes: int, dtype: str) -> None:
    passes = [
        (kernels.losses_kernel, kernels.losses_blocks(classes), True),
        (kernels.gradient_kernel, kernels.gradient_blocks(max(classes, 512)), False),
    ]
    for kernel, blocks, checked in passes:
        found = resources(
            kernel,
            POINTERS | {"rows": dtype, "gradient": dtype},
            blocks,
            architecture,
            multiples=("in_features", "row_stride", "num_classes")[: 3 if classes % 16 == 0 else 2],
            num_warps=kernels.warps(blocks),
            debug=checked,
            sanitize_overflow=False,
        )
        assert found.shared <= ARCHITECTURES[architecture]
        assert found.spilled <= SPILLED
        # Without this an invalid target would pass unseen.
        assert (found.ptx.count("__assertfail") > 1) == checked
