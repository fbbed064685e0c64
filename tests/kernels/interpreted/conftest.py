"""Triton's interpreter as these checks need it: float32 through NumPy, one program after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton.runtime import interpreter

torch.set_num_threads(1)

_patch_lang_tensor = interpreter._patch_lang_tensor


def _with_index(tensor: Any, scope: Any) -> None:
    _patch_lang_tensor(tensor, scope)
    # A kernel's scalars are arrays of one element, which NumPy 2.4 no longer takes for an int.
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


@pytest.fixture(autouse=True, scope="session")
def interpreter_repaired() -> Any:
    options = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", _with_index)
        # It ignores `debug=True` at a launch, and with it every tl.device_assert.
        patch.setattr(interpreter.interpreter_builder, "options", options)
        yield
