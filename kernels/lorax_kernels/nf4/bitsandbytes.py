"""The arrays of bitsandbytes: what `bitsandbytes.functional.quantize_4bit` returns and what its checkpoints hold.

codes (bytes, 1)   uint8, the earlier value in the high half      the tensor `NAME.weight` of a checkpoint
absmax             float32, or uint8 with double quantisation     `NAME.weight.absmax`
absmax2, map2      second-level scales and their codebook         `.nested_absmax`, `.nested_quant_map`
quant_map          the 16 values                                  `.quant_map`
offset, blocksize, nested_blocksize, quant_type, dtype, shape     JSON in `.quant_state.bitsandbytes__nf4`
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax_kernels.nf4.array import GROUP, QuantizedArray, is_regular
from lorax_kernels.nf4.codebooks import FOUR_BIT, dynamic_map
from lorax_kernels.nf4.formats import BLOCK_SIZES, DTYPES
from lorax_kernels.nf4.layouts import canonical

STATE = "quant_state.bitsandbytes__"

# Names of a checkpoint's tensors -> ours.
_NAMES = {"nested_absmax": "absmax2", "nested_quant_map": "map2", "nested_offset": "offset", "weight": "codes"}


def to_bitsandbytes(q: QuantizedArray) -> dict[str, Any]:
    """A 4-bit array as bitsandbytes holds it.

    Args:
        q: nf4 or fp4, without stacked axes (bitsandbytes has none: take one slice at a time).

    Returns:
        `codes` uint8 (bytes, 1), `absmax`, `quant_map`, `blocksize`, `quant_type`, `dtype`, `shape`; with double
        quantisation also `absmax2`, `map2`, `offset` and `nested_blocksize`.

    Raises:
        ValueError: another format, or stacked axes.

    Example:
        >>> import jax.numpy as jnp
        >>> from lorax_kernels import nf4
        >>> nf4.to_bitsandbytes(nf4.quantize(jnp.ones((3, 64))))["codes"].shape
        (96, 1)
    """
    if q.format not in FOUR_BIT:
        raise ValueError(f"bitsandbytes has no 4-bit arrays of format {q.format!r}; quantise with nf4 or fp4")
    if q.stack:
        raise ValueError(f"bitsandbytes has no stacked arrays, this one has {q.stack}; take one slice at a time")
    q = canonical(q)
    assert q.scales is not None
    out = {
        "codes": q.codes.reshape(-1, 1),
        "absmax": q.scales.reshape(-1),
        "quant_map": jnp.asarray(FOUR_BIT[q.format]),
        "blocksize": q.block_size,
        "quant_type": q.format,
        "dtype": q.dtype_name,
        "shape": q.slice_shape,
    }
    if q.scales2 is not None:
        map2 = jnp.asarray(dynamic_map()) if q.map8 is None else q.map8
        out |= {"absmax2": q.scales2, "map2": map2, "offset": q.offset, "nested_blocksize": GROUP}
    return out


def to_checkpoint(q: QuantizedArray) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint that hold a 4-bit array, without the weight's own prefix.

    Args:
        q: nf4 or fp4, without stacked axes.

    Returns:
        `""` (the codes), `"absmax"`, `"quant_map"`, `"quant_state.bitsandbytes__nf4"`, and with double quantisation
        `"nested_absmax"` and `"nested_quant_map"`: arrays on the host.

    Raises:
        ValueError: as `to_bitsandbytes`.
    """
    arrays = to_bitsandbytes(q)
    out = {"": arrays["codes"], "absmax": arrays["absmax"], "quant_map": arrays["quant_map"]}
    state = {name: arrays[name] for name in ("quant_type", "blocksize", "dtype")} | {"shape": list(arrays["shape"])}
    if "absmax2" in arrays:
        out |= {"nested_absmax": arrays["absmax2"], "nested_quant_map": arrays["map2"]}
        state |= {"nested_blocksize": GROUP, "nested_dtype": "float32", "nested_offset": float(arrays["offset"])}
    out[STATE + q.format] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {name: np.asarray(value) for name, value in out.items()}


def from_bitsandbytes(arrays: Mapping[str, Any]) -> QuantizedArray:
    """The inverse of `to_bitsandbytes`; takes a checkpoint's names as well, without the weight's own prefix.

    Raises:
        ValueError: an entry is missing, has another size than the shape says, or a codebook that is not ours.
    """
    given = dict(arrays)
    for name in [name for name in given if name.startswith(STATE)]:
        given |= json.loads(bytes(np.asarray(given.pop(name)).astype(np.uint8)))
    given = {_NAMES.get(name, name): value for name, value in given.items()}
    for name in ("codes", "absmax", "blocksize", "quant_type", "shape"):
        if name not in given:
            raise ValueError(f"not a 4-bit array of bitsandbytes: {name!r} is missing among {', '.join(sorted(given))}")
    format, block_size, shape = given["quant_type"], int(given["blocksize"]), tuple(int(n) for n in given["shape"])
    dtype = str(given.get("dtype", "float32"))
    if format not in FOUR_BIT or dtype not in DTYPES:
        raise ValueError(f"4-bit arrays of type {format!r} and dtype {dtype!r} are not served; nf4 and fp4 are")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"blocks of {block_size} are not served; {', '.join(map(str, BLOCK_SIZES))} are")
    _check_map(given.get("quant_map"), FOUR_BIT[format], format)
    n = math.prod(shape)
    blocks = -(-n // block_size)
    codes = _sized("codes", given["codes"], (n + 1) // 2, jnp.uint8)
    nested = "absmax2" in given
    absmax = _sized("absmax", given["absmax"], blocks, jnp.uint8 if nested else jnp.float32)
    scales2 = offset = map8 = None
    if nested:
        if int(given.get("nested_blocksize", GROUP)) != GROUP or "offset" not in given:
            raise ValueError(f"double quantisation in groups of {GROUP} with an offset is served, nothing else")
        scales2 = _sized("absmax2", given["absmax2"], -(-blocks // GROUP), jnp.float32)
        offset = jnp.asarray(given["offset"], jnp.float32).reshape(())
        own = np.asarray(given.get("map2", dynamic_map()), np.float32)
        map8 = None if np.array_equal(own, dynamic_map()) else jnp.asarray(own)
    regular = is_regular(shape, format, block_size)
    rows = (*shape[:-1], -1) if regular else (-1,)
    meta = (len(shape), None if regular else shape, format, block_size, dtype)
    return QuantizedArray(codes.reshape(rows), absmax.reshape(rows), scales2, offset, map8, *meta)


def _sized(name: str, value: Any, size: int, dtype: Any) -> Any:
    array = jnp.asarray(value).reshape(-1)
    if array.size != size or array.dtype != dtype:
        raise ValueError(
            f"{name}: {array.size} values of {array.dtype}, and the shape asks for {size} of {jnp.dtype(dtype)}"
        )
    return array


def _check_map(given: Any, ours: np.ndarray, format: str) -> None:
    if given is not None and not np.array_equal(np.asarray(given, np.float32), ours):
        raise ValueError(f"the file's codebook is not that of {format}; quantise the weight again from its 16-bit form")
