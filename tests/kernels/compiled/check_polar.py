"""What the polar kernels ask of a GPU at the sizes that they are dispatched to."""

from __future__ import annotations

import pytest

from etflayers.kernels.polar import triton as kernels
from tests.kernels.compiled.limits import ARCHITECTURES, SPILLED, resources

FACTORS = {"inverse_out": "*fp64", "root_out": "*fp64", "inverse_in": "*fp64", "root_in": "*fp64"}
FLAGS = {"deficient_out": "*i32", "deficient_in": "*i32"}
MATRICES = dict.fromkeys(("linear", "frame", "direction", "out"), "*fp32")
KERNELS = {
    "polar": kernels.polar_kernel,
    "completion": kernels.polar_completion_kernel,
    "adjoint": kernels.polar_adjoint_kernel,
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_classes", [16, 32])
@pytest.mark.parametrize("name", KERNELS)
def test_polar(name: str, num_classes: int, architecture: int) -> None:
    options = kernels.blocks(num_classes)
    constants = {"SIZE": options.pop("SIZE"), "COLUMNS": options.pop("COLUMNS")}
    asserting = {} if name == "adjoint" else {"debug": True, "sanitize_overflow": False}
    found = resources(
        KERNELS[name],
        FACTORS | FLAGS | MATRICES,
        constants,
        architecture,
        multiples=("in_features",),
        **options,
        **asserting,
    )
    assert found.shared <= ARCHITECTURES[architecture]
    assert found.spilled <= SPILLED
    if asserting:
        assert "__assertfail" in found.ptx
