"""Many adapters in one product: every plain implementation against float64, derivatives, batching, isolation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax_kernels import Shapes, dispatch, explain, force
from lorax_kernels.multi_lora import Segments, cases, grouped, multi_lora, segments
from lorax_kernels.multi_lora.cases import ODD

PLAIN = [row.name for row in dispatch.backends("multi_lora") if not row.platforms]


def exact(case, table, ids, x, a, b, y):
    """The definition in float64, adapter by adapter."""
    x, a, b, out = (np.asarray(z, np.float64) for z in (x, a, b, y))
    out = out.copy()
    for g, i in enumerate(np.asarray(ids)):
        if i >= 0:
            rows = slice(int(table.start[i]), int(table.start[i] + table.rank[i]))
            out[g] += float(table.scale[i]) * (x[g] @ a[rows].T) @ b[rows]
    return out


def exact_grads(case, table, ids, x, a, b, c):
    """The cotangent `c` pulled back to x, a, b and the weights, in float64."""
    x, a, b, c = (np.asarray(z, np.float64) for z in (x, a, b, c))
    dx, da, db, dw = np.zeros_like(x), np.zeros_like(a), np.zeros_like(b), np.zeros(case.groups)
    for g, i in enumerate(np.asarray(ids)):
        if i >= 0:
            rows = slice(int(table.start[i]), int(table.start[i] + table.rank[i]))
            s, h, u = float(table.scale[i]), x[g] @ a[rows].T, c[g] @ b[rows].T
            dx[g] = s * u @ a[rows]
            da[rows] += s * u.T @ x[g]
            db[rows] += s * h.T @ c[g]
            dw[g] = np.sum(h * u)
    return c, dx, da, db, dw


def close(got, want, tolerance=1e-5):
    want = np.asarray(want, np.float64)
    assert np.abs(np.asarray(got, np.float64) - want).max() <= tolerance * max(np.abs(want).max(), 1e-30)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("case", ODD, ids=lambda case: case.name)
def test_value_and_gradients_against_float64(name, case):
    gap = 2
    table, ids = cases.table(case.ranks, gap), cases.ids(case)
    x, a, b, y = cases.arrays(case, gap)
    c = jax.random.normal(jax.random.key(7), y.shape)
    # Rows that belong to nobody hold what would spread if it were touched.
    free = np.ones(a.shape[0], bool)
    for start, rank in zip(table.start, table.rank, strict=True):
        free[int(start) : int(start + rank)] = False
    a, b = (jnp.where(free[:, None], jnp.nan, z) for z in (a, b))
    where = segments(table, ids)

    def op(y, x, a, b, weight):
        return grouped(x, a, b, Segments(where.a_start, where.b_start, where.rank, weight), max(case.ranks), y)

    @jax.jit
    def both(*args):
        out, pull = jax.vjp(op, *args)
        return out, pull(c)

    with force(name):
        out, grads = both(y, x, a, b, where.weight)
    close(out, exact(case, table, ids, x, a, b, y))
    clean = [jnp.where(free[:, None], 0.0, z) for z in (a, b)]
    for got, want in zip(grads, exact_grads(case, table, ids, x, *clean, c), strict=True):
        close(got, want)
    unused = [i for i in range(len(case.ranks)) if i not in np.asarray(ids)]
    for i in unused:
        rows = slice(int(table.start[i]), int(table.start[i] + table.rank[i]))
        assert not np.asarray(grads[2][rows]).any()
        assert not np.asarray(grads[3][rows]).any()


@pytest.mark.parametrize("name", PLAIN)
def test_one_example_mapped_is_one_call_for_the_batch(name):
    case = ODD[0]
    table, ids = cases.table(case.ranks), cases.ids(case)
    x, a, b, y = cases.arrays(case)

    def one(i, x, a, b):
        return multi_lora(x, a, b, table, i[None], max(case.ranks))

    def loss(a, b):
        out = jax.vmap(one, (0, 0, None, None))(ids, x, a, b)
        return jnp.sum(jnp.sin(out)), out

    def own(i, x, a, b):
        """One example's own gradient."""
        return jax.grad(lambda a, b: jnp.sum(jnp.sin(one(i, x, a, b))), (0, 1))(a, b)

    @jax.jit
    def everything(a, b):
        grads, out = jax.grad(loss, (0, 1), has_aux=True)(a, b)
        return (
            out,
            grads,
            jax.vmap(own, (0, 0, None, None))(ids, x, a, b),
            jax.hessian(lambda s: loss(s * a, b)[0])(1.0),
        )

    with force(name):
        program = str(jax.make_jaxpr(jax.vmap(one, (0, 0, None, None)))(ids, x, a, b))
        out, grads, per_example, curvature = everything(a, b)
    assert program.count(" = multi_lora[") == 1
    want = exact(case, table, ids, x, a, b, 0 * y)
    close(out, want)
    _, _, da, db, _ = exact_grads(case, table, ids, x, a, b, np.cos(want))
    for got, whole, wanted in zip(grads, per_example, (da, db), strict=True):
        close(got, wanted)
        # Each example's gradient is its own, and they add up to the batch's.
        assert whole.shape == (case.groups, *got.shape)
        close(whole.sum(0), wanted)
        assert not np.asarray(whole[2]).any(), "the base alone has no gradient"
    # d2/ds2 sum sin(s y) at s = 1.
    close(curvature, -np.sum(want**2 * np.sin(want)), 1e-4)


@pytest.mark.parametrize("name", PLAIN)
def test_mapped_factors_and_shared_adapter(name):
    """vmap over banks (a sweep), and over rows with one adapter for all."""
    case = ODD[0]
    table, ids = cases.table(case.ranks), cases.ids(case)
    x, a, b, y = cases.arrays(case)
    banks = [jnp.stack([z, 2 * z, z - 1]) for z in (a, b)]
    top = max(case.ranks)

    @jax.jit
    def run(banks, x, y):
        over_banks = jax.vmap(lambda a, b: grouped(x, a, b, segments(table, ids), top, y))(*banks)
        shared = jax.vmap(lambda x: multi_lora(x, a, b, table, jnp.array([3]), top))(x)
        return over_banks, shared

    with force(name):
        over_banks, shared = run(banks, x, y)
    for i in range(3):
        close(over_banks[i], exact(case, table, ids, x, banks[0][i], banks[1][i], y))
    close(shared, exact(case, table, np.full(case.groups, 3), x, a, b, 0 * y))


def test_bfloat16_rounds_the_activations_alone():
    case = ODD[0]
    table, ids = cases.table(case.ranks), cases.ids(case)
    x, a, b, y = cases.arrays(case)
    half = x.astype(jnp.bfloat16)
    for name in PLAIN:
        with force(name):
            out = jax.jit(lambda x, y: grouped(x, a, b, segments(table, ids), max(case.ranks), y))(half, y)
        assert out.dtype == y.dtype
        close(out, exact(case, table, ids, half, a, b, y), 2e-2)


def test_rows_are_shared_out_among_the_ids():
    table, ids = cases.table((1, 3)), jnp.array([1, -1, 0])
    x, a, b, _ = cases.arrays(ODD[0]._replace(groups=1, rows=6, ranks=(1, 3)))
    out = multi_lora(x[0], a, b, table, ids, 3)
    close(out, multi_lora(x[0], a, b, table, jnp.array([1, 1, -1, -1, 0, 0]), 3))
    assert not np.asarray(out[2:4]).any()
    with pytest.raises(ValueError, match="6 rows cannot be shared out among ids of shape"):
        multi_lora(x[0], a, b, table, jnp.zeros(4, jnp.int32), 3)
    with pytest.raises(ValueError, match="do not fit"):
        grouped(x, a[:, :3], b, segments(table, ids), 3)


def test_the_table_says_why():
    few = explain("multi_lora", Shapes(32, 576, 576, rank=16, groups=32, total=32), "cpu")
    many = explain("multi_lora", Shapes(2048, 576, 576, rank=64, groups=32, total=25_000), "cpu")
    tokens = explain("multi_lora_grad", Shapes(2048, 576, 576, rank=64, groups=2048, total=25_000), "cpu")
    assert (few.chosen, many.chosen, tokens.chosen) == ("xla_onehot", "xla", "xla_sorted")
    assert "25000 ranks" in many.refused["xla_onehot"]
    assert "tiles as they are" in many.refused["xla_sorted"]
