"""What a function may do with a weight before it uses it up: each against the merged weight, values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bank_toys import close
from jax import lax

import lorax
from lorax.errors import LoraxError

USES = {
    "transposed twice": lambda w, x: x @ w[0].T.T,
    "other factor first": lambda w, x: jnp.tanh(x @ w[0]) @ w[1].T,
    "on the left": lambda w, x: w[0].T @ x.T,
    "reshaped": lambda w, x: jnp.einsum("tk,khd->htd", x, w[0].reshape(10, 2, 7)),
    "reshaped there and back": lambda w, x: x @ w[1].reshape(10, 2, 7).reshape(10, 14),
    "some columns": lambda w, x: x @ w[0][:, 3:11:2],
    "some rows": lambda w, x: x[:, :6] @ w[1][:6],
    "some layers": lambda w, x: jnp.einsum("ti,lij->tlj", x, w[1:]),
    "one layer by a traced number": lambda w, x: x @ lax.dynamic_index_in_dim(w, jnp.argmax(x[0]) % 3, 0, False),
    "a traced part": lambda w, x: x @ lax.dynamic_slice(w[0], (0, jnp.argmax(x[0])), (10, 4)),
    "split": lambda w, x: sum(jnp.sum(x @ part, 1) * n for n, part in enumerate(jnp.split(w[2], [5, 9], axis=1))),
    "batched": lambda w, x: jnp.einsum("lti,lij->ltj", jnp.stack([x, 2 * x, x + 1]), w),
    "scaled": lambda w, x: x @ (2.0 * w[0]) + x @ (-w[1]) + x @ (w[2] / 4.0),
    "a new axis": lambda w, x: jnp.einsum("ti,uij->tuj", x, w[0][None]),
    "scanned": lambda w, x: lax.scan(lambda h, v: (jnp.tanh(h @ v @ v.T), None), x, w)[0],
    "scanned in reverse": lambda w, x: lax.scan(lambda h, v: (jnp.tanh(h @ v @ v.T), None), x, w, reverse=True)[0],
    "in a branch": lambda w, x: lax.cond(x[0, 0] > 0, lambda v: x @ v[0], lambda v: x @ v[1], w),
    "in a loop": lambda w, x: lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ w[0] @ w[1].T), x),
    "stopped": lambda w, x: x @ lax.stop_gradient(w[0]) + x @ w[1],
    "rows by index": lambda w, x: jnp.take(w[1].T, jnp.argsort(x[:, 0]), axis=0) @ x.T,
}
IDS = np.array([0, -1, 1, 1], np.int32)


def make():
    draw = np.random.default_rng(0).standard_normal
    n = lambda *shape: jnp.asarray(draw(shape) * 0.3, jnp.float32)  # noqa: E731
    base = {"w": n(3, 10, 14)}
    axes = lorax.Axes((0,), (1,), (2,))
    made = {
        name: {"w": lorax.LowRank(base["w"], n(3, 10, r), n(3, r, 14), jnp.asarray([1.0, 0.5, 2.0]), axes)}
        for name, r in (("one", 1), ("two", 6))
    }
    return base, made, lorax.attach(base, lorax.stack(made)), n(4, 5, 10)


def test_every_use_of_a_weight():
    base, made, bank, xs = make()
    factors = [made[name]["w"] for name in made]
    trained, frozen = lorax.split(bank)

    def mixed(trained, use, xs):
        params = lorax.join(trained, frozen)
        apply = lorax.lift(lambda p, x: use(p["w"], x))
        return jax.vmap(lambda i, x: apply(lorax.select(params, i), x))(jnp.asarray(IDS), xs)

    @jax.jit
    def ours(trained, xs):
        def total(trained):
            outs = {name: mixed(trained, use, xs) for name, use in USES.items() if use is not USES["in a loop"]}
            return sum(jnp.sum(jnp.sin(out)) for out in outs.values()), outs

        grads, outs = jax.grad(total, has_aux=True)(trained)
        outs["in a loop"] = mixed(trained, USES["in a loop"], xs)
        return outs, grads

    @jax.jit
    def theirs(factors, xs):
        def weights(factors):
            return [lorax.merge({"w": f})["w"] for f in factors] + [base["w"]]

        def total(factors):
            w = weights(factors)
            outs = {n: jnp.stack([use(w[i], x) for i, x in zip(IDS, xs, strict=True)]) for n, use in USES.items()}
            return sum(jnp.sum(jnp.sin(out)) for n, out in outs.items() if n != "in a loop"), outs

        return jax.grad(total, has_aux=True)(factors)

    outs, grads = ours(trained, xs)
    wanted, want = theirs(factors, xs)
    for name in USES:
        close(outs[name], want[name], 2e-5)
    whole = lorax.join(grads, frozen)
    for name, f in zip(made, wanted, strict=True):
        got = lorax.unstack(whole, name)["w"]
        close(got.A, f.A, 2e-5)
        close(got.B, f.B, 2e-5)


def test_what_is_no_use_of_a_bank_says_so_or_builds_the_weight():
    base, made, bank, xs = make()
    use = lambda p, x: x @ jnp.tanh(p["w"][1])  # noqa: E731
    with pytest.raises(LoraxError, match="w: a structured weight reaches the primitive `tanh`"):
        lorax.lift(use)(lorax.select(bank, 0), xs[0])
    built = lorax.lift(use, on_unsupported="materialize")
    out = jax.jit(jax.vmap(lambda i, x: built(lorax.select(bank, i), x)))(jnp.asarray(IDS), xs)
    merged = [lorax.merge(made["one"]), lorax.merge(made["two"]), base]
    close(out, np.stack([use(merged[i], x) for i, x in zip(IDS, xs, strict=True)]))
    for wrong in (
        lambda p, x: x @ p["w"][0].reshape(14, 10)[:10],
        lambda p, x: jnp.einsum("ti,lij->tj", x, p["w"]),
        lambda p, x: x @ jnp.stack([p["w"][0]] * 2)[0],
    ):
        with pytest.raises(LoraxError, match=r"^w: a structured weight reaches"):
            lorax.lift(wrong)(lorax.select(bank, 0), xs[0])
