"""The grouped product's TPU kernels in interpret mode, with race detection, against float64 and fresh random inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from lorax_kernels.multi_lora import cases, pallas_tpu, segments
from lorax_kernels.multi_lora.cases import ODD, Case
from lorax_kernels.multi_lora.pallas_tpu_plan import plan
from lorax_kernels.multi_lora.primitive import Options

pytestmark = pytest.mark.aot

SEED = int(np.random.default_rng().integers(1 << 30))
# Besides the odd ones: several tiles of several adapters; tiles that cut groups or not; an adapter of more than a
# window over several tiles; rows that are put in order.
MORE = [
    Case("tiles", 20, 64, 136, 600, (4, 8, 16, 32, 64)),
    Case("cut groups", 9, 50, 40, 24, (3, 8)),
    Case("whole groups", 7, 48, 40, 24, (3, 8, 20)),
    Case("long", 2, 512, 40, 24, (8, 130)),
    Case("tokens", 300, 1, 72, 40, (100, 3, 64, 17)),
]


def watching():
    return pltpu.InterpretParams(detect_races=True)


def raced():
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter

    return interpreter.races.races_found


def drawn(case, dtype="float32"):
    """The routing, x, a, b, y and dy; rows of the factors that belong to nobody are no numbers."""
    table, ids = cases.table(case.ranks, gap=2), cases.ids(case)
    x, a, b, y = cases.arrays(case, gap=2, seed=SEED, dtype=dtype)
    free = np.ones(a.shape[0], bool)
    for start, rank in zip(table.start, table.rank, strict=True):
        free[int(start) : int(start + rank)] = False
    a, b = (jnp.where(free[:, None], jnp.nan, z.astype(jnp.float32)) for z in (a, b))
    return segments(table, ids), x, a, b, y, jax.random.normal(jax.random.key(SEED), y.shape).astype(y.dtype)


def each(where):
    """(group, its ranks, its weight) of the groups that have an adapter."""
    for g, (start, rank, weight) in enumerate(zip(where.a_start, where.rank, where.weight, strict=True)):
        if rank:
            yield g, slice(int(start), int(start + rank)), float(weight)


def exact(where, x, a, b, y):
    out, (x, a, b) = np.array(y, np.float64), (np.asarray(z, np.float64) for z in (x, a, b))
    for g, mine, weight in each(where):
        out[g] += weight * (x[g] @ a[mine].T) @ b[mine]
    return out


def options(case, dtype="float32", **more):
    return Options(max(case.ranks), jnp.dtype(dtype), None, **more)


def route(where):
    return where.a_start, where.b_start, where.rank, where.weight


def error(got, want):
    return np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()


@pytest.mark.parametrize("case", [*ODD, *MORE], ids=lambda case: case.name)
def test_apply_against_float64(case):
    where, x, a, b, y, _ = drawn(case)
    out = pallas_tpu.apply(y, x, a, b, *route(where), options(case), chip="v5e", interpret=watching())
    assert error(out, exact(where, x, a, b, y)) < 1e-5
    assert not raced()


def test_without_y_and_with_bfloat16():
    """Nothing to add to; 16-bit factors lie in other tiles of memory; rounding is that of x, h and y alone."""
    case = ODD[0]
    where, x, a, b, y, _ = drawn(case, "bfloat16")
    out = pallas_tpu.apply(None, x, a, b, *route(where), options(case, "bfloat16"), chip="v6e", interpret=watching())
    assert out.dtype == jnp.bfloat16
    assert error(out, exact(where, x, a, b, 0 * y)) < 2e-2
    half = [z.astype(jnp.bfloat16) for z in (a, b)]
    out = pallas_tpu.apply(y, x, *half, *route(where), options(case, "bfloat16"), chip="v6e", interpret=watching())
    assert error(out, exact(where, x, *half, y)) < 2e-2
    assert not raced()


def test_one_place_for_what_arrives_where_two_do_not_fit(monkeypatch):
    case = Case("one slot", 3, 20, 40, 24, (3, 8, 150))
    where, x, a, b, y, _ = drawn(case)
    tight = lambda *args: replace_slots(plan(*args))  # noqa: E731
    monkeypatch.setattr(pallas_tpu, "plan", tight)
    out = pallas_tpu.apply(y, x, a, b, *route(where), options(case), chip="v5e", interpret=watching())
    assert error(out, exact(where, x, a, b, y)) < 1e-5
    assert not raced()


def replace_slots(found):
    from dataclasses import replace

    assert found.slots == 2
    return replace(found, slots=1)


# Besides: blocks that end beyond a group's rows, ranks beyond a window, adapters that share a tile of memory.
GRADS = [*ODD, MORE[1], Case("parts", 3, 300, 40, 24, (8, 130)), Case("wide", 4, 20, 1100, 560, (3, 5))]


@pytest.mark.parametrize("case", GRADS, ids=lambda case: case.name)
def test_grad_against_float64(case):
    where, x, _, b, _, dy = drawn(case)
    total = b.shape[0]
    some = options(case, total=total)
    g = pallas_tpu.grad(x, dy, b, *route(where), some, chip="v5e", interpret=watching())
    want, owned = np.zeros((total, case.k)), np.zeros(total, bool)
    for group, mine, weight in each(where):
        u = np.asarray(dy[group], np.float64) @ np.asarray(b[mine], np.float64).T
        want[mine] += weight * u.T @ np.asarray(x[group], np.float64)
        owned[mine] = True
    assert error(g, want) < 1e-5
    assert not np.asarray(g)[~owned].any(), "ranks that no group owns"
    assert not raced()


def test_grad_where_two_runs_meet_in_the_same_ranks():
    """The factor and the result begin at different places, and one of two overlapping adapters is read again."""
    x, dy, b = (
        jax.random.normal(jax.random.key(SEED + i), s) for i, s in enumerate(((3, 16, 40), (3, 16, 24), (9, 24)))
    )
    start, out_start, rank = jnp.array([1, 4, 1]), jnp.array([2, 0, 2]), jnp.array([3, 5, 3])
    some = Options(5, jnp.dtype("float32"), None, False, 7)
    g = pallas_tpu.grad(x, dy, b, start, out_start, rank, jnp.ones(3), some, chip="v5e", interpret=watching())
    want = np.zeros((7, 40))
    for i in range(3):
        mine = slice(int(start[i]), int(start[i] + rank[i]))
        u = np.asarray(dy[i], np.float64) @ np.asarray(b[mine], np.float64).T
        want[int(out_start[i]) : int(out_start[i] + rank[i])] += u.T @ np.asarray(x[i], np.float64)
    assert error(g, want) < 1e-5
    assert not raced()
