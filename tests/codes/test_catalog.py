"""Which code is taken, and that it is the one it is said to be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from etflayers.codes import coherence, find_code, spherical_code
from etflayers.errors import InvalidArgumentError


@pytest.mark.parametrize(
    ("num_classes", "in_features", "kind"),
    [
        (2, 1, "simplex"),
        (17, 16, "simplex"),
        (18, 16, "orthoplex"),
        (32, 16, "orthoplex"),
        (33, 16, "kerdock"),
        (66048, 256, "kerdock"),
        (24, 5, "optimized"),
        (289, 16, "optimized"),
        (5000, 100, "roots"),
    ],
)
def test_auto_takes_the_first_that_there_is(
    num_classes: int, in_features: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "etflayers.codes.catalog.optimized_rows", lambda k, d, **_: torch.eye(d).repeat(20, 1)[:k].double()
    )
    code = find_code(num_classes, in_features)
    assert (code.kind, code.num_classes, code.in_features) == (kind, num_classes, in_features)
    assert f"{kind}: {num_classes} unit vectors in R^{in_features}" in code.describe()


@pytest.mark.parametrize("kind", ["simplex", "orthoplex", "kerdock", "roots", "optimized", "softmax"])
def test_every_kind_can_be_asked_for(kind: str) -> None:
    code = find_code(5, 4, kind=kind, generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert code.kind == kind
    assert float(coherence(code)) == pytest.approx(code.largest_cosine, abs=1e-12)
    rows = spherical_code(
        5,
        4,
        kind=kind,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,  # type: ignore[arg-type]
    )
    assert torch.equal(rows, code.dense(dtype=torch.float64))


def test_the_matrix_is_on_the_device_and_in_the_dtype_asked_for() -> None:
    rows = spherical_code(20, 16, device="meta", dtype=torch.bfloat16)
    assert (rows.device.type, rows.dtype, rows.shape) == ("meta", torch.bfloat16, (20, 16))


def test_an_optimized_matrix_is_kept_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    cache = tmp_path / "code.safetensors"
    first = find_code(5, 3, kind="optimized", cache=cache)
    monkeypatch.setattr("etflayers.codes.catalog.optimized_rows", None)  # not called again
    again = find_code(5, 3, kind="optimized", cache=cache)
    assert torch.equal(first.dense(dtype=torch.float64), again.dense(dtype=torch.float64))
    assert again.kind == "optimized"
    for other in ({"num_classes": 6}, {"kind": "softmax"}):
        with pytest.raises(
            InvalidArgumentError, match=r"code.safetensors' holds .*, not .*take another file"
        ):
            find_code(**{"num_classes": 5, "in_features": 3, "kind": "optimized", "cache": cache, **other})
    find_code(4, 3, cache=tmp_path / "simplex")
    assert [entry.name for entry in tmp_path.iterdir()] == ["code.safetensors"]


def test_bad_input_is_named() -> None:
    with pytest.raises(InvalidArgumentError, match=r"kind must be one of auto, simplex.*got 'welch'"):
        find_code(5, 4, kind="welch")  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="num_classes must be at least 2"):
        find_code(1, 4)
    with pytest.raises(InvalidArgumentError, match=r'say kind="optimized" to do it, or project'):
        find_code(5000, 17)
