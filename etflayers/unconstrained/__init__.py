"""The unconstrained-features model: features that are free variables, a classifier on top, and its landscape.

A network that can interpolate is replaced by its last feature layer. What is left of training is the
interplay of features and classifier, where neural collapse can be proved.
"""

from etflayers.unconstrained.landscape import Landscape, Point, convex_optimum, minimize
from etflayers.unconstrained.model import UnconstrainedFeatures

__all__ = ["Landscape", "Point", "UnconstrainedFeatures", "convex_optimum", "minimize"]
