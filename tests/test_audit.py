"""What a merge costs, against float64 by hand; refusals before anything is written; and the way back."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import lorax
from lorax import LoraSpec, LoraxError, cli
from lorax.audit import MergeAudit
from lorax.io.peft import save_adapter
from lorax.models import Model, ModelConfig, load, save_hf

rng = np.random.default_rng(3)
BASE = {"w": jnp.asarray(rng.normal(size=(3, 7, 5)), jnp.float32), "v": jnp.asarray(rng.normal(size=(5, 2)))}
X = jnp.asarray(rng.normal(size=(4, 7)), jnp.float32)


def apply(params, x):
    y = jnp.einsum("bi,lio->lbo", x, params["w"]).sum(0)
    return jnp.tanh(y) @ params["v"].astype(y.dtype)


def adapted(base=BASE, size=0.3, **spec):
    tree = lorax.adapt(jax.random.key(0), base, LoraSpec(targets="w", rank=2, alpha=3.0, **spec))
    trainable, frozen = lorax.split(tree)
    return lorax.join(jax.tree.map(lambda x: x + size, trainable), frozen)


def exact(tree):
    leaf = tree["w"]
    a, b, base = (np.asarray(x, np.float64) for x in (leaf.A, leaf.B, leaf.base))
    return base + float(leaf.scale) * a @ b, float(leaf.scale) * a @ b


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
def test_errors_are_those_of_the_rounding(dtype):
    tree = adapted()
    merged, found = lorax.merge(tree, audit=True, dtype=dtype, fn=apply, args=(X,))
    want, delta = exact(tree)
    kind = np.dtype(dtype or "float32") if dtype != "bfloat16" else np.dtype(ml_dtypes.bfloat16)
    rounded = want.astype(np.float32).astype(kind).astype(np.float64)
    assert merged["w"].dtype == kind
    assert merged["v"].dtype == kind
    if dtype is not None:
        np.testing.assert_allclose(np.asarray(merged["w"], np.float64), rounded, rtol=0, atol=1e-6)
        assert found["w"] == pytest.approx(np.linalg.norm(rounded - want) / np.linalg.norm(want), rel=1e-3)
        assert found.lost["w"] == pytest.approx(np.linalg.norm(rounded - want) / np.linalg.norm(delta), rel=1e-3)
    assert set(found) == {"w"}
    assert found.worst == "w"
    assert 0 < found["w"] < {None: 1e-6, "bfloat16": 4e-3, "float16": 5e-4}[dtype]
    v = np.asarray(merged["v"].astype(jnp.float32), np.float64)
    by_hand = np.tanh(np.asarray(X, np.float64) @ rounded.sum(0)) @ v
    here = np.tanh(np.asarray(X, np.float64) @ want.sum(0)) @ np.asarray(BASE["v"], np.float64)
    assert found.difference == pytest.approx(np.abs(by_hand - here).max(), abs=2e-6)
    assert found.largest == pytest.approx(np.abs(here).max(), rel=1e-5)


def test_a_narrow_base_merged_into_a_wide_dtype_is_not_rounded_on_the_way():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), BASE)
    tree = adapted(half, size=0.01)
    _, narrow = lorax.merge(tree, audit=True)
    _, wide = lorax.merge(tree, audit=True, dtype=jnp.float32)
    assert narrow["w"] > 1e-3
    assert wide["w"] < 1e-6
    # The weight is rounded a little, and the small change to a large part.
    assert narrow.lost["w"] > 5 * narrow["w"]


def test_what_is_worse_than_the_tolerance_is_refused_by_name():
    tree = adapted()
    assert lorax.merge(tree, tolerance=1e-5)["w"].shape == (3, 7, 5)
    with pytest.raises(LoraxError, match=r"^w: merging costs a relative error of 0\.001\d+, above .* of 0\.001; merge"):
        lorax.merge(tree, tolerance=1e-3, dtype="bfloat16")
    huge = {**BASE, "w": BASE["w"] * 1e6}
    with pytest.raises(LoraxError, match=r"w: merging costs a relative error of (inf|nan)"):
        lorax.merge(adapted(huge), tolerance=1.0, dtype="float16")
    MergeAudit({"w": 0.01}, {}, 0.05, 1.0).check(0.05)
    with pytest.raises(LoraxError, match=r"moves an output of the probe batch by 0\.2, 0\.1 of the largest"):
        MergeAudit({"w": 0.01}, {}, 0.2, 2.0).check(0.05)
    assert MergeAudit({"a": 0.1, "b": math.nan}).worst == "b"
    with pytest.raises(LoraxError, match="tolerance must be"):
        lorax.merge(tree, tolerance=-1.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_unmerge_is_within_one_rounding_of_the_base(dtype):
    base = {"w": BASE["w"].astype(dtype), "v": BASE["v"].astype(dtype)}
    tree = adapted(base)
    merged = lorax.merge(tree)
    back = lorax.unmerge(merged, lorax.extract(tree))
    unit = float(jnp.finfo(dtype).eps) / 2
    # One rounding of the sum on the way there and one of the difference on the way back.
    room = unit * (np.abs(np.asarray(merged["w"], np.float64)) + np.abs(np.asarray(base["w"], np.float64))) + 1e-6
    assert (np.abs(np.asarray(back["w"], np.float64) - np.asarray(base["w"], np.float64)) <= 1.01 * room).all()
    np.testing.assert_array_equal(back["v"], base["v"])


def test_a_change_that_is_no_sum_is_audited_too():
    tree = adapted(variant="dora")
    _, found = lorax.merge(tree, audit=True, dtype="bfloat16", fn=apply, args=(X,))
    assert 5e-4 < found["w"] < 4e-3
    assert found.lost["w"] is None
    assert found.as_dict()["weights"]["w"]["lost"] is None


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("audit")
    model = Model.init(ModelConfig("llama", 31, 12, 20, 2, 2, 1, 4), jax.random.key(0))
    save_hf(place / "base", model, model.params)
    tree = lorax.adapt(jax.random.key(1), model.params, LoraSpec(targets="*attn/*kernel", rank=2))
    trainable, frozen = lorax.split(tree)
    tree = lorax.join(jax.tree.map(lambda v: v + 0.1, trainable), frozen)
    save_adapter(place / "adapter", tree, base_name=str(place / "base"))
    return place


def test_the_command_audits_and_writes_nothing_beyond_the_tolerance(folders, tmp_path, capsys):
    out = tmp_path / "merged"
    words = ["merge", "--adapter", str(folders / "adapter"), "--out", str(out)]
    assert cli.main([*words, "--dtype", "bfloat16", "--tolerance", "1e-4"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("lorax: layers/attn/")
    assert "above the tolerance of 0.0001" in said
    assert list(tmp_path.iterdir()) == []
    assert cli.main([*words, "--dtype", "bfloat16", "--audit"]) == 0
    shown = capsys.readouterr().out
    assert "what merging costs" in shown
    assert "largest difference of a logit" in shown
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = [*words[:-1], str(tmp_path / "wide"), "--tolerance", "1e-3", "--json"]
    assert cli.main(again) == 0
    told = json.loads(capsys.readouterr().out)["audit"]
    assert set(told["weights"]) == {f"layers/attn/{x}_proj/kernel" for x in "qkvo"}
    assert 0 <= told["worst_error"] < 1e-6
    assert told["largest_output_difference"] < 1e-3 * told["largest_output"]
    plain = load(tmp_path / "wide")
    assert plain.params["layers"]["attn"]["q_proj"]["kernel"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--tolerance", "-1"), "--tolerance -1.0: must be a number"),
        (("--dtype", "float16", "--into", "requantized"), "--dtype float16: --into requantized writes 4 bits"),
    ],
)
def test_settings_of_an_audit_that_make_no_sense(folders, more, says, tmp_path, capsys):
    out = tmp_path / "merged"
    assert cli.main(["merge", "--adapter", str(folders / "adapter"), "--out", str(out), *more]) == 2
    assert says in capsys.readouterr().err
    assert not out.exists()
