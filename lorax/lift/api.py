"""`lift`: trace the user's function once on dense shapes, evaluate the trace on structured weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lorax.errors import LoraxError
from lorax.lift import control, derivatives, rules  # noqa: F401  (registers the rules)
from lorax.lift.interpreter import Interpreter
from lorax.lift.opening import open_leaf
from lorax.lift.values import Value, abstract, densify
from lorax.paths import path_of
from lorax.weights import is_structured

ON_UNSUPPORTED = ("error", "materialize")


def lift(fn: Callable[..., Any], on_unsupported: str = "error") -> Callable[..., Any]:
    """A function that takes adapted trees wherever `fn` took plain ones.

    `fn` is traced with the dense shapes, and its operations are evaluated with rules for those that a structured
    weight reaches: `x @ (W + s A B)` becomes `x @ W + s ((x @ A) @ B)`. The dense sum is never built. `jit`, `grad`,
    `vmap`, `scan`, `jax.checkpoint` and `shard_map` work inside `fn` and around the lifted function.

    Args:
        fn: any JAX function; a Flax `apply`, or one that calls `nnx.merge`. Its code is not changed.
        on_unsupported: what happens where a structured weight reaches an operation without a rule: `"error"`
            raises, naming the weight's path and the operation; `"materialize"` builds the dense weight there.

    Returns:
        A function with the signature of `fn`. Arguments that are no arrays (flags, strings) reach `fn` untouched.

    Raises:
        LoraxError: at call time, an operation without a rule, or a use that contradicts the factors' axes.

    Example:
        >>> import jax, jax.numpy as jnp, lorax
        >>> apply = lambda params, x: x @ params["kernel"]
        >>> params = {"kernel": jnp.ones((3, 5))}
        >>> adapted = lorax.adapt(jax.random.key(0), params, lorax.LoraSpec(targets="kernel", rank=2))
        >>> lorax.lift(apply)(adapted, jnp.ones((4, 3))).shape
        (4, 5)
    """
    if on_unsupported not in ON_UNSUPPORTED:
        raise LoraxError(f"lift: on_unsupported={on_unsupported!r} is unknown; choose one of {ON_UNSUPPORTED}")

    @functools.wraps(fn, updated=())
    def lifted(*args: Any, **kwargs: Any) -> Any:
        keyed, treedef = jax.tree_util.tree_flatten_with_path((args, kwargs), is_leaf=is_structured)
        leaves = [leaf for _, leaf in keyed]
        if not any(map(is_structured, leaves)):
            return fn(*args, **kwargs)
        traced = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
        values = [open_leaf(leaves[i], _argument_path(keyed[i][0])) for i in traced]
        return evaluate(Interpreter(on_unsupported == "materialize"), fn, treedef, leaves, traced, values)

    return lifted


def evaluate(
    interp: Interpreter,
    fn: Callable[..., Any],
    treedef: Any,
    leaves: list[Any],
    traced: list[int],
    values: list[Any],
    returns_values: bool = False,
) -> Any:
    """Trace `fn` on the dense shapes of `values`, put at the positions `traced` among the leaves, and walk the trace.

    returns_values: hand out the dense form of a structured value that `fn` returns, instead of raising.
    """
    out_tree: Any = None

    def flat(*arrays: Any) -> list[Any]:
        nonlocal out_tree
        filled = list(leaves)
        for i, array in zip(traced, arrays, strict=True):
            filled[i] = array
        args, kwargs = jax.tree_util.tree_unflatten(treedef, filled)
        outs, out_tree = jax.tree_util.tree_flatten(fn(*args, **kwargs))
        return outs

    jaxpr = jax.make_jaxpr(flat)(*map(abstract, values))
    outs = interp.run(jaxpr, values)
    if returns_values:
        outs = [densify(out) for out in outs]
    for out in outs:
        if isinstance(out, Value):
            raise LoraxError(
                f"{out.path}: the lifted function returns this structured weight; return what it computes, "
                "or use lorax.merge for the dense weight"
            )
    return jax.tree_util.tree_unflatten(out_tree, outs)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is traced. Python scalars and everything else reach the function as they are."""
    return is_structured(leaf) or isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def _argument_path(keys: Any) -> str:
    """The path of a weight inside the argument that it came in: (args | kwargs, which one) are left out."""
    return path_of(keys[2:]) or f"argument {path_of(keys[1:])}"
