"""What a kernel compiled for a GPU asks for, found out without one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia

__all__ = ["ARCHITECTURES", "SPILLED", "Resources", "resources", "signature_of"]

# Shared memory that one program may have, in bytes: 163 KB on A100, 227 KB on H100 and B200.
ARCHITECTURES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Bytes that a thread may spill.
SPILLED = 512


@dataclass(frozen=True)
class Resources:
    shared: int
    spilled: int
    registers: int
    ptx: str


def signature_of(kernel: Any, pointers: Mapping[str, str], constants: Mapping[str, Any]) -> dict[str, str]:
    """Types of all arguments: those given, ``constexpr``, and int32 for the other sizes and strides."""
    return {
        name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names
    }


def resources(
    kernel: Any,
    pointers: Mapping[str, str],
    constants: Mapping[str, Any],
    architecture: int,
    *,
    multiples: Collection[str] = (),
    **options: Any,
) -> Resources:
    """Compile ``kernel`` for ``sm_<architecture>`` and ask the assembler what it needs.

    Args:
        kernel: a ``triton.jit`` function.
        pointers: types of the arguments that are not int32, e.g. ``{"features": "*fp32", "scale": "fp32"}``.
        constants: its constexpr arguments, and arguments that are ``None``.
        architecture: 80, 90 or 100.
        multiples: sizes and strides that are multiples of 16, as all pointers are taken to be: a launch
            finds this out, and vectorizes loads accordingly.
        options: ``num_warps``, ``num_stages``, ``debug`` and so on.
    """
    signature = signature_of(kernel, pointers, constants)
    aligned = [
        index
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in multiples
    ]
    source = triton.compiler.ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=dict(constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options=options)
    ptx: str = compiled.asm["ptx"]
    name = re.search(r"\.target (sm_\w+)", ptx)
    assert name is not None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        assembler = nvidia.get_ptxas(architecture).path
        done = subprocess.run(
            [assembler, "-v", f"--gpu-name={name[1]}", "-o", str(file.with_suffix(".cubin")), str(file)],
            capture_output=True,
            text=True,
            check=True,
        )
    stores = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    registers = re.search(r"Used (\d+) registers", done.stderr)
    assert stores is not None, done.stderr
    assert registers is not None, done.stderr
    spilled = max(int(stores[1]), int(stores[2]))
    return Resources(compiled.metadata.shared, spilled, int(registers[1]), ptx)
