"""Which axes of a weight are in, which out, which stacked: read from a trace, since shapes cannot tell.

The same walk as `lift`'s, with a `Probe` in the place of each weight. A probe knows which of the weight's own axes
each of its current axes came from; where it is used up, contracted axes are inputs, axes that survive are outputs,
and axes that a scan, a batch dimension or an index consumed are stacked. Nothing is computed: the walk runs under
`jax.eval_shape`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lorax.errors import LoraxError
from lorax.lift.api import evaluate, is_array
from lorax.lift.interpreter import CONTROL, Interpreter, rule, where_structured
from lorax.lift.rules.shapes import axis_groups
from lorax.lift.values import Unsupported, Value, densify
from lorax.weights import Axes, is_structured

Origin = frozenset[int]


@dataclass
class Uses:
    """What a trace showed of one weight.

    products: the roles of the axes in each product, in order, without repeats.
    lookup: the roles if its rows are looked up (an embedding).
    others: the primitives of uses that are neither.
    """

    ndim: int
    products: list[Axes] = field(default_factory=list)
    lookup: Axes | None = None
    others: list[str] = field(default_factory=list)

    def axes(self, path: str) -> Axes:
        """The one partition that serves every use. An embedding used again for the logits swaps in and out.

        Raises:
            LoraxError: no product consumes the weight, or its uses contradict each other.
        """
        found = [self.lookup] if self.lookup else []
        found += self.products
        if not found:
            used = f"is used by {', '.join(dict.fromkeys(self.others))}" if self.others else "is not used"
            raise LoraxError(
                f"{path}: no matmul, convolution or lookup consumes this weight (it {used}), so a low-rank change "
                "does not apply; leave it out of targets, or name it in train_also"
            )
        first = found[0]
        for other in found[1:]:
            same = _sets(first) == _sets(other)
            swapped = _sets(first) == _sets(Axes(other.stack, other.outputs, other.inputs))
            if not (same or swapped):
                raise LoraxError(
                    f"{path}: its uses contradict each other (once {first}, once {other}), so no single factor pair "
                    "serves both; leave it out of targets, or name it in train_also"
                )
        return first


def _sets(axes: Axes) -> tuple[set[int], set[int], set[int]]:
    return set(axes.stack), set(axes.inputs), set(axes.outputs)


class Ledger(dict[str, Uses]):
    """Uses by path. Hashed by identity, so that probes can carry it as static data."""

    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]

    def __eq__(self, other: object) -> bool:
        return self is other


@dataclass(frozen=True, eq=False)
class Probe(Value):
    """A weight under observation: its array, and for each current axis the weight's own axes it came from.

    looked_up: the weight's axes that a gather has indexed, as long as it is open whether that was a lookup of rows
    or a choice among stacked weights.
    """

    array: Any
    axes: tuple[Origin, ...]
    path: str
    ledger: Ledger
    looked_up: Origin = frozenset()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    @property
    def uses(self) -> Uses:
        return self.ledger[self.path]

    def dense(self) -> Any:
        return self.array

    def inside_scan(self) -> Probe:
        return replace(self, axes=self.axes[1:])

    def specs(self, spec: PartitionSpec) -> Any:
        return replace(self, array=spec)

    def product(self, contracted: Sequence[int], batched: Sequence[int]) -> None:
        """Note a product that contracts and batches these current axes and leaves the others."""
        inputs = _union(self.axes[i] for i in contracted)
        stacked = _union(self.axes[i] for i in batched)
        outputs = _union(axes for i, axes in enumerate(self.axes) if i not in contracted and i not in batched)
        if self.looked_up:
            left_in, left_out = inputs - self.looked_up, outputs - self.looked_up
            if not (left_in and left_out):
                return  # Rows of an embedding that go on as an activation: `gather` has noted the lookup.
            self.uses.lookup = None
            inputs, outputs = left_in, left_out
        outputs -= stacked
        if inputs & outputs:
            self.uses.others.append("a product that contracts a part of an axis")
            return
        stack = frozenset(range(self.uses.ndim)) - inputs - outputs
        roles = Axes(*(tuple(sorted(axes)) for axes in (stack, inputs, outputs)))
        if roles not in self.uses.products:
            self.uses.products.append(roles)


jax.tree_util.register_dataclass(Probe, data_fields=["array"], meta_fields=["axes", "path", "ledger", "looked_up"])


def _union(sets: Any) -> Origin:
    return frozenset().union(*sets)


class RoleInterpreter(Interpreter):
    """A walk that never fails on a probe: a use without a rule is noted, and the plain array goes on."""

    def bind(self, eqn: Any, args: Sequence[Any]) -> list[Any]:
        if eqn.primitive.name in ("scan", "while"):
            # Rows that were looked up and are carried on are an activation, no longer a weight.
            args = [arg.array if isinstance(arg, Probe) and arg.looked_up else arg for arg in args]
        probes = [i for i, arg in enumerate(args) if isinstance(arg, Probe)]
        if len(probes) > 1 and eqn.primitive.name not in CONTROL:
            # Where weights meet, each is noted on its own; the result is no longer any one of them.
            for one in probes:
                self.bind(eqn, [arg if i == one else densify(arg) for i, arg in enumerate(args)])
            args = [densify(arg) for arg in args]
        try:
            return super().bind(eqn, args)
        except (Unsupported, LoraxError):
            for arg in args:
                if isinstance(arg, Probe) and not arg.looked_up:
                    arg.uses.others.append(eqn.primitive.name)
            return super().bind(eqn, [densify(arg) for arg in args])


def axis_uses(fn: Callable[..., Any], params: Any, args: Sequence[Any], probed: dict[int, str]) -> Ledger:
    """Trace `fn(params, *args)` abstractly and tell how each probed weight is used.

    Args:
        fn: the function that will be lifted.
        params: the tree, concrete or abstract.
        args: the other arguments, concrete or abstract.
        probed: position of a leaf in `params` -> its path.
    """
    call = (tuple([params, *args]), {})
    leaves, treedef = jax.tree_util.tree_flatten(call, is_leaf=is_structured)
    traced = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
    shapes = [jax.ShapeDtypeStruct(leaves[i].shape, leaves[i].dtype) for i in traced]
    ledger = Ledger({path: Uses(len(leaves[i].shape)) for i, path in probed.items()})

    def walk(arrays: list[Any]) -> Any:
        values = [
            Probe(x, tuple(frozenset({axis}) for axis in range(x.ndim)), probed[i], ledger) if i in probed else x
            for i, x in zip(traced, arrays, strict=True)
        ]
        return evaluate(RoleInterpreter(), fn, treedef, leaves, traced, values, returns_values=True)

    jax.eval_shape(walk, shapes)
    return ledger


@rule("dot_general", Probe)
def _dot_general(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    side = where_structured(args)
    contracted, batched = eqn.params["dimension_numbers"]
    args[side].product(contracted[side], batched[side])
    return interp.bind(eqn, [densify(arg) for arg in args])


@rule("ragged_dot_general", Probe)
def _ragged_dot(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    side = where_structured(args)
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contracted, batched = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions) if side == 1 else ()
    args[side].product(contracted[side], (*batched[side], *groups))
    return interp.bind(eqn, [densify(arg) for arg in args])


@rule("conv_general_dilated", Probe)
def _convolution(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    if where_structured(args) != 1:
        raise Unsupported("not the kernel")
    _, *contracted = eqn.params["dimension_numbers"].rhs_spec
    args[1].product(contracted, ())
    return interp.bind(eqn, [densify(arg) for arg in args])


@rule("gather", Probe)
def _gather(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    if where_structured(args) != 0 or args[0].looked_up:
        raise Unsupported("not a first lookup")
    probe, indices = args
    numbers = eqn.params["dimension_numbers"]
    if numbers.operand_batching_dims or set(numbers.start_index_map) != set(numbers.collapsed_slice_dims):
        raise Unsupported("not a lookup of rows")
    (array,) = interp.bind(eqn, [probe.array, indices])
    indexed = _union(probe.axes[axis] for axis in numbers.start_index_map)
    rest = [axes for axis, axes in enumerate(probe.axes) if axis not in numbers.start_index_map]
    axes = [indexed] * array.ndim
    for position, origin in zip(numbers.offset_dims, rest, strict=True):
        axes[position] = origin
    outputs = _union(rest)
    stack = frozenset(range(probe.uses.ndim)) - indexed - outputs
    if not probe.uses.products or probe.uses.lookup:
        probe.uses.lookup = Axes(*(tuple(sorted(s)) for s in (stack, indexed, outputs)))
    return [replace(probe, array=array, axes=tuple(axes), looked_up=indexed)]


def _same_axes(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
    index = where_structured(args)
    if any(jnp.ndim(arg) != 0 for i, arg in enumerate(args) if i != index):
        raise Unsupported("elementwise with an array")
    probe = args[index]
    (array,) = interp.bind(eqn, [probe.array if arg is probe else arg for arg in args])
    return [replace(probe, array=array)]


for _name in (
    *("convert_element_type", "copy", "copy_p", "sharding_constraint", "name", "mesh_cast", "reshard"),
    *("stop_gradient", "pvary", "neg", "mul", "div", "slice", "dynamic_slice", "rev"),
):
    rule(_name, Probe)(_same_axes)


def _with_axes(axes_of: Callable[[Probe, Any], Sequence[Origin]]) -> Callable[..., list[Any]]:
    def apply(interp: Interpreter, eqn: Any, args: list[Any]) -> list[Any]:
        (probe,) = args
        axes = tuple(axes_of(probe, eqn.params))
        return [replace(probe, array=array, axes=axes) for array in interp.bind(eqn, [probe.array])]

    return apply


def _broadcast_axes(probe: Probe, params: Any) -> list[Origin]:
    axes: list[Origin] = [frozenset()] * len(params["shape"])
    for old, new in enumerate(params["broadcast_dimensions"]):
        axes[new] = probe.axes[old]
    return axes


def _reshape_axes(probe: Probe, params: Any) -> list[Origin]:
    axes: list[Origin] = []
    for old, sizes in axis_groups(probe.shape, tuple(params["new_sizes"])):
        # An axis of size one says nothing, unless the whole group has no other.
        telling = [axis for axis in old if probe.shape[axis] != 1] or old
        origin = _union(probe.axes[axis] for axis in telling)
        whole = math.prod(sizes)
        axes += [origin if size != 1 or whole == 1 else frozenset() for size in sizes]
    return axes


rule("transpose", Probe)(_with_axes(lambda probe, params: [probe.axes[i] for i in params["permutation"]]))
rule("squeeze", Probe)(
    _with_axes(lambda probe, params: [a for i, a in enumerate(probe.axes) if i not in params["dimensions"]])
)
rule("unstack", Probe)(_with_axes(lambda probe, params: [a for i, a in enumerate(probe.axes) if i != params["axis"]]))
rule("split", Probe)(_with_axes(lambda probe, params: probe.axes))
rule("broadcast_in_dim", Probe)(_with_axes(_broadcast_axes))
rule("reshape", Probe)(_with_axes(_reshape_axes))
