"""What every code promises, against the matrix of its words; and the words of each kind."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from etflayers import simplex_etf
from etflayers._torch import allow_in_graph
from etflayers.codes import (
    DenseCode,
    KerdockCode,
    OrthoplexCode,
    RootCode,
    SimplexCode,
    SphericalCode,
    coherence,
    kerdock,
)
from etflayers.codes.kerdock import _forms
from etflayers.errors import InvalidArgumentError


def random_rows(num_classes: int, in_features: int) -> Tensor:
    rows = torch.randn(
        num_classes, in_features, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    return F.normalize(rows)


def make_dense(num_classes: int, in_features: int) -> DenseCode:
    return DenseCode(random_rows(num_classes, in_features))


def make_transformed(num_classes: int, in_features: int) -> KerdockCode:
    """A Kerdock code so small that it would take a product, but has to take transforms: see ``code``."""
    return KerdockCode(num_classes, in_features)


# Full and cut, of one piece and of several.
MAKERS: list[tuple[Callable[[int, int], SphericalCode], int, int]] = [
    (SimplexCode, 5, 4),
    (SimplexCode, 5, 5),
    (SimplexCode, 4, 9),
    (OrthoplexCode, 8, 4),
    (OrthoplexCode, 6, 4),
    (OrthoplexCode, 3, 4),
    (OrthoplexCode, 2, 1),
    (KerdockCode, 24, 4),
    (KerdockCode, 288, 16),
    (KerdockCode, 265, 16),
    (KerdockCode, 70, 16),
    (KerdockCode, 32, 16),
    (KerdockCode, 7, 16),
    (KerdockCode, 600, 64),
    (KerdockCode, 700, 256),
    (make_transformed, 288, 16),
    (make_transformed, 265, 16),
    (RootCode, 2, 2),
    (RootCode, 6, 3),
    (RootCode, 20, 5),
    (RootCode, 17, 5),
    (RootCode, 3, 5),
    (make_dense, 7, 3),
    (make_dense, 2051, 5),
]


@pytest.fixture(
    params=MAKERS, ids=lambda case: f"{getattr(case[0], '__name__', '')}-{case[1]}-{case[2]}", scope="module"
)
def code(request: pytest.FixtureRequest) -> Iterator[SphericalCode]:
    make, num_classes, in_features = request.param
    with pytest.MonkeyPatch.context() as patch:
        if make is make_transformed:
            patch.setattr(kerdock, "_LARGEST_STORED", 0)
        yield make(num_classes, in_features)


def sample(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def test_words_are_unit_vectors_and_their_largest_cosine_is_the_one_it_says(code: SphericalCode) -> None:
    words = code.dense(dtype=torch.float64)
    assert words.shape == (code.num_classes, code.in_features)
    gram = words @ words.mT
    torch.testing.assert_close(gram.diagonal(), torch.ones_like(gram.diagonal()), rtol=0, atol=1e-12)
    largest = float(gram.fill_diagonal_(-torch.inf).max())
    assert code.largest_cosine == pytest.approx(largest, abs=1e-12)
    assert float(coherence(code)) == pytest.approx(largest, abs=1e-12)
    assert torch.linalg.matrix_rank(words) <= code.dimension
    assert f"{code.kind}: {code.num_classes} unit vectors in R^{code.in_features}" in code.describe()


def test_words_by_number_are_the_rows(code: SphericalCode) -> None:
    index = torch.randint(code.num_classes, (2, 3), generator=torch.Generator().manual_seed(1))
    found = code.words(index.int(), dtype=torch.float64)
    torch.testing.assert_close(found, code.dense(dtype=torch.float64)[index], rtol=0, atol=1e-14)
    assert code.words(index).dtype == code.dense().dtype == torch.float32
    assert code.words(index, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert code.words(index[:0]).shape == (0, 3, code.in_features)
    with pytest.raises(InvalidArgumentError, match=f"index must be in .0, {code.num_classes}"):
        code.words(torch.tensor([code.num_classes]))
    with pytest.raises(InvalidArgumentError, match="index must have an integer dtype"):
        code.words(torch.tensor([0.0]))


@pytest.mark.parametrize("leading", [(), (3,), (2, 0), (2, 3)])
def test_logits_and_predictions_are_those_of_the_matrix(
    code: SphericalCode, leading: tuple[int, ...]
) -> None:
    words, features = code.dense(dtype=torch.float64), sample(*leading, code.in_features)
    torch.testing.assert_close(code.logits(features), features @ words.mT, rtol=0, atol=1e-12)
    predicted = code.predict(features)
    assert predicted.shape == leading
    best = (features @ words.mT).amax(-1)
    reached = (features * words[predicted]).sum(-1)  # which of two equal logits is left to rounding
    torch.testing.assert_close(reached, best, rtol=0, atol=1e-12)
    single = code.logits(features.float())
    torch.testing.assert_close(single, (features @ words.mT).float(), rtol=1e-6, atol=1e-6)


def test_pieces_lie_in_order_and_their_products_are_those_of_the_matrix(code: SphericalCode) -> None:
    words = code.dense(dtype=torch.float64)
    ranges = [code.piece_range(piece) for piece in range(code.pieces)]
    assert [stop for _, stop in ranges] == [*(start for start, _ in ranges[1:]), code.num_classes]
    assert ranges[0][0] == 0
    assert code.full_pieces in (code.pieces, code.pieces - 1)
    features = sample(3, code.in_features)
    spans = {(0, 1), (0, code.pieces), (code.pieces - 1, code.pieces), (code.pieces // 2, code.pieces)}
    for start, stop in spans:
        rows = words[ranges[start][0] : ranges[stop - 1][1]]
        found = code.piece_logits(features, start, stop)
        torch.testing.assert_close(found, features @ rows.mT, rtol=0, atol=1e-12)
        cotangent = sample(3, rows.shape[0])
        adjoint = code.piece_adjoint(cotangent, start, stop)
        torch.testing.assert_close(adjoint, cotangent @ rows, rtol=0, atol=1e-11)
    with pytest.raises(InvalidArgumentError, match=f"within the {code.pieces} pieces, got 0 and 0"):
        code.piece_logits(features, 0, 0)
    with pytest.raises(InvalidArgumentError, match="start and stop"):
        code.piece_range(code.pieces)


def test_halves_are_the_first_words_of_full_pieces(code: SphericalCode) -> None:
    features = sample(3, code.in_features)
    if not code.antipodal:
        for half in (code.half_logits, code.half_adjoint):
            with pytest.raises(
                InvalidArgumentError, match="not antipodal and has no halves: use piece_logits"
            ):
                half(features, 0, 1)
        return
    with pytest.raises(
        InvalidArgumentError, match=f"within the {code.full_pieces} pieces with all their words"
    ):
        code.half_logits(features, 0, code.full_pieces + 1)
    words, half = code.dense(dtype=torch.float64), code.piece_size // 2
    full = code.full_pieces
    for start, stop in {(0, full), (full - 1, full), (full // 2, full)}:
        if not full:
            break
        pieces = words[: full * code.piece_size].view(full, 2, half, -1)[start:stop]
        assert torch.equal(pieces[:, 0], -pieces[:, 1])
        found = code.half_logits(features, start, stop)
        expected = torch.einsum("bd,pmd->pbm", features, pieces[:, 0])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        cotangent = sample(stop - start, 3, half)
        expected = torch.einsum("pbm,pmd->bd", cotangent, pieces[:, 0])
        adjoint = code.half_adjoint(cotangent, start, stop)
        single = code.half_adjoint(cotangent[:, 0], start, stop)
        torch.testing.assert_close(single, expected[0], rtol=0, atol=1e-11)
        torch.testing.assert_close(adjoint, expected, rtol=0, atol=1e-11)


def test_derivatives_are_those_of_the_matrix_in_both_modes(code: SphericalCode) -> None:
    words, features = code.dense(dtype=torch.float64), sample(2, code.in_features).requires_grad_()
    if code.num_classes < 30:
        assert torch.autograd.gradcheck(code.logits, features, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(lambda x: code.logits(x).square(), features)
    cotangent = sample(2, code.num_classes).requires_grad_()
    (grad,) = torch.autograd.grad(code.logits(features), features, cotangent)
    torch.testing.assert_close(grad, cotangent @ words, rtol=0, atol=1e-11)
    adjoint = code.piece_adjoint(cotangent, 0, code.pieces)
    (back,) = torch.autograd.grad(adjoint, cotangent, features.detach())
    torch.testing.assert_close(back, features @ words.mT, rtol=0, atol=1e-11)
    row = features[0].detach()
    torch.testing.assert_close(torch.func.jacfwd(code.logits)(row), words, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.vmap(code.logits)(features), code.logits(features))


def test_half_precision_and_autocast_have_the_dtype_of_linear(code: SphericalCode) -> None:
    words = code.dense(dtype=torch.float64)
    features = sample(3, code.in_features, dtype=torch.bfloat16)
    exact = features.double() @ words.mT
    assert code.logits(features).dtype == torch.bfloat16
    torch.testing.assert_close(code.logits(features).double(), exact, rtol=2**-8, atol=1e-5)
    assert code.piece_logits(features, 0, 1).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        linear = F.linear(features.float(), words.float())
        assert code.logits(features.float()).dtype == linear.dtype
        assert code.logits(features.double()).dtype == torch.float64
        inside = code.piece_logits(features.float(), 0, code.pieces)
    torch.testing.assert_close(inside.double(), exact, rtol=1e-6, atol=1e-6)


def test_copies_are_equal_and_work(code: SphericalCode) -> None:
    features = sample(2, code.in_features)
    expected = code.logits(features)
    for other in (copy.deepcopy(code), pickle.loads(pickle.dumps(code)), copy.copy(code)):
        assert other.num_classes == code.num_classes
        assert torch.equal(other.logits(features), expected)
        assert other == code or isinstance(code, DenseCode)
        assert hash(other) == hash(code) or isinstance(code, DenseCode)
    with pytest.raises((AttributeError, TypeError)):
        code.num_classes = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "code",
    [KerdockCode(265, 16), KerdockCode(1030, 256), SimplexCode(5, 5), RootCode(17, 5), make_dense(7, 3)],
    ids=lambda c: c.kind,
)
def test_compiles_into_one_graph_with_its_gradient(code: SphericalCode) -> None:
    torch.compiler.reset()
    features = sample(3, code.in_features).requires_grad_()
    compiled = torch.compile(lambda x: code.logits(2 * x), backend="aot_eager", fullgraph=True)
    found = compiled(features)
    torch.testing.assert_close(found, 2 * code.logits(features))
    (grad,) = torch.autograd.grad(found[0, 1], features)
    torch.testing.assert_close(grad[0], 2 * code.dense(dtype=torch.float64)[1])


class SquaredHalves(torch.autograd.Function):
    """A loss as one node of a graph, which is traced with tensors that have no values."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, code: KerdockCode) -> Tensor:
        halves = code.half_logits(features, 0, code.full_pieces)
        ctx.code = code
        ctx.save_for_backward(halves)
        return halves.square().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (halves,) = ctx.saved_tensors
        return 2 * grad * ctx.code.half_adjoint(halves, 0, ctx.code.full_pieces), None


@allow_in_graph
def squared_halves(features: Tensor, num_classes: int, in_features: int) -> Tensor:
    found: Tensor = SquaredHalves.apply(features, KerdockCode(num_classes, in_features))
    return found


@pytest.mark.parametrize(("num_classes", "in_features"), [(70, 16), (1030, 256)])
def test_halves_in_a_node_that_others_trace(num_classes: int, in_features: int) -> None:
    torch.compiler.reset()
    features = sample(3, in_features).requires_grad_()
    compiled = torch.compile(
        lambda x: squared_halves(2 * x, num_classes, in_features), backend="aot_eager", fullgraph=True
    )
    found = compiled(features)
    words = KerdockCode(num_classes, in_features).dense(dtype=torch.float64)
    words = words[: num_classes // (2 * in_features) * 2 * in_features]
    expected = (2 * features @ words.mT).square().sum() / 2  # both halves have the same squares
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(value, features)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients)


# --- The words of each kind ---


@pytest.mark.parametrize(("num_classes", "in_features"), [(5, 4), (5, 5), (5, 8)])
def test_a_simplex_code_is_the_canonical_frame(num_classes: int, in_features: int) -> None:
    expected = simplex_etf(num_classes, in_features, dtype=torch.float64)
    found = SimplexCode(num_classes, in_features).dense(dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("size", "step"), [(16, 1), (64, 1), (256, 16), pytest.param(256, 1, marks=pytest.mark.slow)]
)
def test_kerdock_bases_are_orthonormal_and_mutually_unbiased(size: int, step: int) -> None:
    code = KerdockCode(size * (size + 2), size)
    bases = code.dense().unflatten(0, (-1, 2, size))[:, 0]  # without the negatives
    assert len(bases) == size // 2 + 1
    # The d products of entries +-1/sqrt d are powers of two: exact in float32, and so is their sum.
    for number in range(0, len(bases), step):
        cosines = (bases[number] @ bases[number:].flatten(0, 1).mT).unflatten(1, (-1, size)).abs_()
        assert torch.equal(cosines[:, 0], torch.eye(size))
        assert (cosines[:, 1:] == 1 / math.sqrt(size)).all()


def rank_over_two(rows: list[int]) -> int:
    """The rank over GF(2) of a matrix whose rows are the binary digits of numbers."""
    rank, left = 0, [row for row in rows if row]
    while left:
        pivot = left.pop()
        rank += 1
        low = pivot & -pivot
        left = [row for row in (row ^ pivot if row & low else row for row in left) if row]
    return rank


@pytest.mark.parametrize("size", [4, 16, 1024])
def test_sums_of_two_kerdock_forms_have_full_rank(size: int) -> None:
    digits = size.bit_length() - 1
    forms = np.array(_forms(size))
    upper = forms[:, :, None] >> np.arange(digits) & 1
    matrices = upper ^ upper.transpose(0, 2, 1)
    assert not np.tril(upper.transpose(0, 1, 2)).any()  # upper triangles
    numbers = (matrices << np.arange(digits)).sum(-1)
    pairs = np.array([(s, t) for s in range(size // 2) for t in range(s)])
    if len(pairs) > 4000:
        pairs = pairs[np.random.default_rng(0).choice(len(pairs), 4000, replace=False)]
    assert {rank_over_two((numbers[s] ^ numbers[t]).tolist()) for s, t in pairs} == {digits}


def test_random_words_of_the_largest_kerdock_code_in_1024_dimensions() -> None:
    code = KerdockCode(1024 * 1026, 1024)
    index = torch.randint(code.num_classes, (2000,), generator=torch.Generator().manual_seed(0)).unique()
    words = code.words(index)
    cosines = (words @ words.mT).fill_diagonal_(0)
    assert cosines.max() == 1 / 32
    values = set(cosines.unique().tolist())
    assert values <= {-1.0, -1 / 32, 0.0, 1 / 32}
    features = sample(2, 1024, dtype=torch.float32)
    found = code.logits(features)[:, index]
    torch.testing.assert_close(found, features @ words.mT, rtol=0, atol=2e-6)


@pytest.mark.parametrize("num_classes", range(2, 13))
def test_a_part_of_the_roots_has_the_largest_cosine_it_says(num_classes: int) -> None:
    for in_features in (4, 5, 6):
        code = RootCode(num_classes, in_features)
        assert float(coherence(code)) == pytest.approx(code.largest_cosine, abs=1e-12)


def test_a_root_is_told_by_the_largest_and_the_smallest_coordinate() -> None:
    code = RootCode(42, 7)
    features = sample(50, 7)
    first, last = code.pair(code.predict(features))
    assert torch.equal(first, features.argmax(-1))
    assert torch.equal(last, features.argmin(-1))
    constant = code.predict(torch.ones(3, 7))
    assert ((constant >= 0) & (constant < 42)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SimplexCode(5, 3), "in_features must be at least num_classes - 1 = 4, got 3"),
        (lambda: OrthoplexCode(9, 4), "num_classes must be at most 2 \\* in_features = 8"),
        (lambda: KerdockCode(10, 32), "in_features must be a power of 4 from 4 to 4096.*got 32"),
        (
            lambda: KerdockCode(289, 16),
            "at most in_features \\* \\(in_features \\+ 2\\) = 288.*widen.* to 64",
        ),
        (lambda: RootCode(13, 4), "at most in_features \\* \\(in_features - 1\\) = 12"),
        (lambda: KerdockCode(1, 16), "num_classes must be at least 2, got 1"),
        (lambda: OrthoplexCode(2.0, 4), "num_classes must be an integer, got 2.0"),
        (lambda: DenseCode(torch.ones(2, 2)), "a length differs from 1 by 0.414"),
        (lambda: DenseCode(torch.ones(1, 2)), "at least 2 classes"),
        (
            lambda: OrthoplexCode(8, 4).logits(torch.ones(3, 5)),
            "features must have shape \\(..., 4\\), got \\(3, 5\\)",
        ),
        (lambda: OrthoplexCode(8, 4).logits(torch.ones(4).long()), "features must have a real floating"),
        (
            lambda: OrthoplexCode(8, 4).piece_adjoint(torch.ones(3, 7), 0, 1),
            "cotangent must have shape \\(..., 8\\)",
        ),
        (
            lambda: OrthoplexCode(8, 4).half_adjoint(torch.ones(2, 3, 4), 0, 1),
            "cotangent must have shape \\(1, ..., 4\\)",
        ),
    ],
)
def test_bad_input_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        make()
