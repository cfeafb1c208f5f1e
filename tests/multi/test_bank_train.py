"""Adapters trained together are adapters trained alone, weights and optimizer state; idle ones do not move a bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bank_toys import adapters, base, close, model, tokens

import lorax
from lorax.errors import LoraxError
from lorax.multi.train import owner, used

STEPS = 20
RATES = {"one": 3e-2, "all": optax.linear_schedule(2e-2, 1e-3, 12), "ends": 5e-3, "idle": 1.0}
DECAY = {"one": 0.0, "all": 0.1, "ends": 0.05, "idle": 0.5}
CLIP = {"one": 1.0, "all": 0.5, "ends": 100.0, "idle": 1.0}


def loss(params, ids, targets, kept):
    """(sum, count) of the cross-entropy over the tokens that count."""
    logits = lorax.lift(model)(params, ids)
    each = optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(each * kept), jnp.sum(kept)


def schedule(step):
    """Who is in the batch: different numbers of examples each, "ends" in every third step only, "idle" never."""
    return np.array([0, 1, 1, -1, 0, 2 if step % 3 == 0 else 1], np.int32)


def batch(step):
    kept = np.random.default_rng([step, 7]).random((6, 5)) < 0.7
    kept[:, 0] = True
    return tokens(6, seed=step), tokens(6, seed=1000 + step), jnp.asarray(kept, jnp.float32)


def separately(made):
    """Each adapter by itself with plain Optax: its own batches, its own optimizer, nothing of ours but lift."""
    out = {}
    for slot, (name, tree) in enumerate(made.items()):
        trained, frozen = lorax.split(tree)
        tx = optax.chain(optax.clip_by_global_norm(CLIP[name]), optax.adamw(RATES[name], weight_decay=DECAY[name]))

        @jax.jit
        def step(trained, state, mine, batch, frozen=frozen, tx=tx):
            def total(trained):
                sums, counts = jax.vmap(lambda *e: loss(lorax.join(trained, frozen), *e))(*batch)
                return jnp.sum(sums * mine) / jnp.sum(counts * mine)

            value, grads = jax.value_and_grad(total)(trained)
            with jax.numpy_dtype_promotion("standard"):
                moved, state = tx.update(grads, state, trained)
            return optax.apply_updates(trained, moved), state, value

        state, losses, count = tx.init(trained), [], 0
        for i in range(STEPS):
            mine = schedule(i) == slot
            if mine.any():
                trained, state, value = step(trained, state, jnp.asarray(mine, jnp.float32), batch(i))
                losses.append((i, float(value)))
                count += 1
        out[name] = (trained, state, losses, count)
    return out


def test_together_is_each_alone():
    params = base()
    made = adapters(params)
    start = lorax.attach(params, lorax.stack(made, capacity=5, total_rank=24))
    rates = {key: dict(value) for key, value in (("rates", RATES), ("decay", DECAY), ("clip", CLIP))}
    tx = lorax.bank_optimizer(optax.adamw, start, rates["rates"], clip=rates["clip"], weight_decay=rates["decay"])
    step = jax.jit(lorax.bank_step(loss, tx))
    bank, state, seen = start, tx.init(start), []
    for i in range(STEPS):
        bank, state, losses = step(bank, state, schedule(i), *batch(i))
        seen.append(np.asarray(losses))
    assert step._cache_size() == 1
    alone = separately(made)
    assert state.count.tolist() == [alone[name][3] for name in made] + [0]
    assert [len(losses) for _, _, losses, _ in alone.values()] == [20, 20, 7, 0]
    for slot, (name, (trained, own, losses, _)) in enumerate(alone.items()):
        got = lorax.split(lorax.unstack(lorax.extract(bank), name))[0]
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(trained), strict=True):
            close(x, y)
        for i, value in losses:
            close(seen[i][slot], value)
        assert all(np.isnan(seen[i][slot]) for i in range(STEPS) if i not in dict(losses))
        check_state(state, bank, slot, own)
    # "idle" has the largest rate and decay, and no example: the very same bits, state included.
    for x, y in zip(*(jax.tree.leaves(lorax.unstack(lorax.extract(b), "idle")) for b in (bank, start)), strict=True):
        assert np.array_equal(x, y)
    adapter_size = sum(x.size for x in jax.tree.leaves(lorax.split(start)[0]))
    rows = sum(2 * leaf.total for leaf in jax.tree.leaves(start, is_leaf=is_bank) if is_bank(leaf))
    assert sum(x.size for x in jax.tree.leaves(state)) <= 2 * adapter_size + 2 * rows + 5
    # A new tenant of a slot starts from nothing; the others keep what they have.
    fresh = lorax.reset_adapter(state, bank, "one", tx)
    assert fresh.count.tolist() == [0, *state.count.tolist()[1:]]
    check_state(fresh, bank, 1, alone["all"][1])
    mine = np.asarray(owner(bank["layers"]["q"])) == 0
    assert not any(np.asarray(x)[mine].any() for x in jax.tree.leaves(fresh.rows["layers/q"]))


def is_bank(leaf):
    return isinstance(leaf, lorax.Bank)


def adam_of(state):
    """The part of an Optax state that holds Adam's moments."""
    has = lambda node: hasattr(node, "mu")  # noqa: E731
    return next(node for node in jax.tree.leaves(state, is_leaf=has) if has(node))


def check_state(state, bank, slot, own):
    """An adapter's rows of the moments against those of its own run."""
    adam = adam_of(own)
    for path, leaf in (("embed", bank["embed"]), *((f"layers/{k}", v) for k, v in bank["layers"].items())):
        mine = np.asarray(owner(leaf)) == slot
        if not mine.any():
            continue
        for moment in ("mu", "nu"):
            tree = getattr(adam, moment)
            wanted = tree["embed"] if path == "embed" else tree["layers"][path.split("/")[1]]
            s = len(leaf.axes.stack)
            for factor, axis in (("A", -1), ("B", s)):
                row_state = state.rows[path][factor]
                rows = next(
                    x for x in jax.tree.leaves(row_state, is_leaf=lambda n: hasattr(n, "mu")) if hasattr(x, "mu")
                )
                want = np.moveaxis(np.asarray(getattr(wanted, factor)), axis, 0)
                close(np.asarray(getattr(rows, moment))[mine], want)


def test_whose_row_is_whose():
    params = base()
    made = adapters(params)
    bank = lorax.remove_adapter(lorax.stack(made, total_rank=20), "all")
    assert owner(bank["layers"]["q"]).tolist() == [0, -1, -1, -1, 3, 3, *[-1] * 14]
    assert owner(bank["layers"]["up"]).tolist() == [*[-1] * 3, *[2] * 8, *[-1] * 9]
    assert used(jnp.array([[2, -1], [0, 2]]), 4).tolist() == [True, False, True, False]


def test_what_an_optimizer_asks_for():
    params = base()
    made = {k: v for k, v in adapters(params).items() if k in ("one", "idle")}
    bank = lorax.attach(params, lorax.stack(made))
    with pytest.raises(LoraxError, match="learning_rate says nothing about the adapter 'idle'"):
        lorax.bank_optimizer(optax.adam, bank, {"one": 1.0})
    with pytest.raises(LoraxError, match="holds no bank"):
        lorax.bank_optimizer(optax.adam, params, 1.0)
    also = dict(bank, embed=lorax.Full(params["embed"]))
    with pytest.raises(LoraxError, match="embed trains and is in no bank"):
        lorax.bank_optimizer(optax.adam, also, 1.0)
    tx = lorax.bank_optimizer(optax.adam, bank, 1.0)
    with pytest.raises(LoraxError, match="needs the tree and the ids"):
        tx.update(bank, tx.init(bank), bank)
