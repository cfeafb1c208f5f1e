"""What Triton and ptxas make of the kernels for a chip, read without one: registers, spills, instructions, loads.

    python -m lorax_kernels.static.gpu [OUT.json]      # pip install triton jax; no GPU

A static report of a compiled program, not a measurement: nothing here is a speed.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lorax_kernels.cases import CASES, DECODE_ROWS, RANK, TRAIN_ROWS
from lorax_kernels.nf4_matmul.triton_gpu import constants
from lorax_kernels.nf4_matmul.triton_plan import Plan, least_bytes, plan

CHIPS = (80, 90, 100)
# Registers a thread that a product may take, by chip, and the dequantisation everywhere.
MOST_REGISTERS = {80: 208, 90: 165, 100: 140}
MOST_DEQUANTISE = 64
# Products on a tensor core, the chip's own first; few rows take the one that all have.
TENSOR_CORES = ("UTCHMMA", "HGMMA", "HMMA")
_TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}


class Program(NamedTuple):
    """A kernel with its compile-time arguments: what Triton compiles once."""

    op: str
    m: int
    k: int
    n: int
    rank: int
    dtype: str = "bfloat16"
    block_size: int = 64

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    def tiles(self, capability: int) -> Plan:
        transposed = self.op == "nf4_matmul_t"
        return plan(transposed, self.m, self.k, self.n, self.itemsize, self.rank, capability)


def programs(cases: Any = CASES) -> Iterator[Program]:
    """Every case in training (with the low-rank term, forward and backward), in decoding, and dequantised."""
    for _, k, n in cases:
        yield Program("nf4_matmul", TRAIN_ROWS, k, n, RANK)
        yield Program("nf4_matmul_t", TRAIN_ROWS, k, n, RANK)
        yield Program("nf4_matmul", DECODE_ROWS, k, n, 0)
        yield Program("nf4_dequantise", 1, k, n, 0)


def compile_for(program: Program, capability: int) -> dict[str, Any]:
    """Compile for a chip and read what came out.

    Returns:
        registers, stack, local, shared (bytes), `tensor_core` (its product instruction, None without one), `loads` and
        `stores`: how many instructions of each width in bytes, scales and factors included; `narrowest`: the bytes of
        the narrowest load of x and of the codes.
    """
    import triton  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
    from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

    from lorax_kernels.nf4_matmul import triton_kernels

    activations = _TYPES[program.dtype]
    if program.op == "nf4_dequantise":
        kernel: Any = triton_kernels.dequantise
        types = {"codes": "*u8", "scales": "*fp32", "out": activations}
        fixed: dict[str, Any] = dict(N=program.n, K=program.k, BS=program.block_size, BN=32, BK=128)
        options = dict(num_warps=4)
    else:
        transposed = program.op == "nf4_matmul_t"
        kernel = triton_kernels.product_t if transposed else triton_kernels.product
        tiles = program.tiles(capability)
        fixed = constants(tiles, program.m, program.k, program.n, program.block_size)
        options = {name: fixed.pop(name) for name in ("num_warps", "num_stages")}
        out = "*fp32" if tiles.split > 1 else activations
        given = (activations, "*u8", "*fp32", activations, activations, "*fp32", out, "*fp32")
        types = dict(zip(kernel.arg_names, given, strict=False))
    signature = types | dict.fromkeys(fixed, "constexpr")
    # Arrays begin at multiples of 256 bytes under XLA.
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(types))}
    source = ASTSource(kernel, signature=signature, constexprs=fixed, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return read(built, triton_kernels, _OPERANDS)


def read(built: Any, module: Any, operands: dict[str, str]) -> dict[str, Any]:
    """What `compile_for` returns. operands: name -> the text of the lines of `module` that load it."""
    tools = Path(sys.modules["triton"].__file__ or "").parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(built.asm["cubin"])
        usage = _said(tools / "cuobjdump", "--dump-resource-usage", cubin)
        code = _said(tools / "nvdisasm", "-c", cubin)
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    loads = [_width(line) for line in re.findall(r"\b(?:LDG|LDGSTS)\.[\w.]+", code)]
    stores = [_width(line) for line in re.findall(r"\bSTG\.[\w.]+", code)]
    return {
        "registers": resources["REG"],
        "stack": resources["STACK"],
        "local": resources["LOCAL"],
        "shared": max(resources["SHARED"], int(built.metadata.shared)),
        "tensor_core": next((name for name in TENSOR_CORES if name in code), None),
        "loads": {str(width): loads.count(width) for width in sorted(set(loads))},
        "stores": {str(width): stores.count(width) for width in sorted(set(stores))},
        "narrowest": _narrowest(built.asm["ptx"], Path(module.__file__).read_text(), operands),
    }


# The lines of the kernels that load x and codes.
_OPERANDS = {"x": "left = load_tile(", "codes": "packed = tl.load("}


def _narrowest(ptx: str, source: str, operands: dict[str, str]) -> dict[str, int]:
    """The fewest bytes that one load of an operand takes, by the source lines that the program's loads name."""
    numbered = list(enumerate(source.splitlines(), 1))
    lines = {what: {i for i, line in numbered if text in line} for what, text in operands.items()}
    found: dict[str, list[int]] = {}
    here: set[int] = set()
    for line in ptx.splitlines():
        if ".loc\t" in line:
            # The line itself, and the one that called its function.
            here = {int(number) for number in re.findall(r"(?:\.loc\t|inlined_at )\d+ (\d+)", line)}
        width = _loaded(line)
        for what in operands if width else ():
            if here & lines[what]:
                found.setdefault(what, []).append(width)
    return {what: min(widths) for what, widths in found.items()}


def _loaded(line: str) -> int:
    """Bytes that an instruction of a PTX program loads for a thread; 0 if it loads nothing from device memory."""
    copied = re.search(r"cp\.async\.c[ag]\.shared\.global .*], (0x[0-9a-f]+)", line)
    if copied:
        return int(copied[1], 16)
    loaded = re.search(r"ld\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+) ", line)
    return int(loaded[1] or 1) * int(loaded[2]) // 8 if loaded else 0


def _said(*command: Any) -> str:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True).stdout


def _width(instruction: str) -> int:
    """Bytes that a load or store moves for a thread."""
    parts = instruction.split(".")
    if "128" in parts:
        return 16
    return 8 if "64" in parts else 2 if "U16" in parts or "S16" in parts else 1 if "U8" in parts or "S8" in parts else 4


def figures(program: Program, capability: int) -> dict[str, Any]:
    """The report of one program, with the bytes it must move beside the least."""
    out = {**program._asdict(), "chip": f"sm_{capability}", **compile_for(program, capability)}
    if program.op != "nf4_dequantise":
        tiles = program.tiles(capability)
        moved = sum(tiles.moved(program.rank).values())
        least = least_bytes(program.m, program.k, program.n, program.itemsize, program.rank)
        out["bytes_over_least"] = round(moved / least, 3)
    return out


def main(path: str = "kernels/results/gpu.json") -> None:
    from importlib import metadata

    rows = [figures(program, chip) for program in programs() for chip in CHIPS]
    versions = {name: metadata.version(name) for name in ("triton", "jax")}
    note = "compiled for these chips and read from the program; nobody ran it there"
    about = {"command": "python -m lorax_kernels.static.gpu", "note": note, "versions": versions}
    Path(path).write_text(json.dumps({**about, "programs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
