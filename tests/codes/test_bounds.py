"""Bounds against codes that attain them, and against each other."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from etflayers.codes import (
    KerdockCode,
    OrthoplexCode,
    SimplexCode,
    coherence,
    coherence_bound,
    levenshtein_bound,
    rankin_bound,
    welch_bound,
)
from etflayers.codes.bounds import _design_size, _interval_end, _levenshtein_size
from etflayers.errors import InvalidArgumentError


@pytest.mark.parametrize(("num_classes", "in_features"), [(2, 1), (5, 4), (5, 9)])
def test_the_simplex_attains_all_bounds(num_classes: int, in_features: int) -> None:
    cosine = float(coherence(SimplexCode(num_classes, in_features)))
    assert rankin_bound(num_classes, in_features) == pytest.approx(cosine, abs=1e-12)
    assert coherence_bound(num_classes, in_features) == pytest.approx(cosine, abs=1e-9)


@pytest.mark.parametrize("num_classes", [6, 8])
def test_the_orthoplex_attains_rankins_bound(num_classes: int) -> None:
    assert coherence_bound(num_classes, 4) == float(coherence(OrthoplexCode(num_classes, 4))) == 0.0


# Sharp codes: Levenshtein (1998), table 9.1; Cohn and Kumar (2007), arXiv math/0607446, table 1.
@pytest.mark.parametrize(
    ("num_classes", "dimension", "cosine"),
    [
        (12, 3, 1 / math.sqrt(5)),
        (16, 5, 1 / 5),
        (27, 6, 1 / 4),
        (56, 7, 1 / 3),
        (240, 8, 1 / 2),
        (275, 22, 1 / 6),
        (552, 23, 1 / 5),
        (4600, 23, 1 / 3),
        (196560, 24, 1 / 2),
        *[(k, 2, math.cos(2 * math.pi / k)) for k in (3, 5, 8)],
    ],
)
def test_levenshteins_bound_is_attained_by_sharp_codes(
    num_classes: int, dimension: int, cosine: float
) -> None:
    assert levenshtein_bound(num_classes, dimension) == pytest.approx(cosine, abs=1e-9)


@pytest.mark.parametrize("dimension", [3, 4, 17, 300])
def test_the_pieces_of_levenshteins_function_meet_at_the_sizes_of_designs(dimension: int) -> None:
    for strength in range(1, 12):
        end = _interval_end(dimension, strength)
        for half in (strength, strength + 1):
            size = _levenshtein_size(dimension, half, end)
            assert size == pytest.approx(_design_size(dimension, strength + 1), rel=1e-6)
    bounds = [levenshtein_bound(k, dimension) for k in range(2, 400, 7)]
    assert bounds == sorted(bounds)


def test_no_code_is_below_a_bound() -> None:
    for num_classes, dimension in [(30, 3), (50, 7), (9, 2)]:
        rows = torch.randn(num_classes, dimension, generator=torch.Generator().manual_seed(0)).double()
        rows = F.normalize(rows)
        gram = (rows @ rows.mT).fill_diagonal_(0)
        assert coherence_bound(num_classes, dimension) < gram.max()
        for order in (1, 2, 3):
            assert welch_bound(num_classes, dimension, order=order) < gram.abs().max()
    # The table of KerdockCode: from 4% above the bound to a tenth of that.
    for size, gap in [(16, 0.04), (64, 0.013), (256, 0.004)]:
        bound = coherence_bound(size * (size + 2), size)
        assert 0 < KerdockCode(size * (size + 2), size).largest_cosine / bound - 1 < gap


def test_welchs_bound_is_attained_by_equiangular_lines_which_the_orthoplex_beats() -> None:
    golden = (1 + math.sqrt(5)) / 2
    lines = F.normalize(
        torch.tensor([[0, 1, golden], [0, 1, -golden]], dtype=torch.float64)[
            :, [[0, 1, 2], [1, 2, 0], [2, 0, 1]]
        ]
    ).flatten(0, 1)
    lines = F.normalize(lines)
    gram = (lines @ lines.mT).fill_diagonal_(0)
    assert float(gram.abs().max()) == pytest.approx(welch_bound(6, 3), abs=1e-12)
    assert float(coherence(lines)) == pytest.approx(welch_bound(6, 3), abs=1e-12)
    assert float(coherence(OrthoplexCode(6, 3))) == 0.0
    # Mutually unbiased bases attain the second order: 24 vectors in R^4 are 12 lines.
    assert welch_bound(12, 4, order=2) <= 0.5


def test_very_many_words_still_have_a_bound() -> None:
    assert 0.999 < levenshtein_bound(10**9, 3) < 1
    assert levenshtein_bound(3, 1) == 1.0


@pytest.mark.parametrize("bound", [rankin_bound, welch_bound, levenshtein_bound, coherence_bound])
def test_bad_input_is_named(bound: object) -> None:
    with pytest.raises(InvalidArgumentError, match="num_classes must be at least 2"):
        bound(1, 3)  # type: ignore[operator]
    with pytest.raises(InvalidArgumentError, match="dimension must be at least 1"):
        bound(3, 0)  # type: ignore[operator]
