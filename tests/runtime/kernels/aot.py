"""Compiles every Triton kernel for a GPU that is not here, and prints what came out as JSON, one line a kernel.

Run as a process: `python -m tests.runtime.kernels.aot 80 90`. It must not see TRITON_INTERPRET, which tests set for themselves.

registers, spills (bytes)   of ptxas           shared   bytes a block
widest                      bytes of the widest global load; scalar: how many loads of 16-bit values stand alone
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gpu_runtime.core import BF16
from gpu_runtime.kernels.gpu import attention, elementwise, expand, merge, rope_kv_write, shrink
from gpu_runtime.kernels.gpu.routing import CHUNK_TOKENS

WIDE = 16  # arguments that are multiples of this many bytes or elements, as Triton finds them at a launch
TABLES = {"rows": "*i32", "ranks": "*i32", "dtypes": "*i32"}
NUMBERS = {"layer": "i32", "num_layers": "i32", "max_rank": "i32"}
LLAMA_8B_SPANS = {"S0": 0, "E0": 4096, "S1": 4096, "E1": 5120, "S2": 5120, "E2": 6144}
KV = {"page_stride": "i32", "layer_offset": "i32", "value_offset": "i32", "head_stride": "i32"}
UNEVEN = {"slot", "layer", "num_layers", "num_splits", "group", "num_kv_heads", "scale", "eps", "window"}  # of any value


@dataclass(frozen=True)
class Case:
    """A kernel as Llama-3.1-8B in bf16 launches it; a `variant` as Gemma 3 does, whose heads have 256 columns."""

    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.kernel.fn.__name__}{self.variant}"


def cases() -> Iterator[Case]:
    bf16, f32, i32 = "*bf16", "*fp32", "*i32"
    weights = {"pool": "*u8", **TABLES}
    one = {"FIRST_TARGET": 0, "CODE": BF16}
    chunk = one | {"BLOCK_M": CHUNK_TOKENS, "BLOCK_R": 64}
    yield Case(
        shrink.shrink_row,
        {"t": f32, "x": bf16, **weights, "slots": i32, "tokens": i32, **NUMBERS, "num_columns": "i32", "split_columns": "i32"},
        one | {"BLOCK_R": 16, "BLOCK_K": shrink.BLOCK_K},
    )
    yield Case(
        shrink.shrink_chunk,
        {"t": f32, "x": bf16, **weights, "chunks": i32, **NUMBERS, "num_columns": "i32", "num_splits": "i32"},
        chunk | {"PRECISION": "native", "BLOCK_K": shrink.CHUNK_K},
    )
    adds = {"y": bf16, "t": f32, "pool": "*u8", "rows": i32, "ranks": i32, "scales": f32, "dtypes": i32}
    ends = {**NUMBERS, "y_stride": "i32", "num_splits": "i32"}
    yield Case(
        expand.expand_row,
        {**adds, "slots": i32, "tokens": i32, **ends},
        one | LLAMA_8B_SPANS | {"BLOCK_R": 16, "BLOCK_O": expand.BLOCK_O},
    )
    yield Case(
        expand.expand_chunk, {**adds, "chunks": i32, **ends}, chunk | LLAMA_8B_SPANS | {"PRECISION": "tf32x3", "BLOCK_O": expand.CHUNK_O}
    )
    yield Case(
        merge.merge,
        {"out": bf16, "weight": bf16, "pool": "*u8", "rows": i32, "ranks": i32, "scales": f32, "slot": "i32", **NUMBERS}
        | {"num_columns": "i32"},
        one | LLAMA_8B_SPANS | {"PRECISION": "tf32x3", "BLOCK_R": 16, "BLOCK_O": merge.BLOCK_O, "BLOCK_D": merge.BLOCK_D},
    )
    tables = {"block_tables": i32, "context_lens": i32, "query_starts": i32}
    shape = {
        "scale": "fp32",
        "table_stride": "i32",
        "qkv_stride": "i32",
        **KV,
        "tokens_per_page": "i32",
        "head_dim": "i32",
        "group": "i32",
        "window": "i32",
    }
    for block_d, widening, variant in ((128, 1, ""), (256, 2, "_256")):
        blocks = {"BLOCK_N": attention.BLOCK_N, "BLOCK_D": block_d, "PRECISION": "ieee"}
        yield Case(
            attention.attend_split,
            {"parts": f32, "bests": f32, "totals": f32, "qkv": bf16, "kv": bf16, **tables, "requests": i32, **shape},
            blocks | {"SPLIT_TOKENS": attention.SPLIT_TOKENS, "BLOCK_G": attention.MIN_GROUP},
            num_warps=attention.SPLIT_WARPS * widening,
            variant=variant,
        )
        yield Case(
            attention.attend_prompt,
            {"out": bf16, "qkv": bf16, "kv": bf16, **tables, "blocks": i32, **shape},
            blocks | {"BLOCK_M": attention.BLOCK_M},
            num_warps=attention.PROMPT_WARPS * widening,
            variant=variant,
        )
    yield Case(
        attention.join_splits,
        {"out": bf16, "parts": f32, "bests": f32, "totals": f32, "context_lens": i32, "query_starts": i32, "requests": i32}
        | {"num_splits": "i32", "head_dim": "i32", "group": "i32", "window": "i32"},
        {"SPLIT_TOKENS": attention.SPLIT_TOKENS, "BLOCK_D": 128},
    )
    yield Case(
        rope_kv_write.rope_kv_write,
        {
            "qkv": bf16,
            "kv": bf16,
            "cos": f32,
            "sin": f32,
            "positions": "*i64",
            "kv_slots": "*i64",
            "q_norm": f32,
            "k_norm": f32,
            "eps": "fp32",
        }
        | {"num_heads": "i32", "num_kv_heads": "i32", "head_dim": "i32", "tokens_per_page": "i32", **KV},
        {"HAS_NORMS": True, "BLOCK_H": 64},
        num_warps=rope_kv_write.NUM_WARPS,
    )
    norm = {"y": bf16, "x": bf16, "added": bf16, "weight": f32, "num_columns": "i32", "eps": "fp32"}
    yield Case(elementwise.rms_norm, norm, {"HAS_ADDED": True, "BLOCK_D": 4096})
    for gated in (elementwise.silu_mul, elementwise.gelu_mul):
        yield Case(gated, {"y": bf16, "gate_up": bf16, "num_columns": "i32"}, {"BLOCK_F": elementwise.BLOCK_F})


def compile_case(case: Case, capability: int) -> dict[str, Any]:
    """One line of the table."""
    names = case.kernel.arg_names
    even = {(names.index(name),): [["tt.divisibility", WIDE]] for name in case.arguments if name not in UNEVEN}
    signature = case.arguments | dict.fromkeys(case.constants, "constexpr")
    source = ASTSource(case.kernel, signature, {(names.index(name),): value for name, value in case.constants.items()}, even)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": case.num_warps})
    ptx = compiled.asm["ptx"]
    registers, spills = _ptxas(ptx, capability)
    return {
        "kernel": case.name,
        "capability": capability,
        "registers": registers,
        "spills": spills,
        "shared": compiled.metadata.shared,
        "widest": max(
            [int(lanes or 1) * int(bits) // 8 for lanes, bits in _LOAD.findall(ptx)] + [int(size, 0) for size in _COPY.findall(ptx)]
        ),
        "scalar": len(_SCALAR.findall(ptx)),
    }


def _load_bytes(ptx: str) -> Iterator[int]:
    """Of every load of global memory, plain or asynchronous."""
    yield from (int(lanes or 1) * int(bits) // 8 for lanes, bits in _LOAD.findall(ptx))
    yield from (int(size, 0) for size in _COPY.findall(ptx))


_LOAD = re.compile(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.[bsuf](\d+)")
_COPY = re.compile(r"cp\.async\.\w+\.shared\.global[^;]*\],\s*(0x[0-9a-f]+|\d+)")
_SCALAR = re.compile(r"ld\.global(?:\.(?!v\d)\w+)*\.[bsuf]16\b")


def _ptxas(ptx: str, capability: int) -> tuple[int, int]:
    """(registers, bytes spilled) by the assembler that Triton brings along."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        architecture = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [program, "-v", f"--gpu-name={architecture}", source, "-o", Path(folder) / "kernel.cubin"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = max(map(int, re.findall(r"Used (\d+) registers", said)))
    return registers, sum(map(int, re.findall(r"(\d+) bytes spill", said)))


def main() -> None:
    assert "TRITON_INTERPRET" not in os.environ, "the interpreter compiles nothing"
    for capability in map(int, sys.argv[1:]):
        for case in cases():
            print(json.dumps(compile_case(case, capability)), flush=True)


if __name__ == "__main__":
    main()
