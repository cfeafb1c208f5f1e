"""`save_adapter` and `load_adapter`: adapters on disk in PEFT's format.

    adapter_config.json          what PEFT needs to know
    adapter_model.safetensors    the factors, a pair for each layer; whole weights that trained
    lorax.json                   roles of the axes, exact scales, and a fingerprint of the base

A zoo model's adapter is one that PEFT loads, and PEFT's adapters for such models load here. Adapters of other trees
use the same files with names made from their paths. The way out is `peft_write.py`, the way in `peft_read.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from lorax.errors import LoraxError
from lorax.io import peft_meta, safetensors
from lorax.io.atomic import replace_dir, write_json
from lorax.io.peft_meta import Entry
from lorax.io.peft_names import slot_of
from lorax.io.peft_read import CONFIG, WEIGHTS, read_adapter
from lorax.io.peft_write import Writer
from lorax.quantized import Quantized
from lorax.tree import attach, named_leaves
from lorax.variants.dora import Dora
from lorax.weights import Axes, Change, Concat, Full, LowRank, is_structured

# What a folder may hold and still be replaced as an adapter's.
_OURS = {CONFIG, WEIGHTS, peft_meta.FILE, "README.md"}


def save_adapter(
    path: str | Path,
    params: Any,
    *,
    base_name: str | None = None,
    loftq: int = 0,
    labels: Sequence[str] = (),
    regression: bool = False,
) -> None:
    """Write what an adapted tree changes, whole or not at all, in PEFT's format.

    Low-rank changes become `lora_A (rank, in)` and `lora_B (out, rank)` of each layer, with a `lora_magnitude_vector
    (out)` for DoRA; VeRA is stored as the plain low-rank change that it equals. Weights that train as they are
    (`train_also`) become `modules_to_save`. scale = lora_alpha / r holds in the written configuration.

    Args:
        path: a folder; one that holds an adapter is replaced.
        params: an adapted tree, or what `extract` took off one (then the base's fingerprint is left out).
        base_name: the base model's name or folder, for PEFT and for `lorax generate`.
        loftq: how many turns of LoftQ the factors started with. They belong to the quantised base that is in the tree
            then, which is written down, and `load_adapter` takes no other.
        labels, regression: of a classifier (`lorax.models.with_labels`): what its outputs stand for, which PEFT's files
            have no place for.

    Raises:
        LoraxError: nothing in the tree is adapted; `loftq` without a quantised base; the folder holds other files; a
            kind of change that the format has no place for; a full disk (what was there stays).

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, lorax
        >>> from lorax.io.peft import load_adapter, save_adapter
        >>> base = {"dense": {"kernel": jnp.ones((4, 6))}}
        >>> adapted = lorax.adapt(jax.random.key(0), base, lorax.LoraSpec(targets="*", rank=2))
        >>> folder = tempfile.mkdtemp()
        >>> save_adapter(folder, adapted)
        >>> load_adapter(folder, base)["dense"]["kernel"]
        LowRank(shape=(4, 6), rank=2, base=float32)

    Source: https://huggingface.co/docs/peft/developer_guides/checkpoint
    """
    path, named = Path(path), named_leaves(params)
    named = [(name, _storable(leaf)) for name, leaf in named]
    changed = {name: leaf for name, leaf in named if peft_meta.is_adapted(leaf)}
    if not changed:
        raise LoraxError(f"{path}: nothing in this tree is adapted, so there is no adapter to save; adapt it first")
    if path.exists() and (not path.is_dir() or {entry.name for entry in path.iterdir()} - _OURS):
        raise LoraxError(f"{path}: is there and holds other things than an adapter; name a folder of its own")
    weights = {name: _described(name, leaf) for name, leaf in changed.items()}
    writer = Writer(weights, {name: leaf for name, leaf in named if name not in changed}, _is_tied(params))
    for name, leaf in changed.items():
        writer.add(name, leaf)
    if loftq and not any(isinstance(_base_of(leaf), Quantized) for leaf in changed.values()):
        raise LoraxError(f"{path}: loftq={loftq} says that the factors fit a quantised base, and none is in this tree")
    config = writer.config(base_name, loftq)
    base = {name: peft_meta.fingerprint(_base_of(leaf)) for name, leaf in named}
    notes = {
        "format": peft_meta.FORMAT,
        "weights": {name: entry.as_json() for name, entry in weights.items()},
        "base": {name: value for name, value in base.items() if value is not None},
        **({"loftq": loftq} if loftq else {}),
        **({"labels": list(labels), "regression": regression} if labels else {}),
    }
    with replace_dir(path) as new:
        # In the order of the safetensors library, so that an adapter of PEFT's comes out as the bytes it was.
        tensors = sorted(writer.tensors, key=lambda entry: (-np.dtype(entry.dtype).itemsize, entry.name))
        safetensors.write(new / WEIGHTS, tensors, {"format": "pt"})
        write_json(new / CONFIG, config)
        write_json(new / peft_meta.FILE, notes)


def load_adapter(path: str | Path, base: Any, *, check_base: bool = True) -> Any:
    """Read an adapter and put it over its base.

    An adapter that `save_adapter` wrote fits any tree with the paths that it came from. One that PEFT wrote (LoRA,
    rsLoRA or DoRA, with rank and alpha patterns, whole modules, biases) fits the zoo's models. Layers of different rank
    are filled up with zeros to the largest, and layers without a change get zero factors; both are the same function,
    and training leaves the zeros alone.

    Args:
        path: the folder.
        base: the plain tree.
        check_base: compare the base's values with those that the adapter was trained over.

    Returns:
        The adapted tree; the arrays of `base` are shared, not copied.

    Raises:
        LoraxError: a file is missing, cut off or malformed; the adapter is for another base (names the first weight
            that differs), among them the plain weights under factors that LoftQ fitted to quantised ones; it uses
            something that lorax has no equal for (a changed base, say): nothing is dropped.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, lorax
        >>> from lorax.io.peft import load_adapter, save_adapter
        >>> base = {"w": jnp.ones((3, 5))}
        >>> folder = tempfile.mkdtemp()
        >>> save_adapter(folder, lorax.adapt(jax.random.key(0), base, lorax.LoraSpec(targets="w", rank=1)))
        >>> load_adapter(folder, {"w": jnp.ones((3, 4))})
        Traceback (most recent call last):
            ...
        lorax.errors.LoraxError: ...: the adapter is for another base: w had shape [3, 5] and has [3, 4] here
    """
    return attach(base, read_adapter(Path(path), base, check_base))


def _described(name: str, leaf: Any) -> Entry:
    shape = tuple(leaf.shape) if not (isinstance(leaf, Concat) and None in leaf.parts) else ()
    if isinstance(leaf, (LowRank, Dora)):
        _concrete(name, leaf.A, leaf.B, leaf.scale)
        dora = isinstance(leaf, Dora)
        return Entry("low-rank", shape, leaf.axes, np.asarray(leaf.scale, np.float32), dora=dora)
    if isinstance(leaf, Full):
        _concrete(name, leaf.value)
        return Entry("full", shape, _stack_axes(name, len(shape)))
    if isinstance(leaf, Concat) and shape and not any(isinstance(p, (LowRank, Concat)) for p in leaf.parts):
        ends = np.cumsum([0, *leaf.sizes]).tolist()
        rows = [(ends[i], ends[i + 1]) for i, part in enumerate(leaf.parts) if isinstance(part, Full)]
        return Entry("pieces", shape, _stack_axes(name, len(shape)), rows=tuple(rows))
    raise LoraxError(
        f"{name}: {type(leaf).__name__} of this kind has no place in an adapter's files; save the whole tree"
    )


def _storable(leaf: Any) -> Any:
    """A kind of change that the format has no words for, as the plain low-rank change that it equals."""
    plain = leaf.low_rank() if isinstance(leaf, Change) and not isinstance(leaf, LowRank) else None
    return leaf if plain is None else plain


def _stack_axes(name: str, ndim: int) -> Axes:
    """A whole weight is cut into layers where the zoo has layers, and nowhere else."""
    stack = (0,) if slot_of(name, (0,)) else ()
    return Axes(stack, (), tuple(range(len(stack), ndim)))


def _concrete(name: str, *arrays: Any) -> None:
    if any(isinstance(x, (jax.ShapeDtypeStruct, Tracer)) for x in arrays):
        raise LoraxError(f"{name}: is abstract, and only values can be saved; save outside jit, from the real tree")


def _base_of(leaf: Any) -> Any:
    """The frozen array behind a leaf. A weight that trained whole no longer has one."""
    return leaf.base if isinstance(leaf, Change) else None if peft_meta.is_adapted(leaf) else leaf


def _is_tied(params: Any) -> bool:
    """Whether the tree is a language model whose head is its embedding."""
    keyed, _ = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: x is None or is_structured(x))
    tops = {jax.tree_util.keystr(keys[:1], simple=True) for keys, _ in keyed}
    return "embed" in tops and not {"lm_head", "score"} & tops
