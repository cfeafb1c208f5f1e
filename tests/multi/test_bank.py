"""A mixed batch is each example by itself with its merged weight, in value and gradient, against float64."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bank_toys import HEADS, LENGTH, SIZE, WIDTH, adapters, base, close, mixed, model, tokens
from jax.sharding import NamedSharding, PartitionSpec

import lorax
from lorax.errors import LoraxError
from lorax_kernels import force

IDS = np.array([1, -1, 0, 2, 1, 2], np.int32)
COTANGENT = np.random.default_rng(6).standard_normal((len(IDS), LENGTH, 23)).astype(np.float32)


@pytest.fixture(scope="module")
def world():
    params = base()
    made = adapters(params)
    return params, made, lorax.attach(params, lorax.stack(made))


def wide(tree):
    """A tree in float64 (inside enable_x64)."""
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64) if x.dtype == jnp.float32 else x, tree)


def loss(params, ids, xs, cotangent):
    return jnp.sum(jnp.asarray(cotangent) * mixed(params, ids, xs))


def exact(params, made, xs):
    """Values, and the gradient of each adapter over its own examples, in float64 by merged weights."""
    names = list(made)
    with jax.enable_x64(True):
        halves = {name: lorax.split(wide(tree)) for name, tree in made.items()}
        moving = {name: trained for name, (trained, _) in halves.items()}
        still = {name: frozen for name, (_, frozen) in halves.items()}

        def values(moving):
            trees = [lorax.merge(lorax.join(moving[name], still[name])) for name in names] + [wide(params)]
            return jnp.stack([model(trees[i], x) for i, x in zip(IDS, xs, strict=True)])

        def weighted(moving):
            out = values(moving)
            return jnp.sum(jnp.asarray(COTANGENT, jnp.float64) * out), out

        grads, out = jax.jit(jax.grad(weighted, has_aux=True))(moving)
        grads = jax.tree.map(np.asarray, grads)
    return np.asarray(out), {name: grads[name] for i, name in enumerate(names) if i in IDS}


def check_gradient(grads, frozen, want):
    """Each adapter's part of the bank's gradient is its own; one that no example uses has exactly none."""
    whole = lorax.join(grads, frozen)
    for name in lorax.adapter_names(whole):
        mine = jax.tree.leaves(lorax.split(lorax.unstack(lorax.extract(whole), name))[0])
        if name not in want:
            assert not any(np.asarray(x).any() for x in mine)
            continue
        for got, wanted in zip(mine, jax.tree.leaves(want[name]), strict=True):
            close(got, wanted, 2e-5)


def test_storage_is_the_sum_of_the_ranks(world):
    _, made, bank = world
    q, embed = bank["layers"]["q"], bank["embed"]
    assert (q.A.shape, q.B.shape) == ((3, 1 + 3 + 2, WIDTH), (3, 1 + 3 + 2, HEADS * SIZE))
    assert embed.A.shape[0] == 8 + 2
    assert bank["layers"]["k"].B.shape == (3, 3 + 8, HEADS, SIZE)
    trains = lambda tree: sum(x.size for x in jax.tree.leaves(lorax.split(tree)[0]))  # noqa: E731
    assert trains(bank) == sum(map(trains, made.values())) == lorax.report(bank).trainable


def test_values_and_gradients_against_float64(world):
    params, made, bank = world
    xs = tokens(len(IDS))
    values, grads = exact(params, made, xs)
    trained, frozen = lorax.split(bank)

    @jax.jit
    def both(trained, ids, xs):
        out = mixed(lorax.join(trained, frozen), ids, xs)
        return out, jax.grad(lambda t: loss(lorax.join(t, frozen), ids, xs, COTANGENT))(trained)

    out, got = both(trained, IDS, xs)
    close(out, values)
    check_gradient(got, frozen, grads)


def test_over_a_quantised_base(world):
    params, _, _ = world
    packed = lorax.quantize(params, targets=["*/up", "*/down"])
    made = adapters(packed)
    bank = lorax.attach(packed, lorax.stack(made))
    xs = tokens(len(IDS))
    plain = lorax.dequantize(packed)
    values, grads = exact(plain, {k: lorax.attach(plain, lorax.extract(v)) for k, v in made.items()}, xs)
    trained, frozen = lorax.split(bank)

    @jax.jit
    def both(trained, frozen, xs):
        out = mixed(lorax.join(trained, frozen), jnp.asarray(IDS), xs)
        return out, jax.grad(lambda t: loss(lorax.join(t, frozen), jnp.asarray(IDS), xs, COTANGENT))(trained)

    out, got = both(trained, frozen, xs)
    close(out, values)
    check_gradient(got, frozen, grads)


def test_a_neighbour_that_diverged_is_not_seen(world):
    _, made, bank = world
    xs = tokens(len(IDS))
    ids = jnp.asarray(np.where(IDS == 2, -1, IDS))
    broken = dict(made)
    broken["ends"] = jax.tree.map(lambda x: x * jnp.nan if x.dtype == jnp.float32 else x, lorax.extract(made["ends"]))
    run = jax.jit(mixed)
    close(run(lorax.attach(base(), lorax.stack(broken)), ids, xs), np.asarray(run(bank, ids, xs)), 0.0)


def test_by_row_by_block_by_name_and_several_at_once(world):
    """Ids of tokens and of blocks of rows in one flat batch, and a weighted sum, on one weight."""
    params, made, bank = world
    w = {"w": params["layers"]["up"][0]}
    one = lambda name: {"w": jax.tree.map(lambda x: x, lorax.LowRank(w["w"], *_first_layer(made[name])))}  # noqa: E731
    parts = {name: one(name) for name in ("all", "ends")}
    bank = lorax.attach(w, lorax.stack(parts))
    apply = lorax.lift(lambda p, x: x @ p["w"])
    x = jnp.asarray(np.random.default_rng(0).standard_normal((6, 4, WIDTH)), jnp.float32)
    merged = [np.asarray(lorax.merge(parts[n])["w"], np.float64) for n in ("all", "ends")]
    merged.append(np.asarray(w["w"], np.float64))
    ids = np.array([0, -1, 1, 1, 0, 0], np.int32)
    tokens_of = np.random.default_rng(1).integers(-1, 2, (6, 4)).astype(np.int32)
    weights = np.array([0.25, -1.5], np.float32)

    @jax.jit
    def run(x, ids, tokens_of, weights):
        blocks = apply(lorax.select(bank, ids), x.reshape(24, WIDTH)).reshape(6, 4, -1)
        rows = apply(lorax.select(bank, tokens_of), x)
        sum_of = apply(lorax.select(bank, jnp.array([0, 1]), weights), x)
        own_sums = apply(lorax.select(bank, jnp.stack([ids, ids[::-1]], -1), jnp.tile(weights, (6, 1))), x)
        slope = jax.grad(lambda w: jnp.sum(apply(lorax.select(bank, jnp.array([0, 1]), w), x)))(weights)
        return blocks, rows, sum_of, own_sums, slope

    blocks, rows, sum_of, own_sums, slope = run(x, ids, tokens_of, weights)
    wide_x = np.asarray(x, np.float64)
    close(blocks, np.stack([wide_x[g] @ merged[i] for g, i in enumerate(ids)]))
    close(rows, np.einsum("gtk,gtkn->gtn", wide_x, np.stack(merged)[tokens_of]))
    moves = [m - merged[2] for m in merged]
    close(sum_of, wide_x @ (merged[2] + weights[0] * moves[0] + weights[1] * moves[1]))
    own = [merged[2] + weights[0] * moves[i] + weights[1] * moves[j] for i, j in zip(ids, ids[::-1], strict=True)]
    close(own_sums, np.einsum("gtk,gkn->gtn", wide_x, np.stack(own)))
    close(slope, [np.sum(wide_x @ m) for m in moves[:2]])
    close(apply(lorax.select(bank, "ends"), x[0]), wide_x[0] @ merged[1])
    close(apply(lorax.select(bank, None), x[0]), wide_x[0] @ merged[2])
    with pytest.raises(LoraxError, match=r"w: .*ids of shape \(5,\) choose an adapter for each row"):
        apply(lorax.select(bank, jnp.zeros(5, jnp.int32)), x)
    with pytest.raises(LoraxError, match="w: holds the changes of 2 adapters"):
        apply(bank, x)
    with pytest.raises(LoraxError, match="w: a bank without its base computes nothing"):
        apply(lorax.select(lorax.extract(bank), 0), x)


def _first_layer(tree):
    leaf = tree["layers"]["up"]
    return leaf.A[0], leaf.B[0], leaf.scale, lorax.Axes((), (0,), (1,))


@pytest.mark.optimised
def test_the_frozen_product_stays_one_and_the_bank_is_not_copied(world):
    """In the compiler's own program: one dot with W, whatever the batch; nothing of a layer's bank is sliced out."""
    params, made, _ = world
    many = {f"{name} {i}": made[name] for i in range(30) for name in made}
    bank = lorax.attach(params, lorax.stack(many))
    ids = jnp.asarray(np.arange(64) % 120, jnp.int32)
    text = jax.jit(mixed).lower(bank, ids, tokens(64)).compile().as_text()
    dots = re.findall(r"= f32\[([\d,]*)\][^=\n]* dot\(", text)
    # up is (10, 14): its product has 64 * 5 rows at once, and no other product gives 14 columns for a whole batch.
    assert sorted(d for d in dots if d in ("320,14", "64,5,14")) in (["320,14"], ["64,5,14"])
    assert f"f32[64,{WIDTH},14]" not in text
    total = bank["layers"]["up"].total
    assert total == 30 * (3 + 8)
    assert not re.search(rf"f32\[(1,)?{total},{WIDTH}\]\S* (dynamic-slice|copy|fusion|slice)\(", text)


def test_on_a_mesh(world):
    """Examples over eight devices: by sharded jit, and by shard_map, values and gradients."""
    _, _, bank = world
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    ids = jnp.asarray(np.resize(IDS, 8))
    xs, cotangent = tokens(8), jnp.asarray(np.resize(COTANGENT, (8, *COTANGENT.shape[1:])))
    trained, frozen = lorax.split(bank)

    def both(trained, ids, xs, cotangent):
        out = mixed(lorax.join(trained, frozen), ids, xs)
        return out, jax.grad(lambda t: loss(lorax.join(t, frozen), ids, xs, cotangent))(trained)

    # The loop: its carries would not pass the check if they were seen from outside.
    with force("xla"):
        check_on_mesh(mesh, both, trained, ids, xs, cotangent)


def check_on_mesh(mesh, both, trained, ids, xs, cotangent):
    want = jax.jit(both)(trained, ids, xs, cotangent)
    split = NamedSharding(mesh, PartitionSpec("data"))
    got = jax.jit(both)(trained, *(jax.device_put(z, split) for z in (ids, xs, cotangent)))
    d = PartitionSpec("data")
    # Gradients of what every device shares are summed over them by the transpose.
    by_hand = jax.shard_map(
        both, mesh=mesh, in_specs=(PartitionSpec(), d, d, d), out_specs=(d, PartitionSpec()), check_vma=True
    )
    for other in (got, jax.jit(by_hand)(trained, ids, xs, cotangent)):
        for x, y in zip(jax.tree.leaves(other), jax.tree.leaves(want), strict=True):
            close(x, y)


def test_what_does_not_stack(world):
    params, made, bank = world
    with pytest.raises(LoraxError, match="no adapters"):
        lorax.stack({})
    with pytest.raises(LoraxError, match="changes no weight"):
        lorax.stack({"x": params})
    full = lorax.adapt(jax.random.key(0), params, lorax.LoraSpec(targets=(), train_also="embed"))
    with pytest.raises(LoraxError, match="adapter 'x': embed was trained as a whole"):
        lorax.stack({"x": full})
    with pytest.raises(LoraxError, match="capacity=1 is below the 4 adapters"):
        lorax.stack(made, capacity=1)
    with pytest.raises(LoraxError, match="total_rank=9 is below the 1"):
        lorax.stack(made, total_rank=9)
    with pytest.raises(LoraxError, match="embed: is a bank of many adapters"):
        lorax.merge(bank)
    with pytest.raises(LoraxError, match="embed: is adapted already"):
        lorax.adapt(jax.random.key(0), bank, lorax.LoraSpec(targets="*/q"))
    with pytest.raises(LoraxError, match="holds no bank"):
        lorax.select(params, 0)
    with pytest.raises(LoraxError, match="no adapter 'two'; it has one, all, ends, idle"):
        lorax.select(bank, "two")
    with pytest.raises(LoraxError, match="ids run from -1 to 3, not -1 to 4"):
        lorax.select(bank, jnp.array([-1, 4]))
    with pytest.raises(LoraxError, match="names are not known inside a traced function"):
        jax.jit(lambda p: lorax.adapter_ids(p, ["one"]))(bank)
