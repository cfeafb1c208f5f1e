"""An adapter's files as structured leaves without a base: `read_adapter`.

Two ways in, one way through: `lorax.json` says which weights changed; without it, that is read off the names of the
tensors. Then every weight's tensors are taken out of the file, and one that is left over is an error.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax.errors import LoraxError
from lorax.io import peft_meta, safetensors, torch_zip
from lorax.io.peft_config import Settings
from lorax.io.peft_config import read as read_config
from lorax.io.peft_meta import Entry
from lorax.io.peft_names import BY_PATH, HEAD, PREFIX, TABLE, Slot, factor_names, find, magnitude_name, modules, slot_of
from lorax.io.stored import StoredTensor
from lorax.quantized import Quantized
from lorax.tree import named_leaves
from lorax.variants.dora import Dora, column_norms
from lorax.weights import Axes, Concat, Full, LowRank, dense, is_structured

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROWS = f"{PREFIX}{TABLE}.token_adapter.trainable_tokens_delta"
INDEX, PICKLED = "adapter_model.safetensors.index.json", "adapter_model.bin"


def read_adapter(folder: Path, base: Any, check_base: bool) -> dict[str, Any]:
    """path -> leaf without base, for `attach`.

    Raises:
        LoraxError: see `load_adapter`.
    """
    if not folder.is_dir() or not (folder / CONFIG).is_file():
        raise LoraxError(f"{folder}: holds no {CONFIG}, so it is no adapter; name the folder that save_adapter wrote")
    plain = dict(named_leaves(base))
    adapted = next((name for name, leaf in plain.items() if peft_meta.is_adapted(leaf)), None)
    if adapted is not None:
        raise LoraxError(f"{adapted}: this tree is adapted already; load the adapter over the plain base")
    notes = folder / peft_meta.FILE
    described = peft_meta.read(notes) if notes.is_file() else None
    settings = read_config(folder / CONFIG, loftq=described is not None and described.loftq > 0)
    file, tensors = _open(folder)
    if described is not None:
        entries = described.weights
        _check_base(notes, described, plain, check_base)
    else:
        entries = _entries(folder, settings, tensors, plain)
    reader = _Reader(file, settings, tensors, plain, exact=notes.is_file())
    leaves = {name: reader.leaf(name, entry) for name, entry in entries.items()}
    reader.finish()
    return leaves


def _open(folder: Path) -> tuple[Path, dict[str, StoredTensor]]:
    """The file with the tensors, and the tensors: one file, several with an index, or what PEFT wrote before 0.7."""
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS, safetensors.read(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        return folder / INDEX, safetensors.read_sharded(folder / INDEX)
    if (folder / PICKLED).is_file():
        return folder / PICKLED, torch_zip.read(folder / PICKLED)
    return folder / WEIGHTS, safetensors.read(folder / WEIGHTS)  # which says what is missing


def _check_base(notes: Path, described: peft_meta.Notes, plain: dict[str, Any], by_value: bool) -> None:
    for name, entry in described.weights.items():
        if name not in plain:
            raise LoraxError(f"{notes.parent}: the adapter is for another base: it changes {name}, which is not here")
        if tuple(plain[name].shape) != entry.shape:
            have, want = list(plain[name].shape), list(entry.shape)
            raise LoraxError(
                f"{notes.parent}: the adapter is for another base: {name} had shape {want} and has {have} here"
            )
    if by_value:
        for name, value in described.base.items():
            if name not in plain:
                raise LoraxError(f"{notes.parent}: the adapter is for another base: it had {name}, which is not here")
            peft_meta.compare(notes, name, value, plain[name], fitted=described.loftq > 0)


def _entries(
    folder: Path, settings: Settings, tensors: dict[str, StoredTensor], plain: dict[str, Any]
) -> dict[str, Entry]:
    """The changed weights by the tensors' names alone, for an adapter that PEFT wrote."""
    out: dict[str, Entry] = {}
    for name in tensors:
        if name == ROWS:
            out["embed/embedding"] = _rows_entry(settings, tensors[name], plain)
            continue
        module, param, low_rank = _parse(folder, name)
        if _is_tied_copy(name, tensors, plain):
            continue
        found = find(module, param)
        if found is None or found[0].path not in plain:
            tied = module == HEAD and "embed/embedding" in plain
            why = "the head of this base is its embedding" if tied else "this base has no such weight"
            raise LoraxError(f"{folder / WEIGHTS}: {name[:100]!r} has no place in this base: {why}")
        slot, layer = found
        shape = tuple(plain[slot.path].shape)
        stack = (0,) if slot.layered else ()
        if len(shape) < len(stack) + (2 if low_rank else 1) or (slot.layered and layer >= shape[0]):
            raise LoraxError(
                f"{folder / WEIGHTS}: the adapter is for another base: it has {name[:100]!r}, "
                f"and {slot.path} has shape {list(shape)} here"
            )
        if low_rank:
            ndim = len(shape)
            if settings.dora and slot.embedding:
                raise LoraxError(f"{settings.path}: has DoRA on the embedding; merge the adapter with PEFT first")
            out[slot.path] = Entry("low-rank", shape, Axes(stack, (ndim - 2,), (ndim - 1,)), dora=settings.dora)
        elif _is_whole(settings, module, param):
            out.setdefault(slot.path, Entry("full", shape, Axes(stack, (), tuple(range(len(stack), len(shape))))))
    if settings.tokens and ROWS not in tensors:
        raise LoraxError(f"{folder}: lacks {ROWS!r}, the rows of trainable_token_indices; save it again")
    _check_meaning(settings, out, plain)
    return out


def _rows_entry(settings: Settings, rows: StoredTensor, plain: dict[str, Any]) -> Entry:
    """The embedding, of which some rows are replaced: a whole weight from here on."""
    table = plain.get("embed/embedding")
    if table is None:
        raise LoraxError(f"{settings.path}: replaces rows of embed_tokens, and this base has none")
    shape, tokens = tuple(table.shape), settings.tokens
    if rows.shape != (len(tokens), shape[1]) or (tokens and max(tokens) >= shape[0]):
        raise LoraxError(
            f"{settings.path}: the adapter is for another base: it replaces {len(tokens)} rows of an embedding by "
            f"{list(rows.shape)} numbers, and embed/embedding has shape {list(shape)} here"
        )
    return Entry("full", shape, Axes((), (), (0, 1)))


def _parse(folder: Path, name: str) -> tuple[str, str, bool]:
    """(module, parameter, whether it is a factor) of a tensor's name."""
    if name.startswith(PREFIX):
        body = name[len(PREFIX) :]
        for ending in (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B"):
            if body.endswith(ending):
                return body[: -len(ending)], "weight", True
        # Releases of PEFT differ in the last word.
        if body.removesuffix(".weight").endswith(".lora_magnitude_vector"):
            return body.removesuffix(".weight").removesuffix(".lora_magnitude_vector"), "weight", True
        module, _, param = body.rpartition(".")
        if "lora_" not in body and param in ("weight", "bias"):
            return module.removesuffix(".base_layer"), param, False
    raise LoraxError(
        f"{folder / WEIGHTS}: tensor {name[:100]!r} is of no kind that lorax serves; merge the adapter with PEFT first"
    )


def _is_tied_copy(name: str, tensors: dict[str, StoredTensor], plain: dict[str, Any]) -> bool:
    """Whether a tensor is the head of a tied model, kept beside the table that it is equal to."""
    table = tensors.get(f"{PREFIX}{TABLE}.weight")
    if name != f"{PREFIX}{HEAD}.weight" or table is None or "lm_head/kernel" in plain:
        return False
    return table.shape == tensors[name].shape and np.array_equal(table.array(), tensors[name].array())


def _is_whole(settings: Settings, module: str, param: str) -> bool:
    saved = any(module == key or module.endswith(f".{key}") or module.endswith(key) for key in settings.whole)
    return saved or (param == "bias" and settings.bias != "none")


def _check_meaning(settings: Settings, entries: dict[str, Entry], plain: dict[str, Any]) -> None:
    """What the same tensors would mean differently here."""
    if not entries:
        raise LoraxError(f"{settings.path}: the adapter changes nothing; its weights file has no factors")
    shared = "embed/embedding" in entries and "lm_head/kernel" not in plain
    if shared and not settings.tied and not settings.tokens:  # PEFT replaces rows in both places by itself
        raise LoraxError(
            f"{settings.path}: changes embed_tokens but not the head, which this base shares with it; "
            "that is another model (ensure_weight_tying is off): merge the adapter with PEFT first"
        )
    biases = [path for path in plain if path in BY_PATH and BY_PATH[path].param == "bias"]
    if settings.bias != "none" and biases and not any(path in entries for path in biases):
        raise LoraxError(f"{settings.path}: bias={settings.bias!r}, and the weights file has no biases; save it again")


class _Reader:
    """Takes the tensors of each weight out of a file."""

    def __init__(
        self, file: Path, settings: Settings, tensors: dict[str, StoredTensor], plain: dict[str, Any], exact: bool
    ):
        self.file, self.settings, self.tensors, self.plain, self.exact = file, settings, tensors, plain, exact
        self.left = set(tensors)

    def leaf(self, path: str, entry: Entry) -> Any:
        """The structured leaf of one weight, without its base."""
        slot = slot_of(path, entry.axes.stack)
        if entry.kind == "low-rank":
            if entry.dora != self.settings.dora:
                raise LoraxError(f"{self.file.parent}: {CONFIG} and {peft_meta.FILE} disagree about DoRA at {path}")
            leaf = self._low_rank(path, slot, entry)
            return Dora(leaf, jnp.asarray(self._magnitudes(path, entry))) if entry.dora else leaf
        if entry.kind == "full" and path == "embed/embedding" and ROWS in self.tensors:
            # What is not replaced is the base's own, so the whole table stands for it.
            if isinstance(jax.tree.leaves(self.plain[path])[0], jax.ShapeDtypeStruct):
                raise LoraxError(f"{self.file}: replaces rows of {path}, which is abstract here; load the base first")
            table = jnp.asarray(dense(self.plain[path]))
            rows = jnp.asarray(self._array(ROWS)).astype(table.dtype)
            return Full(table.at[jnp.asarray(self.settings.tokens, jnp.int32)].set(rows))
        if entry.kind == "full":
            return Full(jnp.asarray(self._whole(path, slot, entry, 0, entry.shape[0] if entry.axes.stack else 1)))
        parts, at = [], 0
        for start, stop in entry.rows:
            parts += [self.plain[path][at:start]] if at < start else []
            parts.append(Full(jnp.asarray(self._whole(path, slot, entry, start, stop))))
            at = stop
        parts += [self.plain[path][at:]] if at < entry.shape[0] else []
        return _fixed(Concat(tuple(parts)))

    def finish(self) -> None:
        """Refuse tensors that no weight took, but for copies of the base's own weights.

        Raises:
            LoraxError: names the first.
        """
        for name in sorted(self.left):
            if not (self._is_base_copy(name) or _is_tied_copy(name, self.tensors, self.plain)):
                raise LoraxError(f"{self.file}: tensor {name[:100]!r} belongs to no weight that the adapter changes")

    def _low_rank(self, path: str, slot: Slot | None, entry: Entry) -> LowRank:
        axes, shape = entry.axes, entry.shape
        stack, ins, outs = (tuple(shape[a] for a in group) for group in (axes.stack, axes.inputs, axes.outputs))
        names = modules(path, axes.stack, stack)
        turned = slot is not None and slot.embedding and axes.inputs == (1,)
        pairs = [self._pair(path, factor_names(slot, m), math.prod(ins), math.prod(outs), turned) for m in names]
        ranks = [pair[0].shape[1] for pair in pairs if pair is not None]
        if not ranks:
            raise LoraxError(f"{self.file}: has no factors for {path}; the adapter is damaged")
        rank, kinds = max(ranks), {pair[0].dtype for pair in pairs if pair is not None}
        dtype = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
        # Zeros on both sides of the missing ranks: the same product, and no gradient ever reaches them.
        a, b = np.zeros((len(names), math.prod(ins), rank), dtype), np.zeros((len(names), rank, math.prod(outs)), dtype)
        scale = np.full(len(names), np.nan, np.float32)
        for i, pair in enumerate(pairs):
            if pair is not None:
                r = pair[0].shape[1]
                a[i, :, :r], b[i, :r] = pair
                scale[i] = self.settings.scale(names[i], r)
        known = scale[~np.isnan(scale)]
        scale = np.where(np.isnan(scale), known[0], scale)
        return LowRank(
            None,
            jnp.asarray(a.reshape(*stack, *ins, rank)),
            jnp.asarray(b.reshape(*stack, rank, *outs)),
            jnp.asarray(self._scale(path, entry, scale, stack)),
            axes,
        )

    def _pair(self, path: str, names: tuple[str, str], ins: int, outs: int, turned: bool) -> tuple[Any, Any] | None:
        """A (in, r) and B (r, out) of one matrix; None where PEFT left the layer alone."""
        have = [name in self.tensors for name in names]
        if not any(have) and not self.exact:
            return None
        if not all(have):
            raise LoraxError(f"{self.file}: lacks {names[have.index(False)]!r}; the adapter is damaged, save it again")
        first, second = (self._array(name) for name in names)
        sizes = (outs, ins) if turned else (ins, outs)
        if (
            first.ndim != 2
            or second.ndim != 2
            or not 1 <= first.shape[0] <= min(sizes)
            or first.shape[0] != second.shape[1]
        ):
            raise LoraxError(
                f"{self.file}: {path}: factors of shapes {first.shape} and {second.shape} are no pair of a rank "
                f"from 1 to {min(sizes)}"
            )
        if (first.shape[1], second.shape[0]) != sizes:
            raise LoraxError(
                f"{self.file}: the adapter is for another base: {path} takes {first.shape[1]} to {second.shape[0]} "
                f"features there, and {sizes[0]} to {sizes[1]} here"
            )
        return (second, first) if turned else (first.T, second.T)

    def _magnitudes(self, path: str, entry: Entry) -> np.ndarray:
        """DoRA's lengths of all matrices; of one that the adapter left alone, the base's own."""
        stack, outs = (tuple(entry.shape[a] for a in group) for group in (entry.axes.stack, entry.axes.outputs))
        own: np.ndarray | None = None
        rows = []
        for i, module in enumerate(modules(path, entry.axes.stack, stack)):
            name = magnitude_name(module)
            name = name if name in self.tensors else f"{name}.weight"
            if name in self.tensors:
                rows.append(self._checked(path, name, (math.prod(outs),)))
                continue
            if self.exact or factor_names(None, module)[0] in self.tensors:
                raise LoraxError(
                    f"{self.file}: lacks {magnitude_name(module)!r}; the adapter is damaged, save it again"
                )
            if own is None:
                base = jnp.asarray(dense(self.plain[path])).astype(jnp.float32)
                own = np.asarray(column_norms(base, entry.axes)).reshape(-1, math.prod(outs))
            rows.append(own[i])
        kinds = {row.dtype for row in rows}
        dtype = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
        return np.stack([row.astype(dtype) for row in rows]).reshape(*stack, *outs)

    def _scale(self, path: str, entry: Entry, computed: np.ndarray, stack: tuple[int, ...]) -> np.ndarray:
        if entry.scale is None:
            same = bool((computed == computed[0]).all())
            return computed[0].reshape(()) if same else computed.reshape(stack)
        if not np.allclose(np.broadcast_to(entry.scale, stack).reshape(-1), computed, rtol=1e-4, atol=1e-12):
            raise LoraxError(
                f"{self.file.parent}: {CONFIG} and {peft_meta.FILE} disagree about the scale of {path}; "
                f"if PEFT wrote the folder since, delete {peft_meta.FILE}"
            )
        return entry.scale

    def _whole(self, path: str, slot: Slot | None, entry: Entry, start: int, stop: int) -> np.ndarray:
        if slot is None:
            name = PREFIX + path.replace("/", ".") + (f".{start}" if start else "") + ".weight"
            want = (stop - start, *entry.shape[1:]) if entry.kind == "pieces" else entry.shape
            return self._checked(path, name, want)
        rows = []
        for module in modules(path, entry.axes.stack, entry.shape[:1])[start:stop] if slot.layered else [slot.module]:
            plain, beside = f"{PREFIX}{module}.{slot.param}", f"{PREFIX}{module}.base_layer.{slot.param}"
            want = entry.shape[1:] if slot.layered else entry.shape
            x = self._checked(
                path, beside if beside in self.tensors else plain, want[::-1] if slot.transposed else want
            )
            rows.append(x.T if slot.transposed else x)
        return np.stack(rows) if slot.layered else np.array(rows[0])

    def _checked(self, path: str, name: str, want: tuple[int, ...]) -> np.ndarray:
        if name not in self.tensors:
            raise LoraxError(f"{self.file}: lacks {name!r}: {path} was trained as a whole, in all layers or in none")
        x = self._array(name)
        if x.shape != tuple(want):
            raise LoraxError(f"{self.file}: {name!r} has shape {x.shape}, and {path} asks for {tuple(want)}")
        return x

    def _array(self, name: str) -> np.ndarray:
        tensor = self.tensors[name]
        if not tensor.floating:
            raise LoraxError(
                f"{self.file}: {name!r} has dtype {tensor.dtype}; factors and weights are floating numbers"
            )
        self.left.discard(name)
        x = tensor.array()
        wide = x.dtype == np.float64 and not jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]
        return x.astype(np.float32) if wide else x

    def _is_base_copy(self, name: str) -> bool:
        """Whether a tensor repeats the base: PEFT stores the table beside factors for it, and whole modules.

        Only an equal one can be left out.
        """
        module, param, factor = _parse(self.file.parent, name)
        found, tensor = find(module, param), self.tensors[name]
        if factor or found is None:
            return False
        (slot, layer), have = found, self.plain.get(found[0].path)
        if have is None or isinstance(jax.tree.leaves(have)[0], jax.ShapeDtypeStruct) or not tensor.floating:
            return False
        have = have.dense() if isinstance(have, Quantized) else have
        if slot.layered and layer >= have.shape[0]:
            return False
        here = np.asarray(have[layer] if slot.layered else have, np.float32)
        there = np.asarray(tensor.array(), np.float32)
        here = here.T if slot.transposed else here
        return here.shape == there.shape and np.allclose(there, here, rtol=1e-2, atol=1e-6)


def _fixed(leaf: Concat) -> Concat:
    """A Concat for `attach`, which fills one frozen piece from the base: give it at most that one as a gap."""
    frozen = [i for i, part in enumerate(leaf.parts) if not is_structured(part)]
    return Concat(tuple(None if [i] == frozen else part for i, part in enumerate(leaf.parts)))
