"""Conformance suites: classes to inherit for a head, solver, adjoint, objective, rule or loss.

A suite asks for the object (``make``), each check is a test method of its own, and what your class cannot do
it says in ``unsupported``, with the reason. Importing this package needs pytest.
"""

from etflayers.testing.suites.adjoints import AdjointSuite
from etflayers.testing.suites.base import Suite
from etflayers.testing.suites.heads import HeadSuite
from etflayers.testing.suites.losses import LossSuite
from etflayers.testing.suites.objectives import ObjectiveSuite
from etflayers.testing.suites.rules import FrameRuleSuite
from etflayers.testing.suites.solvers import FrameSolverSuite, StiefelSolverSuite

__all__ = [
    "AdjointSuite",
    "FrameRuleSuite",
    "FrameSolverSuite",
    "HeadSuite",
    "LossSuite",
    "ObjectiveSuite",
    "StiefelSolverSuite",
    "Suite",
]
