"""A bank on a mesh of eight devices: what one device computes, and on the wire rows of adapters, never the bank."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lorax
from lorax.multi import bank_state_shardings
from lorax.plan.hlo import collectives
from lorax.sharding import shard

pytestmark = pytest.mark.optimised

# No size is another's, nor a total rank's.
D, F, LAYERS, ROWS, LENGTH = 40, 72, 3, 8, 5
RANKS = (1, 4, 3, 2, 4, 2, 1, 3, 4, 2, 2, 4)  # 32 rows in all: four or sixteen on a device, adapters across the cuts
MESHES = {"adapter": {"adapter": 8}, "data": {"data": 8}, "both": {"data": 2, "model": 4}}
IDS = np.array([3, -1, 4, 4, 11, 0, 7, 9], np.int32)


def model(params, x):
    def block(x, w):
        h = jnp.tanh(x @ w["up_proj"]["kernel"])
        return x + h @ w["down_proj"]["kernel"], None

    return jax.lax.scan(jax.checkpoint(block), x, params["layers"])[0]


def tree(count=12):
    draw = np.random.default_rng(0).standard_normal
    n = lambda *shape: jnp.asarray(0.2 * draw(shape), jnp.float32)  # noqa: E731
    base = {"layers": {"up_proj": {"kernel": n(LAYERS, D, F)}, "down_proj": {"kernel": n(LAYERS, F, D)}}}
    x = jax.ShapeDtypeStruct((LENGTH, D), jnp.float32)
    made = []
    for i in range(count):
        spec = lorax.LoraSpec(rank=RANKS[i % len(RANKS)], alpha=4.0 + i % 5)
        trained, frozen = lorax.split(lorax.adapt(jax.random.key(i), base, spec, fn=model, args=(x,)))
        made.append(lorax.join(jax.tree.map(lambda x: x + n(*x.shape), trained), frozen))
    return lorax.attach(base, lorax.stack(made))


def batch():
    draw = np.random.default_rng(1).standard_normal
    return tuple(jnp.asarray(draw((ROWS, LENGTH, D)), jnp.float32) for _ in range(2))


def loss(params, x, y):
    return jnp.mean((lorax.lift(model)(params, x) - y) ** 2)


def program(params, mesh=None):
    """(compiled step, its arguments)."""
    # Momentum, not Adam: a first step that divides by the gradient's own size would show rounding as a difference.
    tx = lorax.bank_optimizer(optax.sgd, params, 0.1, momentum=0.9)
    ids, data, over = jnp.asarray(IDS), batch(), None
    if mesh is not None:
        params = shard(params, mesh)
        over = tuple(name for name in mesh.axis_names if name == "data") or None
        rows = NamedSharding(mesh, P(over))
        ids, data = jax.device_put((ids, data), rows)
    state = tx.init(params)
    if mesh is not None:
        state = jax.device_put(state, bank_state_shardings(state, params, mesh))
    step = jax.jit(lorax.bank_step(loss, tx, over=over))
    return step.lower(params, state, ids, *data).compile(), (params, state, ids, *data)


def make_mesh(name):
    sizes = MESHES[name]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))


@pytest.fixture(scope="module")
def alone():
    step, args = program(tree())
    return step(*args)


@pytest.mark.parametrize("name", MESHES)
def test_a_step_is_that_of_one_device_and_the_bank_stays_where_it_is(name, alone):
    step, args = program(tree(), make_mesh(name))
    bank = args[0]["layers"]["up_proj"]["kernel"]
    split = {"adapter": P(None, "adapter", None), "data": P(None, "data", None), "both": P(None, "data", None)}[name]
    assert bank.A.sharding.spec == split
    params, state, losses = step(*args)
    want_params, want_state, want_losses = alone
    np.testing.assert_allclose(losses, want_losses, rtol=2e-5)
    trained = lambda tree: jax.tree.leaves(lorax.split(tree)[0])  # noqa: E731
    for got, want in zip(trained(params), trained(want_params), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(want_state), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * max(1.0, np.abs(want).max()))
    # Idle adapters keep every bit, on a mesh too.
    idle = [i for i in range(len(RANKS)) if i not in IDS]
    for i in idle:
        for path in (("up_proj", "A"), ("down_proj", "B")):
            before, after = (getattr(tree["layers"][path[0]]["kernel"], path[1]) for tree in (args[0], params))
            mine = slice(int(bank.start[i]), int(bank.start[i] + bank.rank[i]))
            np.testing.assert_array_equal(np.asarray(before)[:, mine], np.asarray(after)[:, mine])


@pytest.mark.parametrize("name", ["adapter", "data"])
def test_what_crosses_the_wire_does_not_grow_with_the_bank(name):
    seen = []
    # Banks that are larger than what a batch fetches; a smaller one a compiler may rather gather.
    for count in (48, 96):
        step, args = program(tree(count), make_mesh(name))
        found = collectives(step.as_text(), 8)
        seen.append(sum(one.times * one.bytes for one in found))
        total = args[0]["layers"]["up_proj"]["kernel"].total
        fetched = ROWS * max(RANKS) * F
        whole = [one for one in found if any(total in dims and set(dims) & {D, F} for _, dims in one.shapes)]
        assert not whole, whole
        assert all(one.elements <= max(fetched, ROWS * LENGTH * F, D * F) for one in found), found
    small, large = seen
    assert large <= 1.02 * small + 4 * 96 * 8, (small, large)
