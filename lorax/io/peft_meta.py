"""`lorax.json`, beside PEFT's two files: what they have no words for.

    weights: path -> {kind, shape, axes, scale}       so that any tree comes back exactly
    base:    path -> {shape, dtype, sample}           so that an adapter for another base is refused
             (and "quantised", the format, for one that is kept in few bits)
    labels:  what a classifier's outputs stand for
    loftq:   turns, where LoftQ fitted the factors to the quantised base: then no other format of it will do

The sample is a few values of the base weight at fixed places, compared within the rounding of its storage type. Over a
base in another format than before, which is another base in each value, the samples must still be alike as a whole.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lorax.errors import LoraxError
from lorax.io.peft_config import read_object
from lorax.quantized import Quantized
from lorax.weights import Axes, is_structured
from lorax_kernels.nf4.lookup import elements

FILE = "lorax.json"
FORMAT = 1
SAMPLES = 64
KINDS = ("low-rank", "full", "pieces")


class Entry(NamedTuple):
    """One changed weight.

    kind: "low-rank", "full" or "pieces".
    shape: of the weight.
    axes: the role of each axis; for whole weights only the stack axes count.
    scale: for "low-rank", float32, () or the stack's shape; else None.
    rows: for "pieces", the rows of axis 0 that were trained, as [start, stop) pairs.
    dora: for "low-rank", whether the columns have lengths of their own.
    """

    kind: str
    shape: tuple[int, ...]
    axes: Axes
    scale: np.ndarray | None = None
    rows: tuple[tuple[int, int], ...] = ()
    dora: bool = False

    def as_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"kind": self.kind, "shape": list(self.shape), **vars_of(self.axes)}
        if self.scale is not None:
            out["scale"] = np.asarray(self.scale, np.float64).tolist()
        if self.dora:
            out["dora"] = True
        if self.kind == "pieces":
            out["rows"] = [list(pair) for pair in self.rows]
        return out


class Notes(NamedTuple):
    """What the file says.

    weights: the changed ones; base: fingerprints by path, unchecked; loftq: turns, or 0; labels, regression: of a
    classifier.
    """

    weights: dict[str, Entry]
    base: dict[str, Any]
    loftq: int
    labels: tuple[str, ...] = ()
    regression: bool = False

    @property
    def quantised(self) -> str | None:
        """The format of the base, `nf4/64/double`, where it is one for all quantised weights."""
        found = {value.get("quantised") for value in self.base.values() if isinstance(value, dict)} - {None}
        return found.pop() if len(found) == 1 else None


def vars_of(axes: Axes) -> dict[str, list[int]]:
    """The roles of the axes as JSON."""
    return {"stack": list(axes.stack), "inputs": list(axes.inputs), "outputs": list(axes.outputs)}


def fingerprint(base: Any) -> dict[str, Any] | None:
    """Shape, dtype and a sample of a base weight; None for one that is not there or is itself adapted."""
    if base is None or is_adapted(base) or not hasattr(base, "shape"):
        return None
    out: dict[str, Any] = {"shape": list(base.shape), "dtype": jnp.dtype(base.dtype).name}
    if isinstance(base, Quantized):
        out["quantised"] = _format(base)
    sample = values(base)
    return out if sample is None else {**out, "sample": sample}


def values(base: Any) -> list[float] | None:
    """A few values of an array at places that depend on its shape alone; None where there are none to see."""
    size = math.prod(base.shape)
    first = jax.tree.leaves(base)[0]
    if isinstance(first, jax.ShapeDtypeStruct) or not size or not jnp.issubdtype(base.dtype, jnp.floating):
        return None
    # An odd step through the array, so that the places differ in every axis.
    places = np.unique(np.linspace(0, size - 1, min(SAMPLES, size)).astype(np.int64))
    at = np.unravel_index(places, base.shape)
    if isinstance(base, Quantized):
        return _quantised_values(base, at)
    # On the host the array is a view and needs no compiler; elsewhere only what is picked crosses.
    on_host = isinstance(base, np.ndarray) or (
        base.is_fully_addressable and all(device.platform == "cpu" for device in base.devices())
    )
    picked = np.asarray(base)[at] if on_host else np.asarray(base[at])
    return picked.astype(np.float64).tolist()


def _quantised_values(base: Quantized, at: tuple[np.ndarray, ...]) -> list[float]:
    """Values at places of the weight, without dequantising the others."""
    front = len(base.array.stack)
    stored = tuple(at[front + axis] for axis in base.order)
    flat: Any = np.ravel_multi_index(stored, base.array.slice_shape)
    slices = np.stack(at[:front], axis=1) if front else np.zeros((flat.size, 0), np.int64)
    out = np.zeros(flat.size)
    for index in sorted(set(map(tuple, slices.tolist()))):
        here = (slices == np.asarray(index, np.int64)).all(axis=1)
        part = jax.tree.map(lambda x, index=index: x[index], base.array)
        out[here] = np.asarray(elements(part, jnp.asarray(flat[here], jnp.int32)), np.float64)
    return out.tolist()


def _format(base: Any) -> str | None:
    """How a weight is quantised, in words; None for a plain one."""
    if not isinstance(base, Quantized):
        return None
    array = base.array
    return f"{array.format}/{array.block_size}{'/double' if array.scales2 is not None else ''}"


def is_adapted(base: Any) -> bool:
    """Whether a leaf is a change: a quantised weight is a base like a plain one."""
    return is_structured(base) and not isinstance(base, Quantized)


def compare(path: Path, name: str, recorded: Any, base: Any, fitted: bool = False) -> None:
    """Refuse a base weight that is not the one that an adapter was trained over.

    fitted: the factors make up for the base's own rounding, so a format other than the recorded one is another base.

    Raises:
        LoraxError: names the weight and what differs.
    """
    if not isinstance(recorded, dict) or is_adapted(base):
        return
    elsewhere = f"{path.parent}: the adapter is for another base: {name}"
    if recorded.get("shape") != list(base.shape):
        raise LoraxError(f"{elsewhere} had shape {recorded.get('shape')} and has {list(base.shape)} here")
    if fitted and recorded.get("quantised") != _format(base):
        raise LoraxError(
            f"{elsewhere} was quantised as {recorded.get('quantised')}, which LoftQ fitted the factors to, and is "
            f"{_format(base) or jnp.dtype(base.dtype).name} here; quantise the base alike "
            "(lorax.models.load(name, quantize=QuantSpec(...)))"
        )
    then, now = recorded.get("sample"), values(base)
    if then is None or now is None:
        return
    if not _floats(then) or len(then) != len(now):
        raise LoraxError(f"{path}: the sample of {name} is malformed; the adapter is damaged")
    if recorded.get("quantised") != _format(base):
        if not _alike(np.asarray(then), np.asarray(now)):
            raise LoraxError(f"{elsewhere} has other values; pass check_base=False to use it anyway")
        return
    tolerance = max(_step(recorded.get("dtype")), _step(jnp.dtype(base.dtype).name))
    far = np.abs(np.subtract(then, now)) > tolerance * np.maximum(np.abs(then), np.abs(now)) + 1e-30
    if far.any():
        at = int(np.argmax(far))
        raise LoraxError(
            f"{elsewhere} has other values (a sampled one was {then[at]:.6g}, and is {now[at]:.6g} here); "
            "pass check_base=False to use it anyway"
        )


def _alike(then: np.ndarray, now: np.ndarray) -> bool:
    """Whether two samples are one weight in two formats: 4 bits keep the direction to within a cosine of 0.98."""
    norms = float(np.linalg.norm(then) * np.linalg.norm(now))
    return norms == 0 or float(then @ now) / norms > 0.9


def _step(dtype: Any) -> float:
    """The relative rounding of a storage type; nothing for names that are none."""
    try:
        return float(jnp.finfo(dtype).eps)
    except (TypeError, ValueError):
        return 0.0


def _floats(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, (int, float)) and abs(x) < 1e300 for x in value)


def read(path: Path) -> Notes:
    """The changed weights, and the recorded base.

    Raises:
        LoraxError: the file is not what `save_adapter` writes.
    """
    raw = read_object(path)
    if raw.get("format") != FORMAT:
        raise LoraxError(
            f"{path}: format {str(raw.get('format'))[:20]} is not {FORMAT}; a newer lorax wrote it, update"
        )
    weights, base = raw.get("weights"), raw.get("base")
    if not isinstance(weights, dict) or not isinstance(base, dict) or not weights:
        raise LoraxError(f"{path}: lacks its weights or its base; the adapter is damaged")
    loftq = raw.get("loftq", 0)
    if isinstance(loftq, bool) or not isinstance(loftq, int) or loftq < 0:
        raise LoraxError(f"{path}: loftq={str(loftq)[:20]} is no number of turns; the adapter is damaged")
    labels = raw.get("labels", [])
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise LoraxError(f"{path}: labels is no list of names; the adapter is damaged")
    entries = {name: _entry(path, name, value) for name, value in weights.items()}
    return Notes(entries, base, loftq, tuple(labels), raw.get("regression") is True)


def _entry(path: Path, name: str, value: Any) -> Entry:
    def wrong(what: str) -> LoraxError:
        return LoraxError(f"{path}: {name[:80]}: {what}; the adapter is damaged, save or fetch it again")

    if not isinstance(value, dict) or value.get("kind") not in KINDS:
        raise wrong("not a description of a changed weight")
    shape, stack, inputs, outputs = (_sizes(value.get(key)) for key in ("shape", "stack", "inputs", "outputs"))
    if shape is None or stack is None or inputs is None or outputs is None:
        raise wrong("shape and axes must be short lists of whole numbers")
    if not set(stack + inputs + outputs) <= set(range(len(shape))):
        raise wrong(f"its axes are not those of shape {list(shape)}")
    axes = Axes(stack, inputs, outputs)
    if value["kind"] == "low-rank":
        if sorted(axes.order) != list(range(len(shape))) or not inputs or not outputs:
            raise wrong("each axis must be a stack, an input or an output axis")
        scale = _scale(value.get("scale"), tuple(shape[a] for a in stack))
        if scale is None:
            raise wrong("its scale is not one number, nor one for each layer")
        if not isinstance(value.get("dora", False), bool):
            raise wrong("dora is true or false")
        return Entry("low-rank", shape, axes, scale, dora=value.get("dora", False))
    rows = value.get("rows", [])
    if value["kind"] == "pieces":
        pairs = [_sizes(pair) for pair in rows] if isinstance(rows, list) else []
        ends = [0, *(x for pair in pairs if pair for x in pair), shape[0] if shape else 0]
        if not pairs or not all(p is not None and len(p) == 2 and p[0] < p[1] for p in pairs) or ends != sorted(ends):
            raise wrong("its rows are not [start, stop) pairs in order")
        return Entry("pieces", shape, axes, rows=tuple((p[0], p[1]) for p in pairs if p))
    return Entry("full", shape, axes)


def _sizes(value: Any) -> tuple[int, ...] | None:
    good = isinstance(value, list) and len(value) <= 32
    good = good and all(isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**40 for x in value)
    return tuple(value) if good else None


def _scale(value: Any, stack: tuple[int, ...]) -> np.ndarray | None:
    flat, nested = [], [value]
    while nested:
        x = nested.pop()
        nested.extend(x) if isinstance(x, list) else flat.append(x)
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e30 for x in flat):
        return None
    try:
        out = np.asarray(value, np.float32)
    except ValueError:
        return None  # ragged
    return out if out.shape in ((), stack) else None
