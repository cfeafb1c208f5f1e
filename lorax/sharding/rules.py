"""The table: a pattern over paths -> the role of each of a weight's last axes.

    fsdp     split to save memory; gathered for the moment of use, one layer at a time
    tensor   split with the arithmetic: nothing of a weight's size moves
    expert   independent weights of a mixture, one group of them a device
    adapter  rows of a bank of adapters, whatever the rule of its weight: no axis of the table has this role

Roles are given to the last axes of a weight, so the axis of scanned layers in front has none and is never split: every
device needs every layer. `roles_of` says which axis of a mesh plays a role; a role that no axis plays splits nothing,
and so one table serves FSDP, tensor parallelism and both.

    Mesh (8,), ("data",)              FSDP
    Mesh (8,), ("model",)             tensor parallel
    Mesh (2, 4), ("data", "model")    both
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lorax.errors import LoraxError
from lorax.paths import Pattern, matches, near_misses, show

Rules = Sequence[tuple[Pattern, tuple[str | None, ...]]]

ROLES = ("fsdp", "tensor", "expert", "adapter")

# Column-parallel maps split their outputs, row-parallel ones their inputs: between the two nothing moves, after the
# second one sum over the devices (Shoeybi et al. 2019, "Megatron-LM").
ZOO: Rules = (
    ("*experts*/down_proj/kernel", ("expert", "tensor", "fsdp")),
    ("*experts*/kernel", ("expert", "fsdp", "tensor")),
    ("*router*", ()),
    (re.compile(r"(.*/)?(o_proj|down_proj)/kernel"), ("tensor", "fsdp")),
    ("*_proj/kernel", ("fsdp", "tensor")),
    (re.compile(r"(.*/)?(o_proj|down_proj)/bias"), ()),
    ("*_proj/bias", ("tensor",)),
    ("*embed/embedding", ("tensor", "fsdp")),
    ("*lm_head/kernel", ("fsdp", "tensor")),
    ("*norm*", ()),
)

# Axes of a mesh that split the batch.
BATCH = ("replica", "data", "fsdp")

# Which axes of a mesh play a role, in order of preference.
_PLAYERS = {"fsdp": ("fsdp", "data"), "tensor": ("model", "tensor"), "expert": ("expert",), "adapter": ("adapter",)}


def roles_of(names: Sequence[str], roles: Mapping[str, str | None] | None = None) -> dict[str, str | None]:
    """The mesh axis that plays each role, None where there is none.

    Args:
        names: the mesh's axes. By default `fsdp` (else `data`) plays fsdp, `model` (else `tensor`) plays tensor,
            `expert` plays expert, and `adapter` (else what plays fsdp) plays adapter.
        roles: role -> mesh axis, or None to leave a role out: `{"fsdp": None}` keeps whole copies on the data axis.

    Raises:
        LoraxError: an unknown role, or an axis that the mesh does not have.

    Example:
        >>> roles_of(("data", "model"))
        {'fsdp': 'data', 'tensor': 'model', 'expert': None, 'adapter': 'data'}
    """
    out: dict[str, str | None] = {
        role: next((name for name in players if name in names), None) for role, players in _PLAYERS.items()
    }
    for role, axis in (roles or {}).items():
        if role not in ROLES:
            raise LoraxError(f"role {role!r} is unknown; choose one of {', '.join(ROLES)}")
        if axis is not None and axis not in names:
            raise LoraxError(f"role {role}: the mesh has no axis {axis!r}; its axes are {', '.join(names)}")
        out[role] = axis
    if out["adapter"] is None and "adapter" not in (roles or {}):
        out["adapter"] = out["fsdp"]
    return out


def batch_axes(names: Sequence[str]) -> tuple[str, ...]:
    """The axes of a mesh that split the batch, in the mesh's order.

    Example:
        >>> batch_axes(("data", "model"))
        ('data',)
    """
    return tuple(name for name in names if name in BATCH)


def axes_of(path: str, leaf: Any, ndim: int, rules: Rules) -> tuple[str | None, ...]:
    """The roles of a weight's last axes: those of the first rule whose pattern fits.

    Raises:
        LoraxError: no rule fits the path, or it has more roles than the weight has axes.
    """
    for pattern, roles in rules:
        if matches(pattern, path, leaf):
            if len(roles) > ndim:
                raise LoraxError(
                    f"{path}: has {ndim} axes, and its rule {show(pattern)} has roles for {len(roles)}; "
                    "put a rule of its own before that one"
                )
            return roles
    near = near_misses(path, [pattern for pattern, _ in rules if isinstance(pattern, str)])
    raise LoraxError(
        f"{path}: no rule says how it is split; add (pattern, roles of its last axes) to the rules, () keeps it whole "
        f"(near: {', '.join(near)})"
    )
