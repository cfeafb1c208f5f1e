"""The tensors and the configuration of an adapter, from its structured leaves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from lorax.errors import LoraxError
from lorax.io import safetensors
from lorax.io.peft_config import Module, describe
from lorax.io.peft_meta import Entry
from lorax.io.peft_names import BY_PATH, HEAD, PREFIX, Slot, factor_names, magnitude_name, modules, short, slot_of
from lorax.variants.dora import Dora
from lorax.weights import Full, LowRank


class Writer:
    """The tensors of an adapter, made when the file is written, and what the configuration says of them."""

    def __init__(self, weights: dict[str, Entry], plain: dict[str, Any], tied: bool):
        self.weights, self.plain, self.tied = weights, plain, tied
        self.tensors: list[safetensors.Entry] = []
        self.lora: list[Module] = []
        self.whole: list[str] = []
        self.slots: list[Slot | None] = []
        self.biases = False
        # PEFT has DoRA for all of an adapter's matrices or for none.
        low_rank = {name: e.dora for name, e in weights.items() if e.kind == "low-rank"}
        self.dora = any(low_rank.values())
        mixed = [name for name, dora in low_rank.items() if not dora] if self.dora else []
        if mixed:
            raise LoraxError(
                f"{mixed[0]}: is plain LoRA beside DoRA, and PEFT's format has one for all; save them apart"
            )
        self._names: dict[str, str] = {}
        self._wholes = {name for name, e in weights.items() if e.kind != "low-rank"}
        # Torch modules that have factors: PEFT moves their own parameters one level down.
        self._factored = {m for name, e in weights.items() if e.kind == "low-rank" for m in self._modules(name)}

    def add(self, name: str, leaf: Any) -> None:
        """All tensors of one weight."""
        slot = slot_of(name, self.weights[name].axes.stack)
        self.slots.append(slot)
        if isinstance(leaf, Dora):
            self._factors(name, slot, leaf.weight)
            self._magnitudes(name, slot, leaf)
        elif isinstance(leaf, LowRank):
            self._factors(name, slot, leaf)
        elif isinstance(leaf, Full):
            self._whole(name, slot, leaf.value, 0)
        else:
            trained = [part for part in leaf.parts if isinstance(part, Full)]
            for (start, _), part in zip(self.weights[name].rows, trained, strict=True):
                self._whole(name, slot, part.value, start)

    def config(self, base_name: str | None, loftq: int = 0) -> dict[str, Any]:
        """What `adapter_config.json` holds."""
        more: dict[str, Any] = {"bias": "all"} if self.biases else {}
        if self.dora:
            more["use_dora"] = True
        if loftq:
            # How it was started. `init_lora_weights` stays as it is, or PEFT would do it again when it loads.
            more["loftq_config"] = {"loftq_bits": 4, "loftq_iter": loftq}
        if self.tied and "embed/embedding" in self.weights:
            # The change of the table is also one of the head; PEFT does that only when told.
            more["ensure_weight_tying"] = True
        zoo = all(slot is not None for slot in self.slots)
        task = ("SEQ_CLS" if "score/kernel" in {*self.weights, *self.plain} else "CAUSAL_LM") if zoo else None
        return describe(self.lora, self.whole, base_name=base_name, task=task, **more)

    def _modules(self, name: str) -> list[str]:
        entry = self.weights[name]
        return modules(name, entry.axes.stack, tuple(entry.shape[a] for a in entry.axes.stack))

    def _factors(self, name: str, slot: Slot | None, leaf: LowRank) -> None:
        s = len(leaf.axes.stack)
        stack, rank = leaf.A.shape[:s], leaf.rank
        scales = np.broadcast_to(np.asarray(leaf.scale, np.float32), stack).reshape(-1)
        # A table that is read as a head has its roles the other way round: (V, D) = (A B) or (A B)^T.
        turned = slot is not None and slot.embedding and leaf.axes.inputs == (1,)
        for i, module in enumerate(self._modules(name)):
            at = np.unravel_index(i, stack) if stack else ()

            def a(at: Any = at) -> np.ndarray:
                return np.asarray(leaf.A[at]).reshape(-1, rank).T

            def b(at: Any = at) -> np.ndarray:
                return np.asarray(leaf.B[at]).reshape(rank, -1).T

            ins, outs = math.prod(leaf.A.shape[s:-1]), math.prod(leaf.B.shape[s + 1 :])
            names = factor_names(slot, module)
            pair = [((rank, ins), leaf.A.dtype, a), ((outs, rank), leaf.B.dtype, b)]
            if turned:
                pair = [((rank, outs), leaf.B.dtype, lambda b=b: b().T), ((ins, rank), leaf.A.dtype, lambda a=a: a().T)]
            for tensor, spec in zip(names, pair, strict=True):
                self._tensor(name, tensor, *spec)
            self.lora.append(Module(module, short(slot, module), rank, float(scales[i])))

    def _magnitudes(self, name: str, slot: Slot | None, leaf: Dora) -> None:
        """The lengths of the columns of each matrix."""
        if slot is not None and slot.embedding:
            raise LoraxError(f"{name}: DoRA on the embedding has other lengths in PEFT; leave it out of the targets")
        stack = leaf.A.shape[: len(leaf.axes.stack)]
        size = math.prod(leaf.magnitude.shape[len(stack) :])
        for i, module in enumerate(self._modules(name)):
            at = np.unravel_index(i, stack) if stack else ()
            make = lambda at=at: np.asarray(leaf.magnitude[at]).reshape(-1)  # noqa: E731
            self._tensor(name, magnitude_name(module), (size,), leaf.magnitude.dtype, make)

    def _whole(self, name: str, slot: Slot | None, value: Any, first: int) -> None:
        """A weight that trained as it is: all of it, or layers `first` and on."""
        if slot is None:
            module = name.replace("/", ".")
            tensor = f"{PREFIX}{module}{f'.{first}' if first else ''}.weight"
            self._tensor(name, tensor, value.shape, value.dtype, lambda: np.asarray(value))
            self.whole.append(module)
            return
        trained = self._modules(name)[first : first + value.shape[0]] if slot.layered else [slot.module]
        # PEFT saves modules, not parameters. A bias whose module is not whole trains by another setting.
        alone = slot.param == "bias" and _sibling(name, "kernel") not in self._wholes
        for i, module in enumerate(trained):
            beside = alone and module in self._factored
            self._parameter(name, f"{PREFIX}{module}{'.base_layer' if beside else ''}", slot, value, i)
        if slot.embedding and self.tied:
            # PEFT keeps both ends of a tie.
            self._parameter(name, f"{PREFIX}{HEAD}", slot, value, 0)
        self.biases |= alone
        if not alone:
            part = self.weights[name].kind == "pieces"
            self.whole += trained if part else [short(slot, trained[0])]
            self._still_bias(name, trained, first)

    def _still_bias(self, name: str, trained: list[str], first: int) -> None:
        """PEFT expects a whole module to have its bias in the file too, also one that did not train."""
        path = _sibling(name, "bias")
        if path in self.plain and path in BY_PATH and path != name:
            slot = BY_PATH[path]
            for i, module in enumerate(trained):
                self._parameter(path, f"{PREFIX}{module}", slot, self.plain[path], first + i)

    def _parameter(self, name: str, prefix: str, slot: Slot, value: Any, layer: int) -> None:
        shape = value.shape[1:] if slot.layered else value.shape

        def make() -> np.ndarray:
            x = np.asarray(value[layer] if slot.layered else value)
            return x.T if slot.transposed else x

        shape = shape[::-1] if slot.transposed else shape
        self._tensor(name, f"{prefix}.{slot.param}", shape, value.dtype, make)

    def _tensor(self, path: str, name: str, shape: Any, dtype: Any, make: Callable[[], np.ndarray]) -> None:
        if name in self._names:
            raise LoraxError(f"{path} and {self._names[name]} both come out as {name!r} in PEFT's names; rename one")
        self._names[name] = path
        self.tensors.append(safetensors.Entry(name, tuple(shape), np.dtype(dtype), make))


def _sibling(path: str, name: str) -> str:
    return f"{path.rpartition('/')[0]}/{name}"
