"""Every operation, shape and implementation: what can run here as programs to time, what was only compiled for as said.

The shapes are those of `cases` and `multi_lora.cases`. What other chips' compilers made of the kernels is read from the
committed tables; it is no time.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax_kernels import measure, nf4
from lorax_kernels.cases import BLOCK_SIZE, CASES, DECODE_ROWS, TRAIN_ROWS
from lorax_kernels.dispatch import Shapes, force
from lorax_kernels.multi_lora import cases as many
from lorax_kernels.multi_lora import primitive, segments

RESULTS = Path(__file__).parents[1] / "results"


class Item(NamedTuple):
    """An operation on a shape.

    shape: in words. gflop: what a plain product does for it, 10^9 operations. programs: name of an implementation ->
    (compiled program, its arguments), for those that run here.
    """

    op: str
    shape: str
    shapes: Shapes
    gflop: float
    programs: Callable[[], dict[str, Any]]


def items(dtype: Any = jnp.float32) -> Iterator[Item]:
    """All of them. dtype: of activations."""
    name = jnp.dtype(dtype).name
    for case in CASES:
        k, n = case.k, case.n
        for op, m in (*_products(), ("nf4_dequantise", 1)):
            shapes = Shapes(m, k, n, name, BLOCK_SIZE)
            rows = "" if op == "nf4_dequantise" else f", {m} rows"
            # A code costs a table's look-up, which is no less than some ten operations.
            gflop = k * n * (2 * m if rows else 10) / 1e9
            build = functools.partial(_nf4, op, shapes, dtype)
            yield Item(op, f"{case.name} {k} x {n}{rows}", shapes, gflop, build)
    for case in many.CASES:
        m, total, shapes = case.groups * case.rows, sum(case.ranks), multi_shapes(case, dtype)
        for op in ("multi_lora", "multi_lora_grad"):
            build = functools.partial(multi_programs, op, case, dtype)
            yield Item(op, case.name, shapes, 2 * m * total * (case.k + case.n) / 1e9, build)


def _products() -> list[tuple[str, int]]:
    return [(op, m) for op in ("nf4_matmul", "nf4_matmul_t") for m in (DECODE_ROWS, TRAIN_ROWS)]


def _nf4(op: str, shapes: Shapes, dtype: Any) -> dict[str, Any]:
    if op != "nf4_dequantise":
        found = measure.programs(op, shapes.m, shapes.k, shapes.n, dtype)
        found.pop("dense")
        return found
    q = nf4.quantize(jax.random.normal(jax.random.key(0), (shapes.n, shapes.k), dtype))
    q = nf4.for_platform(q, jax.default_backend())
    return _forced(op, shapes, nf4.dequantize, (q,))


def multi_shapes(case: many.Case, dtype: Any) -> Shapes:
    """What decides the choice for a case of many adapters."""
    m, name = case.groups * case.rows, jnp.dtype(dtype).name
    return Shapes(m, case.k, case.n, name, rank=max(case.ranks), groups=case.groups, total=sum(case.ranks))


def multi_programs(op: str, case: many.Case, dtype: Any) -> dict[str, Any]:
    """The programs of a case of many adapters, by implementation, with their arguments."""
    shapes = multi_shapes(case, dtype)
    x, a, b, y = many.arrays(case, dtype=jnp.dtype(dtype).name)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    where = segments(many.table(case.ranks), many.ids(case))
    route = (where.a_start, where.b_start, where.rank, where.weight)
    options = primitive.Options(shapes.rank, jnp.dtype(dtype))

    def apply(y: Any, x: Any, a: Any, b: Any, start: Any, other: Any, rank: Any, weight: Any) -> Any:
        return primitive.apply(y, x, a, b, start, other, rank, weight, options)

    def grad(x: Any, dy: Any, b: Any, start: Any, other: Any, rank: Any, weight: Any) -> Any:
        return primitive.grad(x, dy, b, start, other, rank, weight, shapes.total, options)

    run, args = (apply, (y, x, a, b)) if op == "multi_lora" else (grad, (x, y, b))
    return _forced(op, shapes, run, (*args, *route))


def _forced(op: str, shapes: Shapes, run: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Any]:
    """The operation with each implementation that can serve it here."""
    out = {}
    for name in measure.serving(op, shapes):
        with force(name):
            out[name] = (jax.jit(lambda *args: run(*args)).lower(*args).compile(), args)
    return out


def compiled() -> Iterator[dict[str, Any]]:
    """What the committed tables say: op, shape, backend, chip, and `says`, figures in words."""
    for row in _read("gpu.json", "programs"):
        rows = "" if row["op"] == "nf4_dequantise" else f", {row['m']} rows"
        says = f"{row['registers']} registers, {row['stack']} B of stack" + _bytes(row, "bytes_over_least")
        yield _said(row, f"{_named(row['k'], row['n'])}{rows}", "triton", says)
    for row in _read("tpu.json", "traffic"):
        shape = f"{_named(row['k'], row['n'])}, {row['m']} rows"
        yield _said(row, shape, "pallas", _bytes(row, "bytes_over_tiles").lstrip(", "))
    for row in _read("tpu.json", "programs"):
        if row["op"].startswith("nf4"):
            says = f"{row['dequantise_bundles_per_1024']} bundles for 1,024 weights"
            if "cycles_over_bf16" in row:
                says += f", estimated cycles {row['cycles_over_bf16']} of XLA's bf16 product"
            yield _said(row, f"{_named(row['k'], row['n'])}, {row['m']} rows", "pallas", says)
    for name, backend in (("multi_lora_gpu.json", "triton"), ("multi_lora_tpu.json", "pallas")):
        for row in _read(name, "traffic"):
            says = _bytes(row, "bytes_over_least").lstrip(", ") + (", rows sorted" if row.get("sorted") else "")
            yield _said({"chip": "all", **row}, row["case"], backend, says)
        for row in _read(name, "programs"):
            shape = f"{row['groups']} x {row['rows']} rows, {row['k']} -> {row['n']}, rank {row['rank']}"
            if backend == "triton":
                says = f"{row['kernel']}: {row['registers']} registers, {row['tensor_core']}"
                row = {**row, "op": "multi_lora_grad" if row["kernel"] == "grad" else "multi_lora"}
            else:
                says = f"{row['bundles']} bundles, {row['slots'].get('VSTORE:SPILL', 0)} spills"
            yield _said(row, shape, backend, says)


def _read(name: str, what: str) -> list[dict[str, Any]]:
    path = RESULTS / name
    return json.loads(path.read_text())[what] if path.exists() else []


def _said(row: dict[str, Any], shape: str, backend: str, says: str) -> dict[str, Any]:
    return {"op": row["op"], "shape": shape, "backend": backend, "chip": row["chip"], "says": says}


def _bytes(row: dict[str, Any], which: str) -> str:
    return f", {row[which]} x the least bytes" if which in row else ""


@functools.cache
def _named(k: int, n: int) -> str:
    name = next((case.name for case in CASES if (case.k, case.n) == (k, n)), "")
    return f"{name} {k} x {n}".strip()
