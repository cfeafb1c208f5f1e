"""A training step on a mesh of eight devices: what one device computes, and nothing on the wire that need not be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lorax
from lorax.models import Model, ModelConfig
from lorax.plan.hlo import collectives
from lorax.sharding import batch_axes, follow, shard, shardings
from lorax.train.objective import language_model_loss
from lorax.train.step import init_state, make_step

pytestmark = pytest.mark.optimised

D, F, VOCAB, LAYERS = 256, 512, 136, 3
CONFIG = ModelConfig("llama", VOCAB, D, F, LAYERS, num_heads=8, num_kv_heads=8, head_dim=32)
ROWS, LENGTH = 8, 6
MESHES = {"fsdp": {"data": 8}, "tensor": {"model": 8}, "both": {"data": 2, "model": 4}}
IDS = (jax.ShapeDtypeStruct((1, 4), jnp.int32),)


def make_mesh(name):
    sizes = MESHES[name]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(jax.sharding.AxisType.Auto,) * len(sizes))


def draw(tree, seed=0):
    """Every array drawn: a zero B, or norms of ones, would hide errors."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(0.08 * rng.normal(size=x.shape), x.dtype), tree)


@pytest.fixture(scope="module")
def model():
    abstract = Model.abstract(CONFIG, remat=True)
    return dataclasses.replace(abstract, params=draw(abstract.params))


def adapted(model, quantised, rank=4):
    params = model.params
    if quantised:
        params = lorax.quantize(params, fn=model.apply, args=IDS)
    params = lorax.adapt(jax.random.key(0), params, lorax.LoraSpec(rank=rank), fn=model.apply, args=IDS)
    trainable, frozen = lorax.split(params)
    return lorax.join(draw(trainable, 1), frozen)


def batch():
    rng = np.random.default_rng(2)
    shape = (1, ROWS, LENGTH)
    ids = jnp.asarray(rng.integers(0, VOCAB, shape), jnp.int32)
    weights = jnp.asarray(rng.random(shape) > 0.4, jnp.float32)
    ones = jnp.ones(shape, jnp.int32)
    return {"ids": ids, "targets": (ids + 1) % VOCAB, "weights": weights, "positions": None, "segment_ids": ones}


def compiled(model, params, mesh=None):
    """(program, its arguments) of one step; on a mesh if there is one."""
    tx = optax.sgd(0.3)
    groups, inputs = 1, batch()
    if mesh is not None:
        params = shard(params, mesh)
        rows = batch_axes(mesh.axis_names)
        groups = int(np.prod([mesh.shape[name] for name in rows]))
        tensor = "model" if "model" in mesh.axis_names else None
        model = dataclasses.replace(model, stream=NamedSharding(mesh, P(rows or None, tensor)))
        inputs = jax.device_put(inputs, NamedSharding(mesh, P(None, rows or None)))
    trainable, frozen = lorax.split(params)
    state = init_state(trainable, tx, 0)
    if mesh is not None:
        state = jax.device_put(state, follow(state, trainable, shardings(trainable, mesh), mesh))
    loss = language_model_loss(dataclasses.replace(model, params={}), head_trains=False, chunk=5, groups=groups)
    step = make_step(loss, tx)
    return step.lower(state, frozen, inputs).compile(), (state, frozen, inputs)


@pytest.fixture(scope="module")
def one_device(model):
    """Trainable halves after a step on one device, plain base and quantised."""
    results = {}
    for quantised in (False, True):
        program, args = compiled(model, adapted(model, quantised))
        state, metrics = program(*args)
        results[quantised] = jax.tree.map(np.asarray, (state.trainable, metrics.loss))
    return results


CASES = [("fsdp", False), ("tensor", False), ("both", True)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{'nf4' if case[1] else 'plain'}")
def case(request, model):
    name, quantised = request.param
    mesh = make_mesh(name)
    program, args = compiled(model, adapted(model, quantised), mesh)
    return name, quantised, program, args, collectives(program.as_text(), 8)


def test_a_step_gives_what_one_device_gives(case, one_device):
    _, quantised, program, args, _ = case
    state, metrics = program(*args)
    want, loss = one_device[quantised]
    np.testing.assert_allclose(float(metrics.loss), loss, rtol=2e-6)
    for got, exact in zip(jax.tree.leaves(state.trainable), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(got), exact, rtol=0, atol=2e-6 * max(1.0, np.abs(exact).max()))


def test_the_wire_carries_no_more_than_it_must(case):
    name, quantised, _, args, found = case
    state = args[0]
    assert found, "a step on a mesh must communicate"
    trained = sum(x.size for x in jax.tree.leaves(state.trainable))
    largest = max(x.size for x in jax.tree.leaves(state.trainable))
    activations = ROWS * LENGTH * max(D, VOCAB)
    for one in found:
        if one.kind in ("all-reduce", "reduce-scatter"):
            # Sums of activations, of adapters' gradients (all at once at most) and scalars: none of a frozen weight.
            assert one.elements <= max(activations, largest), one
            assert sum(int(np.prod(dims)) for _, dims in one.shapes) <= max(4 * activations, 2 * trained), one
        for dtype, dims in one.shapes:
            if name == "tensor":
                assert np.prod(dims) <= max(activations, largest), f"{one}: a weight moves under tensor parallelism"
            # One layer at a time; of the quantised ones, codes and their scales, never values.
            size = int(np.prod(dims))
            assert size <= max(D * F, D * VOCAB, activations), f"{one}: more than a layer's weight"
            if quantised and one.kind == "all-gather" and size >= D * D // 2 and size not in (D * VOCAB,):
                assert dtype in ("u8", "s32") or size <= activations, f"{one}: gathered as values"


def test_adding_lora_to_tensor_parallelism_adds_terms_in_r_alone(model):
    mesh = make_mesh("tensor")
    seen = {}
    for rank in (None, 4, 8):
        params = model.params if rank is None else adapted(model, False, rank)
        params = shard(params, mesh)
        inner = dataclasses.replace(model, params={}, stream=NamedSharding(mesh, P(None, "model")))
        ids = jnp.zeros((2, 5), jnp.int32)
        program = jax.jit(lorax.lift(inner.hidden)).lower(params, ids).compile()
        seen[rank] = sum(one.times * one.bytes for one in collectives(program.as_text(), 8))
    rows, matrices = 2 * 5, 7
    for rank in (4, 8):
        # One sum of x A over the devices for each matrix: rows x r values.
        assert seen[rank] - seen[None] == LAYERS * matrices * 2 * 7 / 8 * rows * rank * 4
    assert seen[None] > 0
