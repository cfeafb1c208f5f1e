"""The grouped product's Triton kernels against float64, in Triton's interpreter: values and gradients of odd cases."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lorax_kernels.multi_lora import cases, segments, triton_gpu, triton_kernels
from lorax_kernels.multi_lora.cases import ODD, Case
from lorax_kernels.multi_lora.tiles import tiles
from lorax_kernels.multi_lora.triton_plan import plan

pytestmark = pytest.mark.aot

LAUNCH = ("num_warps", "num_stages")
# Besides the odd ones: parts of K, several tiles of an adapter and several blocks of ranks, one row a group.
MORE = [
    Case("parts", 5, 3, 1100, 70, (4, 9, 16)),
    Case("tokens", 300, 1, 72, 136, (100, 3, 64, 17)),
    Case("one adapter", 3, 150, 40, 24, (8,)),
]


def launch(name, cut, *args, rows=1):
    constants = {k: v for k, v in triton_gpu.constants(name, cut, rows).items() if k not in LAUNCH}
    getattr(triton_kernels, name)[cut.grids[name]](*args, **constants)


def routed(found):
    return {name: torch.from_numpy(np.array(getattr(found, name))) for name in found.__dataclass_fields__}


def drawn(case, dtype=torch.float32):
    """x, a, b, y as torch tensors; what belongs to nobody is no number."""
    table, ids = cases.table(case.ranks, gap=2), cases.ids(case)
    x, a, b, y = (torch.from_numpy(np.array(z)) for z in cases.arrays(case, gap=2, seed=int.from_bytes(os.urandom(3))))
    free = torch.ones(a.shape[0], dtype=torch.bool)
    for start, rank in zip(table.start, table.rank, strict=True):
        free[int(start) : int(start + rank)] = False
    a[free], b[free] = torch.nan, torch.nan
    return table, ids, x.to(dtype), a, b, y.to(dtype)


def shrunk(case, cut, where, x, factor, first):
    """h by the kernel, and the tiles that it went through."""
    starts = (where.a_start, where.b_start) if first == "a" else (where.b_start, where.a_start)
    t = routed(tiles(*starts, where.rank, case.rows, cut.block_rows))
    h = torch.full((cut.split, cut.rows, cut.rank), torch.nan)
    weight = torch.from_numpy(np.array(where.weight))
    args = (x, factor, t["order"], t["first"], t["rows"], t["start"], t["rank"], weight, t["count"], h)
    launch("shrink", cut, *args, rows=case.rows)
    return h.sum(0), t


def exact(where, x, a, b, y):
    """y + w (x a^T) b in float64, group by group."""
    out = y.double().numpy().copy()
    for g, (start, rank, weight) in enumerate(zip(where.a_start, where.rank, where.weight, strict=True)):
        mine = slice(int(start), int(start + rank))
        out[g] += float(weight) * (x[g].double() @ a[mine].double().T @ b[mine].double()).numpy()
    return out


def error(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.parametrize("case", [*ODD, *MORE], ids=lambda case: case.name)
def test_apply_and_grad_against_float64(case):
    table, ids, x, a, b, y = drawn(case)
    where = segments(table, ids)
    flat, dy = x.reshape(-1, case.k), torch.randn(case.groups * case.rows, case.n)
    cut = plan(case.groups, case.rows, case.k, case.n, max(case.ranks), 4)
    h, t = shrunk(case, cut, where, flat, a, "a")
    out = y.reshape(-1, case.n).clone()
    launch("expand", cut, h, b, flat, *(t[n] for n in ("order", "first", "rows", "other", "rank", "count")), out, out)
    assert error(out.double().numpy().reshape(y.shape), exact(where, x, a, b, y)) < 1e-5

    cut = plan(case.groups, case.rows, case.n, case.k, max(case.ranks), 4)
    h, t = shrunk(case, cut, where, dy, b, "b")
    g = torch.zeros(a.shape)
    names = ("order", "first", "rows", "other", "rank", "run", "run_tiles", "runs")
    launch("grad", cut, h, flat, *(t[n] for n in names), g, g)
    want = np.zeros(a.shape)
    for i, (start, rank, weight) in enumerate(zip(where.a_start, where.rank, where.weight, strict=True)):
        mine = slice(int(start), int(start + rank))
        u = dy.reshape(case.groups, case.rows, -1)[i].double() @ b[mine].double().T
        want[mine] += float(weight) * (u.T @ x[i].double()).numpy()
    assert error(g.double().numpy(), want) < 1e-5
    owned = np.zeros(a.shape[0], bool)
    for start, rank in zip(where.a_start, where.rank, strict=True):
        owned[int(start) : int(start + rank)] = True
    assert not g.numpy()[~owned].any(), "ranks that no group owns"


def test_the_cases_reach_parts_of_k_and_several_blocks_of_ranks():
    cuts = [plan(c.groups, c.rows, c.k, c.n, max(c.ranks), 4) for c in (*ODD, *MORE)]
    assert max(cut.split for cut in cuts) > 1
    assert max(cut.blocks for cut in cuts) > 1
    assert {cut.block_rows for cut in cuts} == {16, 64}


def test_16_bit_activations_with_float32_factors():
    """The interpreter has no bfloat16 products; float16 takes the same tiles and the same kernels."""
    case = Case("half", 7, 5, 33, 17, (1, 3, 16, 40, 2))
    table, ids, x, a, b, y = drawn(case, torch.float16)
    where = segments(table, ids)
    cut = plan(case.groups, case.rows, case.k, case.n, max(case.ranks), 2)
    flat = x.reshape(-1, case.k)
    h, t = shrunk(case, cut, where, flat, a, "a")
    out = y.reshape(-1, case.n).clone()
    launch("expand", cut, h, b, flat, *(t[n] for n in ("order", "first", "rows", "other", "rank", "count")), out, out)
    assert out.dtype == torch.float16
    assert error(out.double().numpy().reshape(y.shape), exact(where, x, a, b, y)) < 4e-3


def test_overlapping_adapters_add_up_in_their_gradient():
    """Two adapters that share ranks are two runs that meet in the same rows."""
    start, rank = jnp.array([0, 0, 2], jnp.int32), jnp.array([4, 2, 2], jnp.int32)
    x, dy, b = torch.randn(3, 8), torch.randn(3, 12), torch.randn(4, 12)
    cut = plan(3, 1, 12, 8, 4, 4)
    t = routed(tiles(start, start, rank, 1, cut.block_rows))
    h, g = torch.full((cut.split, 3, cut.rank), torch.nan), torch.zeros(4, 8)
    args = (dy, b, t["order"], t["first"], t["rows"], t["start"], t["rank"], torch.ones(3), t["count"], h)
    launch("shrink", cut, *args)
    names = ("order", "first", "rows", "other", "rank", "run", "run_tiles", "runs")
    launch("grad", cut, h.sum(0), x, *(t[n] for n in names), g, g)
    want = sum(
        torch.nn.functional.pad((dy[i : i + 1] @ b[s : s + r].T).T @ x[i : i + 1], (0, 0, s, 4 - s - r))
        for i, (s, r) in enumerate(zip(start.tolist(), rank.tolist(), strict=True))
    )
    assert error(g.numpy(), want.numpy()) < 1e-5
