"""Compile every kernel with every shipped configuration, with no GPU, and print what came out.

    python tests/aot_compile.py sm_90 gfx942

prints a JSON list, one object per compiled kernel, for the architectures named. It must run without TRITON_INTERPRET, so
the tests start it as a process. The interpreter accepts code that does not compile, and knows neither registers nor
shared memory: this knows those.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from fastmorph_kernels import compose_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@dataclass(frozen=True)
class Case:
    """One specialisation of one kernel: what a launch would hand to the compiler."""

    kernel: str
    function: Any
    config: str
    dtype: torch.dtype
    layout: str  # "any": nothing is known; else strides in `unit` are 1, other strides and channels multiples of 16
    unit: tuple[str, ...]
    constants: dict[str, Any]
    options: dict[str, int]


def compose_cases(target: str) -> Iterator[Case]:
    """Every configuration at every dtype; on sm_90, for which they were chosen, every layout and precision too."""
    layouts: dict[str, tuple[str, ...]] = {"any": ()}
    if target == "sm_90":
        layouts["contiguous"] = ("stride_fz", "stride_sz", "stride_oz")
        layouts["channels_last"] = ("stride_fi", "stride_sh", "stride_oi")
    for dtype, configs in compose_kernel.CONFIGS.items():
        variants = [(layout, "ieee") for layout in layouts]
        if target == "sm_90" and dtype == torch.float32:
            variants += [("any", "tf32"), ("any", "tf32x3")]
        for config, (layout, precision) in itertools.product(configs, variants):
            yield Case(
                kernel="compose",
                function=compose_kernel._compose_kernel,
                config=f"{config}, {precision}",
                dtype=dtype,
                layout=layout,
                unit=layouts[layout],
                constants={
                    "PRECISION": precision,
                    "BLOCK_M": config.block_m,
                    "BLOCK_I": config.block_n,
                    "BLOCK_U": 1,
                    "BLOCK_K": config.block_k,
                },
                options={"num_warps": config.num_warps, "num_stages": config.num_stages},
            )


KERNELS = (compose_cases,)


def compile_case(case: Case, target: str) -> dict[str, Any]:
    """Compile one case; `stack` counts the bytes a thread spills, `shared` those a block shares."""
    constants = case.constants | dict.fromkeys(case.unit, 1)
    multiple_of_16 = [["tt.divisibility", 16]]
    signature, attributes = {}, {}
    for position, name in enumerate(case.function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS[case.dtype]
            attributes[(position,)] = multiple_of_16
        else:
            signature[name] = "i32"
            if case.layout != "any" and (name.startswith("stride_") or name.endswith("_channels")):
                attributes[(position,)] = multiple_of_16
    compiled = triton.compile(
        ASTSource(case.function, signature, constants, attributes),
        target=TARGETS[target],
        options={**case.options, "enable_fp_fusion": True},
    )
    asm = compiled.asm
    resources = cubin_resources(asm["cubin"]) if "cubin" in asm else amd_resources(asm["amdgcn"])
    return {
        "kernel": case.kernel,
        "config": case.config,
        "dtype": str(case.dtype).removeprefix("torch."),
        "layout": case.layout,
        "target": target,
        "shared": compiled.metadata.shared,
        **resources,
    }


def cubin_resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {"registers": number("REG", text), "stack": number("STACK", text) + number("LOCAL", text)}


def amd_resources(assembly: str) -> dict[str, int]:
    return {"registers": number("NumVgprs", assembly), "stack": number("ScratchSize", assembly)}


def number(key: str, text: str) -> int:
    found = re.search(rf"\b{key}:\s*(\d+)", text)
    assert found, f"no {key} in {text}"
    return int(found[1])


if __name__ == "__main__":
    rows = [compile_case(case, name) for name in sys.argv[1:] for cases in KERNELS for case in cases(name)]
    json.dump(rows, sys.stdout)
