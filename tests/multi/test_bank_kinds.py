"""What goes into a bank as what it equals, what does not, and optimizer state that moves with its rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bank_toys import LENGTH, adapters, base, close, mixed, model, tokens

import lorax
from lorax.errors import LoraxError


def kind(params, variant, seed):
    spec = lorax.LoraSpec(targets=("*/q", "*/down", "*/k"), rank=3, alpha=5.0, variant=variant)
    made = lorax.adapt(jax.random.key(seed), params, spec, model, (jax.ShapeDtypeStruct((LENGTH,), jnp.int32),))
    trained, frozen = lorax.split(made)
    draw = np.random.default_rng(seed).standard_normal
    return lorax.join(jax.tree.map(lambda x: x + jnp.asarray(0.1 * draw(x.shape), x.dtype), trained), frozen)


def test_lora_fa_and_vera_act_as_what_they_equal():
    params = base()
    made = {name: kind(params, name, i) for i, name in enumerate(("lora-fa", "vera", "lora"))}
    bank = lorax.attach(params, lorax.stack(made))
    ids, xs = jnp.array([1, 0, 2, -1]), tokens(4)
    got = jax.jit(mixed)(bank, ids, xs)
    trees = [made["vera"], made["lora-fa"], made["lora"], params]
    for row, (tree, x) in enumerate(zip(trees, xs, strict=True)):
        close(got[row], jax.jit(model)(lorax.merge(tree), x))
    room = lorax.stack({"lora": made["lora"]}, capacity=2, total_rank=6)
    assert lorax.adapter_names(lorax.add_adapter(room, "vera", made["vera"])) == ["lora", "vera"]


def test_what_a_bank_cannot_hold_says_why():
    params = base()
    with pytest.raises(LoraxError, match=r"adapter 'd': layers/.* is a DoRA change, which scales"):
        lorax.stack({"d": kind(params, "dora", 1)})
    spec = lorax.LoraSpec(targets="*/q", rank=1, train_also="*/up")
    whole = lorax.adapt(jax.random.key(0), params, spec)
    with pytest.raises(LoraxError, match=r"layers/up was trained as a whole .* merge this adapter"):
        lorax.stack({"w": whole})


def loss(params, ids, targets):
    logits = lorax.lift(model)(params, ids)
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, targets))


def test_compaction_moves_the_optimizer_state_as_well():
    """Trained, with a hole, compacted or not, trained on: the same adapters."""
    params = base()
    bank = lorax.attach(params, lorax.stack(adapters(params)))
    tx = lorax.bank_optimizer(optax.adamw, bank, 3e-2, weight_decay=0.1)
    step = jax.jit(lorax.bank_step(loss, tx))
    ids, state = jnp.array([1, 2, 3, 1]), tx.init(bank)
    for i in range(3):
        bank, state, _ = step(bank, state, ids, tokens(4, i), tokens(4, 9 + i))
    holed = lorax.remove_adapter(bank, "one")
    moved, moved_state = lorax.compact_bank(holed, state)
    assert moved["layers"]["q"].start.tolist() != holed["layers"]["q"].start.tolist()
    ends = []
    for tree, kept in ((holed, state), (moved, moved_state)):
        trained = step(tree, kept, ids, tokens(4, 20), tokens(4, 21))[0]
        ends.append([lorax.split(lorax.unstack(trained, name))[0] for name in ("all", "ends", "idle")])
    for got, want in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
