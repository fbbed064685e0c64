"""Simplex equiangular tight frames and the Stiefel manifold: constructions and predicates, no solver."""

from etflayers.geometry.frames import (
    centered,
    centered_basis_adjoint,
    centered_basis_apply,
    centered_rows,
    etf_radius,
    is_simplex_etf,
    require_etf_dims,
    require_rotation,
    simplex_etf,
)
from etflayers.geometry.stiefel import (
    is_stiefel,
    project_stiefel,
    project_tangent,
    random_stiefel,
    retract_stiefel,
)
from etflayers.geometry.tolerance import Check

__all__ = [
    "Check",
    "centered",
    "centered_basis_adjoint",
    "centered_basis_apply",
    "centered_rows",
    "etf_radius",
    "is_simplex_etf",
    "is_stiefel",
    "project_stiefel",
    "project_tangent",
    "random_stiefel",
    "require_etf_dims",
    "require_rotation",
    "retract_stiefel",
    "simplex_etf",
]
