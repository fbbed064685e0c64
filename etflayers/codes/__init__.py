"""Spherical codes: few or many classes as unit vectors in R^d, far apart from each other."""

from etflayers.codes.bounds import coherence_bound, levenshtein_bound, rankin_bound, welch_bound
from etflayers.codes.catalog import find_code, spherical_code
from etflayers.codes.code import AntipodalCode, SphericalCode
from etflayers.codes.dense import DenseCode
from etflayers.codes.kerdock import KerdockCode
from etflayers.codes.measures import coherence, one_vs_rest_distance
from etflayers.codes.optimized import optimized_rows, softmax_rows
from etflayers.codes.orthoplex import OrthoplexCode
from etflayers.codes.roots import RootCode
from etflayers.codes.simplex import SimplexCode

__all__ = [
    "AntipodalCode",
    "DenseCode",
    "KerdockCode",
    "OrthoplexCode",
    "RootCode",
    "SimplexCode",
    "SphericalCode",
    "coherence",
    "coherence_bound",
    "find_code",
    "levenshtein_bound",
    "one_vs_rest_distance",
    "optimized_rows",
    "rankin_bound",
    "softmax_rows",
    "spherical_code",
    "welch_bound",
]
