"""Adam whose moments are kept in 8 bit: 2.03 bytes of state a parameter instead of 8.

    m <- b1 deq(m) + (1 - b1) g        v <- b2 deq(v) + (1 - b2) g^2
    update = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    state  = quantise(m), quantise(v)

The update uses the moments of this step before they are quantised again. The first moment takes the signed dynamic
map, the second the unsigned one. A second moment that is not zero never becomes zero by rounding: the step divides
by its root, and beside a first moment that survived, the update would be m / eps.

Source: Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization"; Kingma and Ba 2015; Loshchilov and
Hutter 2019 for the weight decay.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Float32, Int32

from lorax.errors import LoraxError
from lorax.optim.blockwise import (
    Blockwise,
    Rounding,
    check_blocks,
    dequantize_blockwise,
    quantize_blockwise,
    zeros_blockwise,
)


class ScaleByAdam8bitState(NamedTuple):
    """Steps taken, and the moments: trees of the parameters' structure whose leaves are `Blockwise` or float32."""

    count: Int32[Array, ""]
    mu: Any
    nu: Any


def adamw8bit(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    block_size: int = 256,
    min_size: int = 4096,
    rounding: Rounding = "nearest",
) -> optax.GradientTransformationExtraArgs:
    """AdamW with 8-bit moments, to be used where `optax.adamw` is.

    Args:
        learning_rate: a number or an Optax schedule.
        b1, b2, eps: as in Adam.
        weight_decay: decoupled: the parameters shrink by learning_rate * weight_decay a step.
        block_size: values to a scale of the moments.
        min_size: arrays with fewer elements keep float32 moments: they hold no memory worth saving.
        rounding: `"nearest"`, or `"table"` to follow bitsandbytes on a CPU (see `lorax.optim.blockwise`).

    Returns:
        An Optax transformation. With a weight decay, `update` needs the parameters.

    Raises:
        LoraxError: a decay rate outside [0, 1), a block size below 1; on `init`, an array that is no float.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> params = {"w": jnp.ones((64, 128))}
        >>> tx = adamw8bit(1e-3)
        >>> state = tx.init(params)
        >>> sum(x.nbytes for x in jax.tree.leaves(state))  # 2 (1 + 4 / 256) bytes a parameter and a step count
        16644
        >>> updates, state = tx.update({"w": jnp.ones((64, 128))}, state, params)
        >>> float(optax.apply_updates(params, updates)["w"][0, 0].round(4))
        0.999
    """
    parts = [scale_by_adam8bit(b1, b2, eps, block_size, min_size, rounding)]
    if weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay))
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))


def scale_by_adam8bit(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    block_size: int = 256,
    min_size: int = 4096,
    rounding: Rounding = "nearest",
) -> optax.GradientTransformation:
    """Gradients to Adam's directions; the part of `adamw8bit` that composes. Arguments and errors are the same.

    Updates come back in the dtype of the gradients. The state is a plain tree of arrays: it can be donated, saved
    and restored, and a resumed run is the same to the bit.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> tx = optax.chain(optax.clip_by_global_norm(1.0), scale_by_adam8bit(), optax.scale(-1e-3))
        >>> tx.init({"w": jnp.ones(5000)})[1].mu["w"].codes.dtype
        dtype('uint8')
    """
    check_blocks(block_size, rounding)
    if not (0.0 <= b1 < 1.0 and 0.0 <= b2 < 1.0):
        raise LoraxError(f"adam8bit: b1={b1}, b2={b2}: decay rates lie in [0, 1)")

    def zeros(x: Any, signed: bool) -> Blockwise | Float32[Array, "*shape"]:
        small = x.size < min_size
        return jnp.zeros_like(x, dtype=jnp.float32) if small else zeros_blockwise(x, block_size, signed)

    def init(params: Any) -> ScaleByAdam8bitState:
        _refuse_integers(params)
        mu = jax.tree.map(lambda x: zeros(x, True), params)
        return ScaleByAdam8bitState(jnp.zeros((), jnp.int32), mu, jax.tree.map(lambda x: zeros(x, False), params))

    def moment(old: Any, new: Float32[Array, "*shape"], decay: float, signed: bool) -> Float32[Array, "*shape"]:
        before = dequantize_blockwise(old, block_size, signed) if isinstance(old, Blockwise) else old
        return decay * before + (1.0 - decay) * new

    def keep(old: Any, x: Float32[Array, "*shape"], signed: bool) -> Blockwise | Float32[Array, "*shape"]:
        if not isinstance(old, Blockwise):
            return x
        codes, absmax = quantize_blockwise(x, block_size, signed, rounding)
        # Code 0 is zero in the unsigned map.
        return Blockwise(codes if signed else jnp.where(x > 0, jnp.maximum(codes, 1), codes), absmax)

    def step(gradient: Float[Array, "*shape"], mu: Any, nu: Any, count: Array) -> tuple[Array, Any, Any]:
        g = gradient.astype(jnp.float32)
        m, v = moment(mu, g, b1, True), moment(nu, g * g, b2, False)
        update = (m / _correction(b1, count)) / (jnp.sqrt(v / _correction(b2, count)) + eps)
        return update.astype(gradient.dtype), keep(mu, m, True), keep(nu, v, False)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ScaleByAdam8bitState]:
        del params
        count = jnp.asarray(optax.safe_increment(state.count))
        gradients, tree = jax.tree.flatten(updates)
        olds = zip(gradients, tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu), strict=True)
        new = []
        for g, m, v in olds:
            # One array after the other: no two of them are in 32 bit at the same time.
            (g, m, v), new[-1:] = jax.lax.optimization_barrier(((g, m, v), new[-1:]))
            new.append(step(g, m, v, count))
        moved, mu, nu = (tree.unflatten([leaf[i] for leaf in new]) for i in range(3))
        return moved, ScaleByAdam8bitState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _correction(decay: float, count: Int32[Array, ""]) -> Float32[Array, ""]:
    """1 - decay^count. As a difference of float32 numbers it would lose four digits at the first steps."""
    rate = math.log(decay) if decay else -math.inf
    return -jnp.expm1(rate * count.astype(jnp.float32))


def _refuse_integers(params: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            where = jax.tree_util.keystr(path)
            raise LoraxError(f"adam8bit: {where} is {leaf.dtype}; wrap the transformation with lorax.optimizer")
