"""Simplex equiangular tight frames and the Stiefel manifold: constructions and predicates, no solver."""

from typing import TYPE_CHECKING

from etflayers._imports import names_on_demand
from etflayers.geometry.canonical import canonical_etf_adjoint, canonical_etf_logits
from etflayers.geometry.frames import (
    centered,
    centered_basis_adjoint,
    centered_basis_apply,
    centered_rows,
    etf_from_coordinates,
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

if not TYPE_CHECKING:
    __getattr__, __dir__ = names_on_demand(
        __name__,
        moved={
            "centred": "etflayers.geometry.centered",
            "centred_basis_adjoint": "etflayers.geometry.centered_basis_adjoint",
            "centred_basis_apply": "etflayers.geometry.centered_basis_apply",
        },
    )

__all__ = [
    "Check",
    "canonical_etf_adjoint",
    "canonical_etf_logits",
    "centered",
    "centered_basis_adjoint",
    "centered_basis_apply",
    "centered_rows",
    "etf_from_coordinates",
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
