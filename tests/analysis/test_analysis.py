"""What happened to the weights, against NumPy's SVD of the dense changes in float64."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import LoraSpec, LoraxError, analysis, cli
from lorax.analysis.changes import effective_rank
from lorax.io.peft import save_adapter
from lorax.models import Model, ModelConfig, save_hf

rng = np.random.default_rng(0)
BASE = {
    "layers": {
        "up": {"kernel": jnp.asarray(rng.normal(size=(3, 17, 23)), jnp.float32)},
        "down": {"kernel": jnp.asarray(rng.normal(size=(3, 23, 17)), jnp.float32)},
        "norm": {"scale": jnp.ones((3, 17))},
    },
    "out": {"kernel": jnp.asarray(rng.normal(size=(17, 5)), jnp.float32)},
}


def adapted(seed, rank=4, **spec):
    tree = lorax.adapt(jax.random.key(seed), BASE, LoraSpec(targets=("*up*", "*down*"), rank=rank, **spec))
    trainable, frozen = lorax.split(tree)
    draw = np.random.default_rng(seed)
    return lorax.join(
        jax.tree.map(lambda v: v + 0.1 * jnp.asarray(draw.normal(size=v.shape), jnp.float32), trainable), frozen
    )


ONE, TWO = adapted(1), adapted(2, rank=3)


def assert_figures(rows, before, after):
    for row in rows:
        old, new = (np.asarray(dict(lorax.tree.named_leaves(t))[row.path], np.float64) for t in (before, after))
        old, new = (x if row.layer is None else x[row.layer] for x in (old, new))
        u, s, v = np.linalg.svd(new - old)
        if not (new - old).any():
            assert not row.changed
            continue
        assert row.frobenius == pytest.approx(np.linalg.norm(new - old), rel=1e-4)
        assert row.spectral == pytest.approx(s[0], rel=1e-4)
        assert row.relative_frobenius == pytest.approx(np.linalg.norm(new - old) / np.linalg.norm(old), rel=1e-4)
        assert row.relative_spectral == pytest.approx(s[0] / np.linalg.svd(old)[1][0], rel=2e-3)
        k = len(row.values)
        np.testing.assert_allclose(row.values, s[:k], rtol=1e-3, atol=1e-5)
        assert row.effective_rank == 1 + int(np.searchsorted(np.cumsum(s**2) / (s**2).sum(), 0.9))
        k = 1 + int(np.searchsorted(np.cumsum(s**2) / (s**2).sum(), 0.999))
        inside = np.linalg.norm(u[:, :k].T @ old @ v[:k].T)
        assert row.amplification == pytest.approx(np.linalg.norm(new - old) / inside, rel=1e-3)


def test_figures_of_an_adapter_come_from_its_factors():
    found = analysis.analyze(BASE, ONE)
    assert_figures(found.rows, BASE, lorax.merge(ONE))
    assert [(row.path, row.layer) for row in found.rows] == [
        *(("layers/down/kernel", i) for i in range(3)), *(("layers/up/kernel", i) for i in range(3)),
        ("out/kernel", None),
    ]  # fmt: skip
    assert found.unchanged == ("out/kernel",)
    assert all(len(row.values) == 4 for row in found.rows if row.changed)


def test_figures_of_two_plain_trees_and_of_changes_that_are_no_sums():
    for after in (lorax.merge(ONE), adapted(3, variant="dora"), lorax.merge(adapted(4, rank=1))):
        found = analysis.analyze(BASE, after)
        assert_figures(found.rows, BASE, lorax.merge(after))
    vera = adapted(5, variant="vera")
    assert_figures(analysis.analyze(BASE, vera).rows, BASE, lorax.merge(vera))
    # Over another base than its own, the bases differ too.
    other = jax.tree.map(lambda v: v + 0.01, BASE)
    assert_figures(analysis.analyze(other, ONE).rows, other, lorax.merge(ONE))


def test_no_dense_change_is_built_where_factors_suffice():
    shapes = []

    def sizes(jaxpr):
        for eqn in jaxpr.eqns:
            shapes.extend(v.aval.shape for v in eqn.outvars)
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", None)
                if inner is not None:
                    sizes(inner)

    from lorax.analysis.matrices import pairs

    (pair,) = (p for p in pairs(BASE, ONE) if p.path == "layers/up/kernel")
    sizes(jax.make_jaxpr(pair.svd)().jaxpr)
    assert shapes
    assert not any(shape[-2:] in ((17, 23), (23, 17)) for shape in shapes)


def test_similarity_is_the_paper_s_phi():
    found = analysis.similarity(ONE, TWO)
    assert [(one.path, one.layer) for one in found] == [
        (f"layers/{kind}/kernel", i) for kind in ("down", "up") for i in range(3)
    ]
    for one in found:
        a, b = (np.asarray(t["layers"][one.path.split("/")[1]]["kernel"].A[one.layer], np.float64) for t in (ONE, TWO))
        # Right singular vectors of the factor as torch has it, (r, in).
        ua, ub = (np.linalg.svd(x.T, full_matrices=False)[2].T for x in (a, b))
        assert one.grid.shape == (4, 3)
        for i, j in np.ndindex(4, 3):
            want = np.linalg.norm(ua[:, : i + 1].T @ ub[:, : j + 1]) ** 2 / (min(i, j) + 1)
            assert one.grid[i, j] == pytest.approx(want, abs=1e-4)
    assert min(one.whole for one in analysis.similarity(ONE, ONE)) == pytest.approx(1.0, abs=1e-5)


def test_two_adapters_are_each_analysed_and_compared():
    found = analysis.analyze(ONE, TWO)
    assert_figures(found.rows, BASE, lorax.merge(TWO))
    assert_figures(found.first, BASE, lorax.merge(ONE))
    assert len(found.similar) == 6
    data = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert data["by_kind"]["up"]["changed"] == 3
    assert set(data["by_layer"]) == {"0", "1", "2"}
    assert "phi" in str(found).splitlines()[0]
    kinds, grid = found.grid()
    assert (kinds, grid.shape) == (["down", "up"], (3, 2))
    assert np.isfinite(grid).all()


def test_effective_rank_at_its_edges():
    assert effective_rank(np.array([3.0, 1.0])) == 1  # exactly 90%
    assert effective_rank(np.array([2.9, 1.0])) == 2
    assert effective_rank(np.ones(10)) == 9
    assert effective_rank(np.zeros(3)) == 0


def test_intruders_against_the_definition_and_their_mitigation():
    old = {"w": BASE["layers"]["up"]["kernel"], "v": BASE["out"]["kernel"]}
    draw = np.random.default_rng(3)
    # A direction that has a little of every singular vector of the weight, and much of none.
    spread = np.linalg.svd(np.asarray(old["w"][1]))[2][:17].sum(0) / 17**0.5
    strong = jnp.asarray(5 * np.outer(draw.normal(size=17), spread), jnp.float32)
    new = {"w": old["w"].at[1].add(strong), "v": old["v"]}
    (found,) = analysis.intruders(old, new, top=5)
    assert (found.path, found.layer, len(found.cosines)) == ("w", 1, 5)
    # As torch has it: (out, in), left singular vectors.
    before, after = (np.asarray(t["w"][1], np.float64).T for t in (old, new))
    u, _, _ = np.linalg.svd(before, full_matrices=False)
    left, s, right = np.linalg.svd(after, full_matrices=False)
    want = np.abs(left[:, :5].T @ u).max(axis=1)
    np.testing.assert_allclose(found.cosines, want, atol=2e-3)
    ranks = np.flatnonzero(want < 0.5)
    assert found.ranks == tuple(ranks)
    assert 0 in found.ranks
    assert found.energy == pytest.approx((s[ranks] ** 2).sum() / (s**2).sum(), rel=1e-3)
    part = sum(s[j] * np.outer(left[:, j], right[j]) for j in ranks)
    for factor in (0.0, 0.3, 1.0):
        got = analysis.mitigate(old, new, factor, top=5)
        np.testing.assert_allclose(got["w"][1].T, after + (factor - 1) * part, atol=2e-3)
        np.testing.assert_array_equal(got["w"][0], new["w"][0])
    tamed = analysis.mitigate(BASE, ONE, 0.5)
    assert jax.tree.structure(tamed) == jax.tree.structure(BASE)
    with pytest.raises(LoraxError, match="at least 0"):
        analysis.mitigate(old, new, -1.0)


def test_trees_that_do_not_belong_together():
    with pytest.raises(LoraxError, match="out/kernel: is in one of the two trees alone"):
        analysis.analyze(BASE, {"layers": BASE["layers"]})
    with pytest.raises(LoraxError, match="out/kernel: has shape"):
        analysis.analyze(BASE, {**BASE, "out": {"kernel": jnp.ones((3, 3))}})
    with pytest.raises(LoraxError, match="without its base"):
        analysis.analyze(ONE, lorax.extract(TWO))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and two adapters of it on disk."""
    place = tmp_path_factory.mktemp("analyze")
    config = ModelConfig("llama", 31, 12, 20, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4)
    model = Model.init(config, jax.random.key(0))
    save_hf(place / "base", model, model.params)
    for i in (1, 2):
        tree = lorax.adapt(jax.random.key(i), model.params, LoraSpec(targets="*attn/*kernel", rank=2))
        trainable, frozen = lorax.split(tree)
        tree = lorax.join(jax.tree.map(lambda v: v + 0.1, trainable), frozen)
        save_adapter(place / f"a{i}", tree, base_name=str(place / "base"))
    save_hf(place / "tuned", model, lorax.merge(tree))
    return place


@pytest.mark.parametrize(
    ("pair", "more", "pictures"),
    [
        (("base", "a1"), ("--intruders",), {"change.png", "spectra.png"}),
        (("a1", "a2"), (), {"change.png", "spectra.png", "similarity.png"}),
        (("base", "tuned"), (), {"change.png", "spectra.png"}),
        (("base", "base"), (), set()),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, tuple) else "",
)
def test_the_command_writes_table_json_and_pictures(folders, pair, more, pictures, tmp_path, capsys):
    out = tmp_path / "found"
    words = ["analyze", *(str(folders / name) for name in pair), "--out", str(out), *more]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"analysis.json", *pictures}
    data = json.loads((out / "analysis.json").read_text())
    changed = {row["path"] for row in data["weights"] if row["frobenius"]}
    assert changed == ({f"layers/attn/{x}_proj/kernel" for x in "qkvo"} if pictures else set())
    assert len(data["weights"]) == 2 * 7 + 2  # with the embedding and the head
    assert bool(data["intruders"]) is bool(more)
    assert bool(data["similarity"]) is ("similarity.png" in pictures)
    assert "embed" in said if pictures else "unchanged" in said
    assert cli.main(words) == 2
    assert "exists already" in capsys.readouterr().err
