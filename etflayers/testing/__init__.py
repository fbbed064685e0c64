"""For the tests of this library and of yours: oracles and peers here, conformance suites in ``.suites``.

The suites need pytest and are imported by their own name: ``from etflayers.testing.suites import HeadSuite``.
"""

from etflayers.testing.oracles import (
    OracleSolution,
    adjoint_identity_error,
    means_with_condition,
    published_anchor_weight,
    relative_error,
    riemannian_descent_frame,
    svd_frame,
    trust_regions_frame,
)

__all__ = [
    "OracleSolution",
    "adjoint_identity_error",
    "means_with_condition",
    "published_anchor_weight",
    "relative_error",
    "riemannian_descent_frame",
    "svd_frame",
    "trust_regions_frame",
]
