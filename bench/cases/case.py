"""One specialisation of one kernel, and what compiling it for a chip gives; no GPU is needed."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    **{f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (80, 86, 89, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes of shared memory that a block may use: CUDA C++ programming guide, compute capabilities; on gfx942 all of its LDS.
_SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
SHARED_LIMIT = {target: 1024 * kilobytes for target, kilobytes in _SHARED.items()}

_TYPES = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# A chip's matrix instructions in its assembly, in the order in which they are looked for.
_MATRIX = {
    "tcgen05": r"\btcgen05\.mma\b",
    "wgmma": r"\bwgmma\.mma_async\b",
    "dmma": r"\bmma\.sync\.\S*\.f64\b",
    "mma": r"\bmma\.sync\b",
    "mfma": r"\bv_mfma_",
}
_LOADS = r"\bld\.global\b|\bcp\.async\.c[ag]\.shared\.global\b|\b(?:global|buffer)_load_"
_WIDE_LOADS = (
    r"\bld\.global\S*\.(?:v4\.[bfsu]32|v2\.[bfsu]64)\b|\bcp\.async\.cg\.shared\.global\b|\b(?:global|buffer)_load_dwordx4\b"
)


@dataclass(frozen=True)
class Case:
    """What a launch would hand to the compiler.

    Arguments that are no constants are pointers of `dtype` where their name ends in `_ptr` and i32 elsewhere; `types` says
    otherwise, by argument, in Triton's names ("*fp64", "*i32", "i64", "fp32").
    """

    kernel: str
    function: Any  # the decorated kernel
    dtype: str  # that of the call, as in "float32"
    variant: str  # which of the kernel's configurations, as in "large"
    constants: Mapping[str, Any]  # every `tl.constexpr` argument
    options: Mapping[str, int]  # num_warps, num_stages; enable_fp_fusion where a kernel does without
    layout: str = "any"  # a name for `unit` and `aligned`
    unit: tuple[str, ...] = ()  # arguments that are 1, which Triton compiles in
    aligned: tuple[str, ...] = ()  # arguments known to be multiples of 16, as pointers always are here
    types: Mapping[str, str] = field(default_factory=dict)


def aligned_with(function: Any, unit: tuple[str, ...]) -> tuple[str, ...]:
    """All strides and channel counts of a kernel but those in `unit`: what is a multiple of 16 in a well-sized layer."""
    names = function.arg_names
    return tuple(n for n in names if n not in unit and (n.startswith("stride_") or n.endswith("_channels")))


def compile_case(case: Case, target: str) -> dict[str, Any]:
    """Compile one case for a target of `TARGETS`.

    Returns a row: what the case is; registers a thread; `stack`, bytes of local memory a thread, and `spilled`, those of
    them that hold registers; `shared`, bytes a block; `matrix`, the kind of matrix instruction ("fma" where there is
    none) and `matrix_count`; `loads` from global memory, and how many of them are `wide` (128 bits a thread).
    """
    constants = {**case.constants, **dict.fromkeys(case.unit, 1)}
    signature, attributes = {}, {}
    for position, name in enumerate(case.function.arg_names):
        pointer = name.endswith("_ptr")
        given = f"*{_TYPES[case.dtype]}" if pointer else "i32"
        signature[name] = "constexpr" if name in constants else case.types.get(name, given)
        if name not in constants and (pointer or name in case.aligned):
            attributes[(position,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(case.function, signature, constants, attributes),
        target=TARGETS[target],
        options={"enable_fp_fusion": True, **case.options},
    )
    asm = compiled.asm
    nvidia = "cubin" in asm
    resources = _cubin_resources(asm["cubin"]) if nvidia else _amd_resources(asm["amdgcn"])
    return {
        "kernel": case.kernel,
        "module": case.function.fn.__module__,
        "variant": case.variant,
        "dtype": case.dtype,
        "layout": case.layout,
        "target": target,
        "constants": dict(case.constants),
        "options": dict(case.options),
        "shared": compiled.metadata.shared,
        **resources,
        **_instructions(asm["ptx" if nvidia else "amdgcn"]),
    }


def _cubin_resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        stack = _number("STACK", usage) + _number("LOCAL", usage)
        # Without a frame in local memory there is nowhere to spill to, and no need to disassemble.
        stores = re.findall(r"\bSTL(?:\.(64|128|U8|U16))?\b", _cuobjdump("-sass", file.name)) if stack else []
    width = {"": 4, "64": 8, "128": 16, "U8": 1, "U16": 2}
    return {"registers": _number("REG", usage), "stack": stack, "spilled": sum(width[store] for store in stores)}


def _cuobjdump(option: str, path: str) -> str:
    command = [triton.knobs.nvidia.cuobjdump.path, option, path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _amd_resources(assembly: str) -> dict[str, int]:
    return {
        "registers": _number("NumVgprs", assembly),
        "stack": _number("ScratchSize", assembly),
        "spilled": 4 * _number("vgpr_spill_count", assembly),
    }


def _instructions(assembly: str) -> dict[str, Any]:
    counts = {kind: len(re.findall(pattern, assembly)) for kind, pattern in _MATRIX.items()}
    kind = next((kind for kind, count in counts.items() if count), "fma")
    return {
        "matrix": kind,
        "matrix_count": counts.get(kind, 0),
        "loads": len(re.findall(_LOADS, assembly)),
        "wide": len(re.findall(_WIDE_LOADS, assembly)),
    }


def _number(key: str, text: str) -> int:
    found = re.search(rf"\b{key}:\s*(\d+)", text)
    if found is None:
        raise ValueError(f"the compiler's report has no {key}: {text}")
    return int(found[1])
