"""Every head behind one interface, for the tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import pytest
import torch
from torch import nn

from etflayers.nn import ClassMeanHead, CodeHead, FixedETFHead, LearnedETFHead, NearestETFHead, UnitRowHead


class MakeHead(Protocol):
    """Makes one kind of head; ``seed`` decides its random rotation."""

    def __call__(
        self,
        in_features: int = 6,
        num_classes: int = 4,
        *,
        seed: int = 0,
        scale: float = 1.0,
        normalize: bool = False,
        dtype: torch.dtype | None = None,
    ) -> CodeHead: ...


def _make(kind: str) -> MakeHead:
    def make(
        in_features: int = 6,
        num_classes: int = 4,
        *,
        seed: int = 0,
        scale: float = 1.0,
        normalize: bool = False,
        dtype: torch.dtype | None = None,
    ) -> CodeHead:
        if kind == "canonical":
            return FixedETFHead(
                in_features,
                num_classes,
                rotation="canonical",
                scale=scale,
                normalize=normalize,
                dtype=dtype,
            )
        generator = torch.Generator().manual_seed(seed)
        if kind == "haar":
            return FixedETFHead(
                in_features,
                num_classes,
                rotation="haar",
                scale=scale,
                normalize=normalize,
                generator=generator,
                dtype=dtype,
            )
        if kind == "nearest":
            return NearestETFHead(
                in_features, num_classes, scale=scale, normalize=normalize, generator=generator, dtype=dtype
            )
        if kind == "class_means":
            return ClassMeanHead(
                in_features, num_classes, scale=scale, normalize=normalize, generator=generator, dtype=dtype
            )
        if kind == "unit_rows":
            return UnitRowHead(
                in_features, num_classes, scale=scale, normalize=normalize, generator=generator, dtype=dtype
            )
        if kind == "geoopt":
            pytest.importorskip("geoopt")
        return LearnedETFHead(
            in_features,
            num_classes,
            scale=scale,
            normalize=normalize,
            manifold="geoopt" if kind == "geoopt" else None,
            generator=generator,
            dtype=dtype,
        )

    return make


@pytest.fixture(params=["canonical", "haar", "nearest", "learned", "geoopt", "unit_rows", "class_means"])
def make_head(request: pytest.FixtureRequest) -> MakeHead:
    kind: str = request.param
    return _make(kind)


@pytest.fixture
def require_tracing() -> Callable[[nn.Module], None]:
    """Skip where Dynamo sees no tensor in a subclass of ``nn.Parameter``, such as geoopt's: PyTorch 2.6."""

    def require(module: nn.Module) -> None:
        for parameter in module.parameters():
            try:
                torch.compile(lambda p=parameter: p.mT * p.shape[-1], fullgraph=True, backend="eager")()
            except Exception:
                assert type(parameter) is not nn.Parameter
                pytest.skip(f"this Dynamo cannot look into {type(parameter).__name__}")

    return require


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """These tensors are small: threads that wait for each other are most of the time on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)
