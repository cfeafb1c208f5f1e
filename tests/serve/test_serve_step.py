"""The step of other shapes than the toy's, on pages in any order, against the model's own forward pass."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax.models import Model, ModelConfig
from lorax.serve import delta, mesh
from lorax.serve.geometry import geometry
from lorax.serve.paged import Rows
from lorax.serve.programs import page_buckets, prefill_shapes, row_buckets

PLAIN = {"vocab_size": 37, "hidden_size": 24, "intermediate_size": 40, "num_layers": 3, "num_heads": 4, "head_dim": 6}
SHAPES = [
    ModelConfig("mistral", num_kv_heads=2, sliding_window=5, **PLAIN),
    ModelConfig("qwen2", num_kv_heads=4, attention_bias=True, sliding_window=4, full_layers=1, **PLAIN),
    ModelConfig("qwen3", num_kv_heads=2, qk_norm=True, tie_embeddings=True, **PLAIN),
    ModelConfig("llama", num_kv_heads=2, attention_bias=True, output_bias=True, **PLAIN),
]
# Heads and MLP for eight devices, with biases on both sides of the sums over them.
EIGHT = ModelConfig(
    "llama", num_kv_heads=8, attention_bias=True, output_bias=True, **{**PLAIN, "num_heads": 8, "head_dim": 2}
)
# Tokens of each row, read in chunks of these sizes; what a chunk has too much is padding.
LENGTHS, CHUNKS = (9, 1, 4), (4, 4, 1)


@pytest.mark.parametrize(("shape", "shards"), [*((shape, 1) for shape in SHAPES), (EIGHT, 8)])
def test_chunks_over_pages_give_the_logits_of_the_whole(shape, shards):
    model = Model.init(shape, jax.random.key(0))
    draw = np.random.default_rng(0)
    # Nothing is zero or one: biases and norms too.
    params = jax.tree.map(lambda x: x * 6 + 0.3 * draw.standard_normal(x.shape).astype(np.float32), model.params)
    model = dataclasses.replace(model, params=params)
    over = mesh.make(shards)
    place = geometry(shape, 2, 16, shards)
    # Pages hold what nobody may see.
    pool = mesh.new_pool(place, jnp.float32, over) + np.float32(1e4)
    table = draw.permutation(np.arange(1, 16)).reshape(3, 5).astype(np.int32)
    ids = draw.integers(0, 37, (3, 9)).astype(np.int32)
    step = jax.jit(mesh.step(shape, place, over))
    placed, seen = mesh.placed(params, over), {}
    start = np.zeros(3, np.int32)
    for size in CHUNKS:
        count = np.minimum(np.array(LENGTHS) - start, size).clip(0).astype(np.int32)
        chunk = np.zeros((3, size), np.int32)
        for row in range(3):
            chunk[row, : count[row]] = ids[row, start[row] : start[row] + count[row]]
        rows = Rows(chunk, start.copy(), count, table)
        pool, logits = step(placed, pool, rows, delta.empty_route(place, 3, 2))
        start = start + count
        seen |= {row: np.asarray(logits)[row] for row in range(3) if count[row]}
    whole = np.asarray(jax.jit(model.apply)(params, ids))
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(seen[row], whole[row, length - 1], rtol=1e-4, atol=1e-4)


def test_a_weight_and_a_sequence_lose_less_than_a_page():
    for heads, kv in ((6, 2), (4, 4), (8, 1)):
        shape = ModelConfig("llama", 11, 24, 56, 5, heads, kv, 4)
        place = geometry(shape, 3, 9)
        assert place.page_size == 2 * 5 * kv * 4 * 3
        assert place.page_size % place.unit == 0
        for i, site in enumerate(place.sites):
            for rank in (0, 1, 3, 8, 64):
                need = 5 * rank * (site.size_in + site.size_out)
                assert 0 <= place.pages_of_weight(i, rank) * place.page_size - need < place.page_size
        assert [place.pages_of_tokens(n) for n in (0, 1, 3, 4)] == [0, 1, 1, 2]


def test_a_text_that_overflows_spoils_nobody_who_has_its_pages_later():
    shape = SHAPES[0]
    model = Model.init(shape, jax.random.key(0))
    params = jax.tree.map(lambda x: x * 6, model.params)
    table = params["embed"]["embedding"]
    params["embed"]["embedding"] = table.at[5].set(jnp.nan).at[6].set(jnp.inf)
    place = geometry(shape, 4, 4)
    step = jax.jit(mesh.step(shape, place, None))
    route, pool = delta.empty_route(place, 2, 2), mesh.new_pool(place, jnp.float32, None)

    def run(pool, ids, count):
        pages = np.array([[1], [2]], np.int32)
        return step(params, pool, Rows(np.asarray(ids, np.int32), np.zeros(2, np.int32), count, pages), route)

    pool, logits = run(pool, [[5, 1, 1], [6, 1, 1]], np.full(2, 3, np.int32))
    assert not np.isfinite(np.asarray(logits)).any()
    assert np.isfinite(np.asarray(pool)).all()
    _, logits = run(pool, [[1, 2, 0], [3, 4, 0]], np.full(2, 2, np.int32))
    whole = np.asarray(jax.jit(model.apply)(params, jnp.array([[1, 2], [3, 4]])))[:, -1]
    np.testing.assert_allclose(logits, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 3])
def test_each_row_gets_its_own_adapters_change_and_nothing_else(tokens):
    """More rows than a turn takes, ranks mixed, pages in any order; what is nobody's is NaN."""
    place, draw = geometry(SHAPES[0], 2, 400), np.random.default_rng(1)
    ranks = [0, 3, 12, 8, 1, 9, 5, 11, 4] * 2
    route = delta.empty_route(place, 18, 12)
    pool = np.full((400, place.page_size), np.nan, np.float32)
    free, factors = iter(draw.permutation(np.arange(1, 400)).tolist()), {}
    site = place.sites[6]
    for row, rank in enumerate(ranks):
        a, b = (draw.standard_normal((3, rank, size)).astype(np.float32) for size in (site.size_in, site.size_out))
        flat = np.concatenate([a.reshape(3, -1), b.reshape(3, -1)], axis=1).reshape(-1)
        pages = [next(free) for _ in range(place.pages_of_weight(6, rank))]
        whole = np.full(len(pages) * place.page_size, np.nan, np.float32)
        whole[: flat.size] = flat
        pool[pages] = whole.reshape(-1, place.page_size)
        route.table[6, row, : len(pages)] = pages
        route.rank[6, row], route.scale[6, row] = rank, draw.standard_normal(3)
        factors[row] = a, b
    delta.fill_route(route, 18, 12)
    x, y = (draw.standard_normal((18 * tokens, n)).astype(np.float32) for n in (site.size_in, site.size_out))
    run = jax.jit(lambda pool, layer, route, x, y: delta.add(place, pool, 6, layer, route, x, y))
    for layer in (0, 2):
        got = np.asarray(run(pool, np.int32(layer), route, x, y)).reshape(18, tokens, -1)
        for row, (a, b) in factors.items():
            h = x.reshape(18, tokens, -1)[row].astype(np.float64) @ a[layer].T.astype(np.float64)
            want = y.reshape(18, tokens, -1)[row] + float(route.scale[6, row, layer]) * (h @ b[layer])
            np.testing.assert_allclose(got[row], want, rtol=1e-4, atol=1e-4)


def test_pieces_cover_every_rank_once():
    place = geometry(SHAPES[0], 2, 9)
    route = delta.empty_route(place, 5, 20)
    route.rank[0] = [3, 0, 20, 8, 9]
    delta.fill_route(route, 5, 20)
    found = {(int(r), int(p)) for r, p in zip(route.row[0], route.first[0], strict=True) if p < 20}
    assert found == {(0, 0), (2, 0), (2, 8), (2, 16), (3, 0), (4, 0), (4, 8)}
    assert route.turns.tolist() == [2, 0, 0, 0, 0, 0, 0]


def test_buckets_are_few_and_enough():
    for most in (1, 3, 4, 5, 32, 48, 200):
        sizes = row_buckets(most)
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == most
        pages = page_buckets(most)
        assert pages[-1] == most
        assert all(b <= 2 * a for a, b in pairwise(pages))
        assert set(pages) <= set(page_buckets(most, fine=True))
    assert [tuple(shape) for shape in prefill_shapes(128, 1)] == [(1, 128), (1, 32)]
