"""Random `dot_general`s: any contracting and batch dimensions, the weight on either side, value and gradients.

The lifted function is traced and its few primitives are evaluated by NumPy in float64, so that an example costs a
millisecond and no compilation; the other side is the merged weight and `np.einsum`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax import Axes, LowRank, lift
from lorax.lift import compat


class Example(NamedTuple):
    """A product and the roles of the weight's axes. Every axis is a letter."""

    weight: str
    x: str
    out: str
    axes: Axes
    sizes: dict[str, int]
    rank: int
    per_layer: bool
    first: bool
    seed: int

    @property
    def numbers(self) -> Any:
        """dot_general's own dimension numbers, with the batch in the order of the output."""
        batch = [c for c in self.out if c in self.weight and c in self.x]
        summed = [c for c in self.weight if c in self.x and c not in batch]
        w, x = ([[a.index(c) for c in letters] for letters in (summed, batch)] for a in (self.weight, self.x))
        pairs = list(zip(w, x, strict=True) if self.first else zip(x, w, strict=True))
        return tuple(pairs[0]), tuple(pairs[1])


@st.composite
def examples(draw) -> Example:
    count = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    summed, batch, free, own = "abc"[: count(1, 2)], "hij"[: count(0, 2)], "pqr"[: count(1, 3)], "xy"[: count(0, 2)]
    weight = "".join(draw(st.permutations(summed + batch + free)))
    x = "".join(draw(st.permutations(summed + batch + own)))
    batch = "".join(draw(st.permutations(batch)))
    # One factor has the summed axes, the other at least one that stays; the rest may be with either, or stacked.
    home = {c: "one" for c in summed} | {c: "stack" for c in batch} | {free[0]: "other"}
    home |= {c: draw(st.sampled_from(["one", "other", "stack"])) for c in free[1:]}
    one, other, stack = (tuple(i for i, c in enumerate(weight) if home[c] == w) for w in ("one", "other", "stack"))
    first = draw(st.booleans())
    rest = [c for c in weight if c in free], [c for c in x if c in own]
    out = "".join([batch, *(rest[0] + rest[1] if first else rest[1] + rest[0])])
    axes = Axes(stack, one, other) if draw(st.booleans()) else Axes(stack, other, one)
    sizes = {c: count(1, 5) for c in sorted({*weight, *x})}
    return Example(weight, x, out, axes, sizes, count(1, 4), draw(st.booleans()), first, count(0, 2**31))


def evaluate(jaxpr: Any, args: list[np.ndarray]) -> list[np.ndarray]:
    """A jaxpr in NumPy, float64; a primitive that is not here is an error."""
    inner, consts = compat.open_jaxpr(jaxpr)
    env = dict(zip(inner.constvars, map(np.asarray, consts), strict=True))
    env |= dict(zip(inner.invars, args, strict=True))
    for eqn in inner.eqns:
        values = [np.asarray(compat.value_of(atom, env)) for atom in eqn.invars]
        outs = PRIMITIVES[eqn.primitive.name](eqn.params, *values)
        env |= dict(zip(eqn.outvars, outs if isinstance(outs, list) else [outs], strict=True))
        for var in eqn.outvars:
            assert env[var].shape == tuple(var.aval.shape), eqn
    return [np.asarray(compat.value_of(atom, env)) for atom in inner.outvars]


def dot_general(params: Any, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    (a_sum, b_sum), (a_batch, b_batch) = params["dimension_numbers"]
    pairs = list(zip((*a_batch, *a_sum), (*b_batch, *b_sum), strict=True))
    a_axes = list(range(a.ndim))
    b_axes = [a.ndim + i for i in range(b.ndim)]
    for i, j in pairs:
        b_axes[j] = a_axes[i]
    free = [a_axes[i] for i in range(a.ndim) if i not in (*a_sum, *a_batch)]
    free += [b_axes[j] for j in range(b.ndim) if j not in (*b_sum, *b_batch)]
    return np.einsum(a, a_axes, b, b_axes, [a_axes[i] for i in a_batch] + free)


def broadcast_in_dim(params: Any, x: np.ndarray) -> np.ndarray:
    shape = [1] * len(params["shape"])
    for axis, size in zip(params["broadcast_dimensions"], x.shape, strict=True):
        shape[axis] = size
    return np.broadcast_to(x.reshape(shape), params["shape"])


PRIMITIVES: dict[str, Any] = {
    "dot_general": dot_general,
    "broadcast_in_dim": broadcast_in_dim,
    "add": lambda p, a, b: a + b,
    "add_any": lambda p, a, b: a + b,
    "mul": lambda p, a, b: a * b,
    "transpose": lambda p, x: x.transpose(p["permutation"]),
    "squeeze": lambda p, x: np.squeeze(x, p["dimensions"]),
    "reshape": lambda p, x: x.reshape(p["new_sizes"]),
    "reduce_sum": lambda p, x: x.sum(tuple(p["axes"])),
    "convert_element_type": lambda p, x: x,
    "jit": lambda p, *args: evaluate(p["jaxpr"], list(args)),
    "pjit": lambda p, *args: evaluate(p["jaxpr"], list(args)),
}


def merged(e: Example, base: Any, a: Any, b: Any, scale: Any) -> Any:
    """base + scale A B by einsum."""
    stack, ins, outs = ("".join(e.weight[i] for i in axes) for axes in (e.axes.stack, e.axes.inputs, e.axes.outputs))
    scale = scale if e.per_layer else np.full([e.sizes[c] for c in stack], scale)
    return base + np.einsum(f"{stack},{stack}{ins}Z,{stack}Z{outs}->{e.weight}", scale, a, b)


@settings(deadline=None, max_examples=150)
@given(e=examples())
def test_lifted_equals_merged(e: Example):
    rng = np.random.default_rng(e.seed)
    draw = lambda *shape: rng.normal(size=shape)  # noqa: E731
    w_shape, x_shape, out_shape = (tuple(e.sizes[c] for c in letters) for letters in (e.weight, e.x, e.out))
    stack, ins, outs = (tuple(w_shape[i] for i in axes) for axes in (e.axes.stack, e.axes.inputs, e.axes.outputs))
    a, b = draw(*stack, *ins, e.rank), draw(*stack, e.rank, *outs)
    base, x, ct, scale = draw(*w_shape), draw(*x_shape), draw(*out_shape), draw(*(stack if e.per_layer else ()))

    def product(w, x):
        return jax.lax.dot_general(*((w, x) if e.first else (x, w)), e.numbers)

    def lifted(base, a, b, scale, x, ct):
        out = lift(product)(LowRank(base, a, b, scale, e.axes), x)
        return jnp.sum(out * ct), out

    args = [base, a, b, scale, x, ct]
    grads = jax.grad(lifted, argnums=(1, 2, 4), has_aux=True)
    jaxpr = jax.make_jaxpr(grads)(*(jax.ShapeDtypeStruct(np.shape(v), jnp.float32) for v in args))
    da, db, dx, out = evaluate(jaxpr, [np.asarray(v, np.float64) for v in args])

    w = merged(e, base, a, b, scale)
    close(out, np.einsum(f"{e.weight},{e.x}->{e.out}", w, x))
    close(dx, np.einsum(f"{e.weight},{e.out}->{e.x}", w, ct))
    # Through the merged weight: dW meets the other factor.
    dw = np.einsum(f"{e.out},{e.x}->{e.weight}", ct, x)
    s, i, o = ("".join(e.weight[k] for k in axes) for axes in (e.axes.stack, e.axes.inputs, e.axes.outputs))
    every = scale if e.per_layer else np.full(stack, scale)
    close(da, np.einsum(f"{e.weight},{s}Z{o},{s}->{s}{i}Z", dw, b, every))
    close(db, np.einsum(f"{e.weight},{s}{i}Z,{s}->{s}Z{o}", dw, a, every))


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10 * (1 + np.abs(want).max()))
