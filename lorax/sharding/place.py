"""From the table to arrays: factors follow their weight's axes, blocks are split whole, moments lie with their weight.

W (in: i, out: o)      factors: see `changes`
NF4 codes (out: o, in / 2: i), scales (out: o, in / 64: i)      as words for a TPU: codes (in / 8: i, out: o)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lorax.bank import Bank
from lorax.quantized import Quantized
from lorax.sharding.changes import Names, bank_features, change_specs
from lorax.sharding.put import put as to_devices
from lorax.sharding.rules import BATCH, ZOO, Rules, axes_of, batch_axes, roles_of
from lorax.tree import map_named
from lorax.weights import Change, Concat, Full, is_structured
from lorax_kernels.nf4 import QuantizedArray
from lorax_kernels.placement import Placement

# Outputs in a tile of a TPU's kernel.
_LANES = 128


def specs(params: Any, mesh: Any, rules: Rules = ZOO, roles: Mapping[str, str | None] | None = None) -> Any:
    """A `PartitionSpec` for every array of a tree, structured leaves included.

    An axis that its mesh axis does not divide, or not into whole blocks of a quantised weight, stays whole
    (`kept_whole` lists those).

    Args:
        params: any tree of arrays, abstract or not: plain, adapted, quantised, or a half that `split` returned.
        mesh: a `Mesh` or `AbstractMesh`.
        rules: pattern -> roles; the zoo's by default. Put rules for your own names before it: `(*mine, *ZOO)`.
        roles: as in `roles_of`.

    Returns:
        A tree of the same structure.

    Raises:
        LoraxError: a weight that no rule names; says which.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> tree = {"q_proj": {"kernel": jax.ShapeDtypeStruct((3, 64, 32), jnp.float32)}}
        >>> specs({"layers": tree}, jax.sharding.AbstractMesh((2, 4), ("data", "model")))["layers"]["q_proj"]["kernel"]
        PartitionSpec(None, 'data', 'model')
    """
    return _walk(params, mesh, rules, roles, {})


def shardings(params: Any, mesh: Any, rules: Rules = ZOO, roles: Mapping[str, str | None] | None = None) -> Any:
    """`specs` on a mesh: what `jax.device_put` and `jax.jit` take.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> tree = {"layers": {"o_proj": {"kernel": jnp.ones((3, 8, 4))}}}
        >>> jax.device_put(tree, shardings(tree, mesh))["layers"]["o_proj"]["kernel"].sharding.spec
        PartitionSpec(None, 'model', None)
    """
    mesh = automatic(mesh)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(params, mesh, rules, roles), is_leaf=_is_spec)


def shard(params: Any, mesh: Any, rules: Rules = ZOO, roles: Mapping[str, str | None] | None = None) -> Any:
    """The tree on a mesh: every array where `specs` says, and every quantised weight aware of it.

    Kernels over quantised weights read from the leaf how it lies (`Placement`); a step over a mesh needs that, where
    `device_put` alone is enough for plain weights.

    Args:
        params, mesh, rules, roles: as for `specs`. Abstract arrays get a sharding, concrete ones are moved. Where the
            mesh has devices of other processes, all of them call this with the same values.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> shard({"layers": {"o_proj": {"kernel": jnp.ones((3, 8, 4))}}}, mesh)["layers"]["o_proj"]["kernel"].shape
        (3, 8, 4)
    """
    places, mesh = specs(params, mesh, rules, roles), automatic(mesh)
    rows = batch_axes(mesh.axis_names)

    def put(x: Any, spec: PartitionSpec) -> Any:
        place = NamedSharding(mesh, spec)
        abstract = isinstance(x, jax.ShapeDtypeStruct)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) if abstract else to_devices(x, place)

    def note(leaf: Any, spec: Any) -> Any:
        if isinstance(leaf, Bank):
            base = note(leaf.base, spec.base)
            return replace(leaf, base=base, placement=Placement(mesh, rows, bank_features(leaf, spec)))
        if not isinstance(leaf, Quantized) or not leaf.array.is_regular or leaf.array.values_per_code == 1:
            return leaf
        core = tuple(spec.array.scales)[len(leaf.array.stack) :]
        return replace(leaf, array=replace(leaf.array, placement=Placement(mesh, rows, core)))

    whole = lambda x: isinstance(x, (Quantized, Bank)) or _is_spec(x)  # noqa: E731
    return jax.tree.map(note, jax.tree.map(put, params, places), places, is_leaf=whole)


def kept_whole(
    params: Any, mesh: Any, rules: Rules = ZOO, roles: Mapping[str, str | None] | None = None
) -> dict[str, str]:
    """The weights of which the rules would split an axis that cannot be split, and why: path -> reason.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> tree = {"a_proj": {"kernel": jax.ShapeDtypeStruct((8, 6), jnp.float32)}}
        >>> kept_whole(tree, jax.sharding.AbstractMesh((4,), ("model",)))
        {'a_proj/kernel': 'axis 1 of size 6 does not divide into 4 parts on model'}
    """
    found: dict[str, str] = {}
    _walk(params, mesh, rules, roles, found)
    return found


def follow(tree: Any, params: Any, params_shardings: Any, mesh: Any) -> Any:
    """Shardings for what is kept beside parameters (moments, a training state): as the parameter they belong to.

    An array belongs to the parameter whose keys its own keys contain, and lies like it if the two have one shape;
    everything else (counts, keys, maxima) is on every device.

    Args:
        tree: an optimizer's state, or a `lorax.train.step.State`.
        params: what trains, the first half of `split`.
        params_shardings: of `params`.
        mesh: of the shardings.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> mesh = jax.make_mesh((1,), ("model",))
        >>> params = {"up_proj": {"kernel": jnp.ones((8, 4))}}
        >>> state = optax.adam(1.0).init(params)
        >>> follow(state, params, shardings(params, mesh), mesh)[0].mu["up_proj"]["kernel"].spec
        PartitionSpec(None, 'model')
    """
    known = {
        tuple(map(str, keys)): (tuple(leaf.shape), place)
        for (keys, leaf), place in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(params_shardings), strict=True
        )
    }
    whole = NamedSharding(automatic(mesh), PartitionSpec())

    def one(keys: Any, leaf: Any) -> NamedSharding:
        words = tuple(map(str, keys))
        for start in range(len(words)):
            for stop in range(len(words), start, -1):
                shape, place = known.get(words[start:stop], (None, whole))
                if shape == tuple(leaf.shape):
                    return place
        return whole

    return jax.tree_util.tree_map_with_path(one, tree)


def automatic(mesh: Any) -> Any:
    """The mesh with the compiler placing what lies between the arrays that are placed here.

    `jax.make_mesh` makes axes that are part of every array's type; the models' code says nothing of them.
    """
    explicit = isinstance(mesh, Mesh) and any(kind != AxisType.Auto for kind in mesh.axis_types)
    return Mesh(mesh.devices, mesh.axis_names) if explicit else mesh


def _is_spec(x: Any) -> bool:
    return isinstance(x, PartitionSpec)


def _walk(params: Any, mesh: Any, rules: Rules, roles: Any, found: dict[str, str]) -> Any:
    players = roles_of(tuple(mesh.axis_names), roles)
    sizes = dict(zip(mesh.axis_names, mesh.axis_sizes, strict=True))

    def one(path: str, leaf: Any) -> Any:
        ndim = _ndim(leaf)
        if ndim is None:
            return leaf
        wanted = axes_of(path, leaf, ndim, rules)
        names: Names = [None] * (ndim - len(wanted))
        names += [None if role is None else players[role] for role in wanted]
        split, adapter = (
            [n if sizes.get(n or "", 1) > 1 else None for n in some] for some in (names, [players["adapter"]])
        )
        return _place(path, leaf, split, sizes, adapter[0], found)

    return map_named(one, params)


def _ndim(leaf: Any) -> int | None:
    """How many axes a weight has; None for one whose arrays are all in the other half of `split`."""
    if not jax.tree.leaves(leaf):
        return None
    if isinstance(leaf, (Change, Bank)):
        return len(leaf.axes.order)
    parts = leaf.parts if isinstance(leaf, Concat) else (leaf.value,) if isinstance(leaf, Full) else None
    if parts is None:
        return len(leaf.shape)
    return next((n for n in map(_ndim, parts) if n is not None), None)


def _place(
    path: str, leaf: Any, names: Names, sizes: dict[str, int], adapter: str | None, found: dict[str, str]
) -> Any:
    """The leaf with specs in the place of its arrays; `names` has a mesh axis, or None, for each axis of the weight."""
    if _ndim(leaf) is None:
        return leaf
    if isinstance(leaf, (Change, Bank)):

        def factor(shape: tuple[int, ...], spread: Names) -> PartitionSpec:
            return PartitionSpec(*_divided(path, shape, spread, [1] * len(spread), sizes, {}))

        base = _place(path, leaf.base, names, sizes, adapter, found)
        return change_specs(leaf, names, factor, base, adapter)
    if isinstance(leaf, Quantized):
        return _quantized(path, leaf, names, sizes, found)
    if isinstance(leaf, Full):
        return Full(_place(path, leaf.value, names, sizes, adapter, found))
    if isinstance(leaf, Concat):
        return Concat(tuple(_place(path, part, names, sizes, adapter, found) for part in leaf.parts))
    if is_structured(leaf):
        raise TypeError(f"{path}: no rule for a {type(leaf).__name__}")
    return PartitionSpec(*_divided(path, tuple(leaf.shape), names, [1] * len(names), sizes, found))


def _divided(
    path: str, shape: tuple[int, ...], names: Names, units: list[int], sizes: dict[str, int], found: dict[str, str]
) -> Names:
    """The names of those axes that fall into equal parts of whole units."""
    out: Names = []
    for axis, (size, name, unit) in enumerate(zip(shape, names, units, strict=True)):
        parts = 1 if name is None else sizes[name]
        if size % (parts * unit) and parts > 1:
            whole = f" of whole blocks of {unit}" if unit > 1 else ""
            found[path] = f"axis {axis} of size {size} does not divide into {parts} parts{whole} on {name}"
            name = None
        out.append(name)
    return out


def _quantized(path: str, leaf: Quantized, names: Names, sizes: dict[str, int], found: dict[str, str]) -> Any:
    """Whole blocks along the last stored axis; for a TPU whole tiles along the outputs."""
    array, front = leaf.array, len(leaf.array.stack)
    shape = tuple(leaf.shape)
    stored: Names = [*names[:front], *(names[front + axis] for axis in leaf.order)]
    sizes_stored = (*shape[:front], *array.slice_shape)
    units = [1] * len(stored)
    if not array.is_regular:
        found.update({path: "its rows are not whole blocks"} if any(stored[front:]) else {})
        stored[front:] = [None] * (len(stored) - front)
    elif array.values_per_code > 1:
        units[-1] = array.block_size
        if array.layout == "tpu":
            # Outputs in whole tiles, unless their parts are gathered before they are used.
            units[-2] = 1 if stored[-2] in BATCH else _LANES
    stored = _divided(path, sizes_stored, stored, units, sizes, found)
    return replace(leaf, array=_arrays(array, front, stored))


def _arrays(array: QuantizedArray, front: int, stored: Names) -> QuantizedArray:
    """The specs of codes and scales; what belongs to many blocks (second-level scales, means) is on every device."""
    stack, core = stored[:front], stored[front:]
    if not array.is_regular:
        codes = scales = PartitionSpec(*stack, None)
    else:
        codes = PartitionSpec(*stack, *(reversed(core) if array.layout == "tpu" else core))
        scales = PartitionSpec(*stack, *(core[:-1] if array.format == "int8" else core))
    few = lambda part: None if part is None else PartitionSpec(*stack)  # noqa: E731
    return replace(
        array,
        codes=codes,
        scales=None if array.scales is None else scales,
        scales2=few(array.scales2),
        offset=few(array.offset),
        map8=few(array.map8),
    )
