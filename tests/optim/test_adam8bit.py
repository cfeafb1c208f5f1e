"""8-bit Adam: each step against the equations in float64, against bitsandbytes' golden steps, and as a state."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lorax
from lorax.errors import LoraxError
from lorax.optim import Blockwise, adamw8bit, scale_by_adam8bit
from lorax.train.checkpoint import Checkpoints
from lorax.train.step import init_state
from lorax_kernels.nf4.codebooks import dynamic_map

pytestmark = pytest.mark.optimised

_spec = importlib.util.spec_from_file_location(
    "make_adam8bit", Path(__file__).parents[1] / "golden" / "make_adam8bit.py"
)
assert _spec is not None
assert _spec.loader is not None
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)


def decoded(q, block, signed):
    """A quantised moment in float64, by NumPy: entry by entry, block by block of the flattened array."""
    codes, scales = np.asarray(q.codes).reshape(-1), np.asarray(q.absmax, np.float64).reshape(-1)
    values = dynamic_map(signed).astype(np.float64)
    return (values[codes] * scales[np.arange(codes.size) // block]).reshape(q.codes.shape)


def assert_quantised(q, x, block, signed):
    """`q` is `x` in 8 bit: each block's maximum, and for each value none of the 256 entries is nearer."""
    flat = x.reshape(-1)
    tops = [np.abs(flat[i : i + block]).max() for i in range(0, flat.size, block)]
    np.testing.assert_allclose(np.ravel(q.absmax), tops, rtol=1e-5)
    scale = np.repeat(np.asarray(q.absmax, np.float64).reshape(-1), block)[: flat.size]
    ways = dynamic_map(signed).astype(np.float64)[None, :] * scale[:, None]
    gaps = np.abs(flat[:, None] - ways)
    if not signed:
        gaps[flat > 0, 0] = np.inf  # a second moment that is not zero does not become zero
    chosen = gaps[np.arange(flat.size), np.asarray(q.codes).reshape(-1)]
    # In float32 two entries can be equally near.
    assert (chosen <= gaps.min(1) + 2e-6 * np.abs(flat) + 1e-12 * scale).all()


@pytest.mark.parametrize(("shape", "block"), [((23, 201), 256), ((9, 512), 64), ((4097,), 128)])
def test_each_step_is_the_equation(shape, block):
    """From the state that is there, one step in float64; so that a code on the edge cannot carry on."""
    b1, b2, eps, count = 0.85, 0.98, 1e-6, 0
    random = np.random.default_rng()
    tx = scale_by_adam8bit(b1, b2, eps, block_size=block)
    state = tx.init(jnp.zeros(shape))
    update = jax.jit(tx.update)
    size = 10.0 ** random.uniform(-4, 0, shape)
    for count in range(1, 9):
        g = np.asarray(random.standard_normal(shape) * size, np.float32)
        g[0] = 0
        m = b1 * decoded(state.mu, block, True) + (1 - b1) * g.astype(np.float64)
        v = b2 * decoded(state.nu, block, False) + (1 - b2) * g.astype(np.float64) ** 2
        moved, state = update(jnp.asarray(g), state)
        want = (m / (1 - b1**count)) / (np.sqrt(v / (1 - b2**count)) + eps)
        np.testing.assert_allclose(moved, want, rtol=2e-5, atol=1e-6)
        assert_quantised(state.mu, m, block, True)
        assert_quantised(state.nu, v, block, False)
    assert int(state.count) == count
    assert np.count_nonzero(decoded(state.nu, block, False)) == np.count_nonzero(v)


def test_small_leaves_are_adam_itself():
    params = {"a": jnp.zeros((63, 65)), "b": None, "c": jnp.zeros(())}
    ours, theirs = adamw8bit(0.1, weight_decay=0.01), optax.adamw(0.1, weight_decay=0.01)
    one, two = ours.init(params), theirs.init(params)
    assert not any(isinstance(x, Blockwise) for x in jax.tree.leaves(one, is_leaf=lambda x: isinstance(x, Blockwise)))
    p = q = params
    for seed in range(5):
        g = {"a": jax.random.normal(jax.random.key(seed), (63, 65)), "b": None, "c": jnp.float32(seed - 2)}
        u, one = ours.update(g, one, p)
        with jax.numpy_dtype_promotion("standard"):
            w, two = theirs.update(g, two, q)
        p, q = optax.apply_updates(p, u), optax.apply_updates(q, w)
    # At the first steps Optax's bias correction, a difference of float32 numbers, is good to four digits.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-5), p, q)
    assert p["b"] is None


def test_steps_of_bitsandbytes():
    tx = adamw8bit(make.LEARNING_RATE, weight_decay=make.DECAY, rounding="table")
    params = jnp.asarray(make.start())
    state = tx.init(params)
    for g in make.gradients():
        moved, state = jax.jit(tx.update)(jnp.asarray(g), state, params)
        params = optax.apply_updates(params, moved)
    adam = state[0]
    with np.load(make.PATH) as golden:
        np.testing.assert_allclose(params, golden["steps/last"], rtol=0, atol=3e-6)
        for ours, codes, absmax in ((adam.mu, "state1", "absmax1"), (adam.nu, "state2", "absmax2")):
            # Where a moment lies on the edge between two entries, one rounding decides.
            apart = np.asarray(ours.codes, np.int32) - golden[f"steps/{codes}"]
            assert np.abs(apart).max() <= 1
            assert np.count_nonzero(apart) <= 4
            np.testing.assert_allclose(np.ravel(ours.absmax), golden[f"steps/{absmax}"], rtol=1e-6)


def test_a_row_without_gradients_stands_still():
    """With bitsandbytes' rounding on a CPU it does not: its zeros come back as 2e-5 of their block's maximum."""
    tx = adamw8bit(0.1, rounding="nearest")
    params = jnp.ones((64, 64))
    state = tx.init(params)
    for seed in range(6):
        g = jax.random.normal(jax.random.key(seed), params.shape).at[::2].set(0.0)
        moved, state = tx.update(g, state)
        assert not moved[::2].any()
        assert moved[1::2].all()


def test_a_gradient_that_ends_does_not_explode():
    """A first moment that survives rounding finds a second one under it: every update stays of Adam's size."""
    tx = scale_by_adam8bit()
    sizes = jnp.logspace(-6, 0, 256)
    state = tx.init(jnp.zeros((16, 256)))
    sign = jax.random.rademacher(jax.random.key(3), (16, 256), jnp.float32)
    for step in range(30):
        moved, state = jax.jit(tx.update)(sign * sizes * (1.0 if step < 10 else 0.0), state)
        assert float(jnp.abs(moved).max()) < 40.0


@pytest.mark.parametrize("block", [64, 256])
def test_bytes_of_state(block):
    shapes = {"a": (48, 512), "b": (4, 32, 256), "small": (4095,)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    state = scale_by_adam8bit(block_size=block).init(params)
    large = 48 * 512 + 4 * 32 * 256
    assert sum(x.nbytes for x in jax.tree.leaves(state)) == 2 * large * (1 + 4 / block) + 2 * 4 * 4095 + 4
    least = scale_by_adam8bit(block_size=block, min_size=300).init({"in": jnp.ones(300), "out": jnp.ones(299)})
    assert isinstance(least.mu["in"], Blockwise)
    assert least.mu["out"].dtype == jnp.float32
    odd = scale_by_adam8bit(block_size=block).init(jnp.ones((65, 67)))
    assert sum(x.nbytes for x in jax.tree.leaves(odd)) == 2 * (65 * 67 + 4 * -(-65 * 67 // block)) + 4


def problem(seed):
    """A regression of 64 x 128 weights through a tanh, conditioned over two decades."""
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (256, 64)) * jnp.logspace(-1, 0.5, 64)
    truth = jax.random.normal(keys[1], (64, 128)) / 8
    y = jnp.tanh(x @ truth) + 0.05 * jax.random.normal(keys[2], (256, 128))
    return lambda w: jnp.mean((jnp.tanh(x @ w) - y) ** 2)


def trained(tx, loss, steps):
    @jax.jit
    def step(w, state):
        value, gradient = jax.value_and_grad(loss)(w)
        with jax.numpy_dtype_promotion("standard"):
            moved, state = tx.update(gradient, state, w)
        return optax.apply_updates(w, moved), state, value

    w = jnp.zeros((64, 128))
    state, value = tx.init(w), jnp.inf
    for _ in range(steps):
        w, state, value = step(w, state)
    return float(value)


@pytest.mark.parametrize("rounding", ["nearest", "table"])
def test_it_trains_like_adam_in_32_bit(rounding):
    loss = problem(5)
    rate = optax.linear_schedule(0.03, 0.0, 200)
    want = trained(optax.adamw(rate, weight_decay=1e-3), loss, 200)
    got = trained(adamw8bit(rate, weight_decay=1e-3, rounding=rounding), loss, 200)
    assert want < 0.05 * float(loss(jnp.zeros((64, 128))))
    assert abs(got - want) < 0.03 * want


def test_a_schedule_and_a_decay():
    rates = jnp.array([0.5, 0.25, 0.125])
    tx = adamw8bit(lambda count: rates[count], weight_decay=0.2)
    params = jnp.full((64, 64), 2.0)
    state = tx.init(params)
    for rate in (0.5, 0.25, 0.125):
        moved, state = tx.update(jnp.ones((64, 64)), state, params)
        np.testing.assert_allclose(moved, -rate * (1.0 + 0.2 * params), rtol=1e-4)
        params = optax.apply_updates(params, moved)


def test_updates_have_the_dtype_of_the_gradients():
    tx = adamw8bit(1e-2, weight_decay=0.1)
    params = jnp.ones((64, 128), jnp.bfloat16)
    moved, state = tx.update(jnp.ones_like(params), tx.init(params), params)
    assert moved.dtype == jnp.bfloat16
    assert optax.apply_updates(params, moved).dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype(t) for t in ("uint8", "float32", "int32")}


def adapted():
    params = {"up": jax.random.normal(jax.random.key(1), (300, 200)), "bias": jnp.ones(200)}
    return lorax.adapt(jax.random.key(0), params, lorax.LoraSpec(targets="up", rank=16))


def step_of(tx):
    def loss(params, x):
        return jnp.mean(lorax.lift(lambda p, x: jnp.tanh(x @ p["up"] + p["bias"]))(params, x) ** 2)

    @jax.jit
    def step(trainable, frozen, state, x):
        gradient = jax.grad(lambda t: loss(lorax.join(t, frozen), x))(trainable)
        moved, state = tx.update(gradient, state, trainable)
        return optax.apply_updates(trainable, moved), state

    return step


def test_with_lorax_optimizer_it_holds_what_trains():
    tree = adapted()
    tx = lorax.optimizer(adamw8bit(1e-2, weight_decay=0.01), tree)
    state = tx.init(tree)
    codes = sum(x.size for x in jax.tree.leaves(state) if x.dtype == jnp.uint8)
    assert codes == 2 * 300 * 16  # B has 3,200 elements and stays in float32
    trainable, frozen = lorax.split(tree)
    after, state = step_of(tx)(trainable, frozen, state, jnp.ones((5, 300)))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), after, trainable)
    assert max(jax.tree.leaves(moved)) > 1e-3
    # The whole tree is as good as its trainable half.
    whole, _ = tx.update(jax.tree.map(jnp.ones_like, tree), tx.init(tree), tree)
    assert not jnp.any(whole["bias"])


def test_resume_is_exact_to_the_bit(tmp_path):
    tree = adapted()
    tx = lorax.optimizer(adamw8bit(optax.linear_schedule(1e-2, 0.0, 9), weight_decay=0.01), tree)
    step = step_of(tx)
    trainable, frozen = lorax.split(tree)
    xs = jax.random.normal(jax.random.key(7), (6, 5, 300))
    begun = init_state(trainable, tx, seed=0)
    trainable, state = begun.trainable, begun.opt_state
    for x in xs[:3]:
        trainable, state = step(trainable, frozen, state, x)
    store = Checkpoints(tmp_path / "checkpoints")
    store.save(begun._replace(trainable=trainable, opt_state=state, step=jnp.int32(3)), {})
    restored = store.restore(begun)
    assert restored is not None
    again, state_again = restored.state.trainable, restored.state.opt_state
    for x in xs[3:]:
        trainable, state = step(trainable, frozen, state, x)
        again, state_again = step(again, frozen, state_again, x)
    jax.tree.map(np.testing.assert_array_equal, (again, state_again), (trainable, state))
    assert int(state_again[0].count) == 6
    assert state_again[0].mu["up"].A.codes.any()


def test_sharded_steps_are_the_same():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("a"))
    tx = adamw8bit(1e-2)
    params = {"even": jnp.ones((16, 512)), "odd": jnp.ones((8, 777))}
    sharded = jax.device_put(params, spread)
    one, two = tx.init(params), tx.init(sharded)
    assert two[0].mu["even"].codes.sharding == spread
    update = jax.jit(tx.update)
    for seed in range(3):
        g = jax.tree.map(lambda x, s=seed: jax.random.normal(jax.random.key(s), x.shape), params)
        moved, one = update(g, one)
        moved_too, two = update(jax.device_put(g, spread), two)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), moved, moved_too)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, two)


def test_one_array_after_the_other():
    """Each array waits for the update of the one before it, so that a compiler does not widen all of them at once."""
    tx = scale_by_adam8bit()
    params = {name: jnp.ones((64, 65 + i)) for i, name in enumerate("abc")}
    equations = jax.make_jaxpr(tx.update)(params, tx.init(params)).eqns
    makers = {id(out): i for i, one in enumerate(equations) for out in one.outvars}
    gates = [i for i, one in enumerate(equations) if one.primitive.name == "optimization_barrier"]
    assert len(gates) == 3
    for gate, after in itertools.pairwise(gates):
        sources = {makers[id(x)] for x in equations[after].invars if id(x) in makers}
        assert any(gate < source < after for source in sources)


def test_vmap_runs_several_at_once():
    tx = adamw8bit(1e-2)
    g = jax.random.normal(jax.random.key(0), (3, 64, 100))
    moved, state = jax.vmap(lambda g: tx.update(g, tx.init(g)))(g)
    assert state[0].mu.codes.shape == (3, 64, 100)
    for i in range(3):
        alone, kept = tx.update(g[i], tx.init(g[i]))
        np.testing.assert_allclose(moved[i], alone, rtol=1e-6)
        np.testing.assert_array_equal(state[0].nu.codes[i], kept[0].nu.codes)


@pytest.mark.parametrize(
    ("make_it", "word"),
    [
        (lambda: adamw8bit(1e-3, b1=1.0), "b1=1.0"),
        (lambda: adamw8bit(1e-3, block_size=0), "block_size 0"),
        (lambda: adamw8bit(1e-3, rounding="up"), "'up'"),
        (lambda: adamw8bit(1e-3).init({"a": {"ids": jnp.arange(3)}}), "ids.*int32"),
    ],
)
def test_mistakes_are_named(make_it, word):
    with pytest.raises(LoraxError, match=word):
        make_it()


@pytest.mark.parametrize(("b1", "b2"), [(0.0, 0.999), (0.9, 0.9999)])
def test_first_step_is_the_sign(b1, b2):
    """To seven digits, which takes a bias correction that is no difference of float32 numbers."""
    tx = scale_by_adam8bit(b1=b1, b2=b2, eps=0.0)
    g = jax.random.normal(jax.random.key(2), (64, 128))
    moved, _ = tx.update(g, tx.init(g))
    np.testing.assert_allclose(moved, jnp.sign(g), rtol=2e-6)
