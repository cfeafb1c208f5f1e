"""What PEFT calls the weights of a tree: one table for zoo models, one rule for every other tree.

    layers/attn/q_proj/kernel, layer 3  <->  ...model.layers.3.self_attn.q_proj.lora_A.weight and lora_B.weight
    embed/embedding                     <->  ...model.embed_tokens.lora_embedding_A and lora_embedding_B
    any/other/path, stack index 3       <->  ...any.other.path.3.lora_A.weight and lora_B.weight

All begin with `base_model.model.`. PEFT keeps `lora_A` as (rank, in) and `lora_B` as (out, rank), one pair a layer.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

PREFIX = "base_model.model."
LAYER = "model.layers.{i}."
TABLE, HEAD = "model.embed_tokens", "lm_head"
_IN_LAYER = re.compile(r"model\.layers\.([0-9]{1,6})\.(.+)")


@dataclass(frozen=True)
class Slot:
    """One weight of a zoo model: its path in the tree, and the module and parameter that hold it in torch.

    transposed: torch holds (out, in), the tree (in, out).
    embedding: PEFT names the factors of a lookup table apart.
    """

    path: str
    module: str
    param: str = "weight"
    transposed: bool = False
    embedding: bool = False

    @property
    def layered(self) -> bool:
        return "{i}" in self.module


def _slots() -> list[Slot]:
    out = [
        Slot("embed/embedding", TABLE, embedding=True),
        Slot("norm/scale", "model.norm"),
        Slot("lm_head/kernel", HEAD, transposed=True),
        Slot("score/kernel", "score", transposed=True),
        Slot("layers/attn_norm/scale", f"{LAYER}input_layernorm"),
        Slot("layers/mlp_norm/scale", f"{LAYER}post_attention_layernorm"),
    ]
    for x in "qkvo":
        out.append(Slot(f"layers/attn/{x}_proj/kernel", f"{LAYER}self_attn.{x}_proj", transposed=True))
        out.append(Slot(f"layers/attn/{x}_proj/bias", f"{LAYER}self_attn.{x}_proj", "bias"))
    out += [Slot(f"layers/attn/{x}_norm/scale", f"{LAYER}self_attn.{x}_norm") for x in "qk"]
    for x in ("gate", "up", "down"):
        out.append(Slot(f"layers/mlp/{x}_proj/kernel", f"{LAYER}mlp.{x}_proj", transposed=True))
    return out


BY_PATH: dict[str, Slot] = {slot.path: slot for slot in _slots()}
_BY_NAME: dict[tuple[str, str], Slot] = {(slot.module, slot.param): slot for slot in BY_PATH.values()}


def slot_of(path: str, stack: tuple[int, ...]) -> Slot | None:
    """The zoo's slot at a path, if the weight is stacked as the zoo stacks it."""
    slot = BY_PATH.get(path)
    return slot if slot is not None and stack == ((0,) if slot.layered else ()) else None


def find(module: str, param: str) -> tuple[Slot, int] | None:
    """The slot and the layer (0 where there is none) of a torch module's parameter.

    Example:
        >>> slot, layer = find("model.layers.3.self_attn.q_proj", "weight")
        >>> slot.path, layer
        ('layers/attn/q_proj/kernel', 3)
    """
    inside = _IN_LAYER.fullmatch(module)
    slot = _BY_NAME.get((LAYER + inside[2] if inside else module, param))
    return None if slot is None else (slot, int(inside[1]) if inside else 0)


def modules(path: str, stack: tuple[int, ...], sizes: tuple[int, ...]) -> list[str]:
    """The module of each matrix in a stacked weight, the last stack axis running fastest.

    Args:
        path: in the tree.
        stack: the stack axes of the weight.
        sizes: their lengths.

    Example:
        >>> modules("blocks/kernel", (0,), (2,))
        ['blocks.kernel.0', 'blocks.kernel.1']
    """
    slot = slot_of(path, stack)
    if slot is not None:
        return [slot.module.replace("{i}", str(i)) for i in range(sizes[0])] if slot.layered else [slot.module]
    name = path.replace("/", ".")
    return [".".join((name, *map(str, index))) for index in itertools.product(*map(range, sizes))]


def factor_names(slot: Slot | None, module: str) -> tuple[str, str]:
    """The names of a matrix's A and B in the file."""
    if slot is not None and slot.embedding:
        return f"{PREFIX}{module}.lora_embedding_A", f"{PREFIX}{module}.lora_embedding_B"
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def magnitude_name(module: str) -> str:
    """The name of a matrix's lengths of columns (DoRA) in the file."""
    return f"{PREFIX}{module}.lora_magnitude_vector"


def short(slot: Slot | None, module: str) -> str:
    """The name by which a configuration refers to a module and its sisters in all other layers."""
    return module if slot is None else slot.module.rsplit(".", 1)[-1] if slot.layered else module
