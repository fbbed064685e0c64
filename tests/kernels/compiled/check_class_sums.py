"""What the class-sum kernels ask of a GPU at the sizes that they are dispatched to."""

from __future__ import annotations

import pytest

from etflayers.kernels.class_sums import triton as kernels
from tests.kernels.compiled.limits import ARCHITECTURES, SPILLED, resources

POINTERS = {
    "features": "*fp32",
    "targets": "*i64",
    "sums": "*fp32",
    "counts": "*i64",
    "old_means": "*fp32",
    "old_counts": "*i64",
    "old_updates": "*i64",
    "new_updates": "*i64",
    "steps": "*fp32",
    "largest": "fp32",
    "momentum": "fp32",
}
STATE = ("old_means", "old_counts", "old_updates", "new_updates", "steps")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("batch", "width", "classes", "dtype", "update"),
    [
        (1024, 2048, 10, "*fp32", 0),  # the longest lists of rows
        (256, 512, 10, "*fp32", 1),
        (256, 512, 100, "*bf16", 2),
        (2048, 2048, 1000, "*fp16", 3),
    ],
)
def test_sums(architecture: int, batch: int, width: int, classes: int, dtype: str, update: int) -> None:
    blocks = kernels.sums_blocks(batch, width, classes)
    constants = {"UPDATE": update, "CHECKED": True, **blocks}
    if update == 0:
        constants |= dict.fromkeys(STATE)
    found = resources(
        kernels.class_sums_kernel,
        POINTERS | {"features": dtype},
        constants,
        architecture,
        multiples=("in_features", "row_stride"),
        num_warps=kernels.sums_warps(blocks),
        debug=True,
        sanitize_overflow=False,
    )
    assert found.shared <= ARCHITECTURES[architecture]
    assert found.spilled <= SPILLED
    # Without this an invalid value would pass unseen.
    assert found.ptx.count("__assertfail") > 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("width", "dtype"), [(512, "*bf16"), (16, "*fp32")])
def test_gather(architecture: int, width: int, dtype: str) -> None:
    found = resources(
        kernels.class_gather_kernel,
        {"rows": "*fp32", "targets": "*i64", "gathered": dtype},
        kernels.gather_blocks(width),
        architecture,
        multiples=("in_features",),
        num_warps=4,
    )
    assert found.shared <= ARCHITECTURES[architecture]
    assert found.spilled <= SPILLED
