"""Adapters on disk: round trips of any tree, refusal of what does not belong, and files that lie."""

from __future__ import annotations

import functools
import json
import shutil

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax.errors import LoraxError
from lorax.io import safetensors
from lorax.io.peft import load_adapter, save_adapter
from lorax.models import Model, ModelConfig
from lorax.tree import train_last
from lorax.weights import Axes, Concat, Full, LowRank

CONFIG, WEIGHTS, NOTES = "adapter_config.json", "adapter_model.safetensors", "lorax.json"


@functools.cache
def zoo(family="llama", tied=True, key=0):
    config = ModelConfig(
        family, 23, 12, 20, num_layers=3, num_heads=3, num_kv_heads=1, head_dim=4,
        tie_embeddings=tied, attention_bias=family == "qwen2", qk_norm=family == "qwen3",
    )  # fmt: skip
    return Model.init(config, jax.random.key(key))


def generic():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return {
        "dense": {"kernel": draw(5, 7), "bias": draw(7)},
        "heads": {"kernel": draw(6, 2, 3)},
        "experts": draw(2, 3, 5, 4),
        "table": [draw(9, 3), draw(3, 3)],
    }


def moved(params, seed=1):
    """Every factor and whole weight at random values: a zero B hides every error."""
    trainable, frozen = lorax.split(params)
    rng = np.random.default_rng(seed)
    return lorax.join(jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape).astype(x.dtype)), trainable), frozen)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def zoo_adapter(**spec):
    model = zoo(**{k: spec.pop(k) for k in ("family", "tied") if k in spec})
    spec = lorax.LoraSpec(**{"rank": 3, "alpha": 7.0, **spec})
    ids = jax.ShapeDtypeStruct((1, 5), jnp.int32)
    return model, moved(lorax.adapt(jax.random.key(2), model.params, spec, fn=model.apply, args=(ids,)))


ZOO = {
    "all-linear": {},
    "rank 1": {"rank": 1, "targets": "*/q_proj/kernel"},
    "untied head": {"tied": False, "targets": ("lm_head/*", "*/down_proj/*")},
    "embedding": {"targets": ("embed/*", "*/o_proj/kernel")},
    "DoRA": {"variant": "dora", "targets": ("*/q_proj/kernel", "*/up_proj/kernel")},
    "ranks and alphas": {
        "rank": {"*/q_proj/*": 2, "*/v_proj/*": 4, "*": 3},
        "alpha": {"*/q_proj/*": 5.0, "*": 8.0},
        "scaling": "rslora",
    },
    "whole norms": {"targets": "*/v_proj/kernel", "train_also": ("norm/scale", "*/mlp_norm/*")},
    "biases": {"family": "qwen2", "targets": "*/q_proj/kernel", "train_also": "*/bias"},
    "whole only": {"targets": (), "train_also": ("embed/*", "layers/mlp/*")},
    "16 bits": {"dtype": jnp.bfloat16},
}


# PEFT saves a module with its bias, also one that did not train: the file repeats the base's.
BESIDE = {"family": "qwen2", "targets": "*/q_proj/kernel", "train_also": "*/k_proj/kernel"}


@pytest.mark.parametrize("spec", [*ZOO.values(), BESIDE], ids=[*ZOO, "whole kernel, still bias"])
def test_a_zoo_adapter_comes_back_exactly(spec, tmp_path):
    model, params = zoo_adapter(**spec)
    save_adapter(tmp_path / "a", params, base_name="tiny")
    assert_same(load_adapter(tmp_path / "a", model.params), params)
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["base_model_name_or_path"] == "tiny"


@pytest.mark.parametrize("name", [name for name in ZOO if name != "embedding"])
def test_pefts_two_files_alone_say_the_same(name, tmp_path):
    """What PEFT would have written, it reads too: without lorax.json the function is the same."""
    spec = ZOO[name]
    model, params = zoo_adapter(**spec)
    save_adapter(tmp_path / "a", params)
    (tmp_path / "a" / NOTES).unlink()
    if "embed/*" in spec.get("train_also", ()):
        assert json.loads((tmp_path / "a" / CONFIG).read_text())["ensure_weight_tying"] is True
    back = load_adapter(tmp_path / "a", model.params)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6)


def test_the_embedding_of_a_tied_model_is_the_same_by_two_files_alone(tmp_path):
    model, params = zoo_adapter(targets=("embed/*",))
    save_adapter(tmp_path / "a", params)
    (tmp_path / "a" / NOTES).unlink()
    back = lorax.merge(load_adapter(tmp_path / "a", model.params))
    np.testing.assert_allclose(back["embed"]["embedding"], lorax.merge(params)["embed"]["embedding"], rtol=1e-6)


def test_names_and_shapes_are_pefts(tmp_path):
    _, params = zoo_adapter(targets="*/q_proj/kernel")
    save_adapter(tmp_path / "a", params)
    tensors = safetensors.read(tmp_path / "a" / WEIGHTS)
    name = "base_model.model.model.layers.2.self_attn.q_proj.lora_{}.weight"
    assert tensors[name.format("A")].shape == (3, 12)
    assert tensors[name.format("B")].shape == (12, 3)
    assert len(tensors) == 6
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 7, ["q_proj"])
    assert not config["rank_pattern"]
    assert not config["use_rslora"]


def test_rslora_and_patterns_are_written_as_they_were_chosen(tmp_path):
    _, params = zoo_adapter(**ZOO["ranks and alphas"])
    save_adapter(tmp_path / "a", params)
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert config["use_rslora"] is True
    assert (config["r"], config["lora_alpha"]) == (3, 8)
    assert config["rank_pattern"] == {"q_proj": 2, "v_proj": 4}
    assert config["alpha_pattern"] == {"q_proj": 5}


def test_any_tree_with_any_axes_comes_back_exactly(tmp_path):
    base = generic()
    rng = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    dense, heads, experts, (table, square) = (
        base["dense"]["kernel"],
        base["heads"]["kernel"],
        base["experts"],
        base["table"],
    )
    scale = jnp.float32(1 / 3)
    params = {
        "dense": {"kernel": LowRank(dense, draw(5, 1), draw(1, 7), scale, Axes((), (0,), (1,))), "bias": Full(draw(7))},
        "heads": {"kernel": LowRank(heads, draw(6, 2), draw(2, 2, 3), scale, Axes((), (0,), (1, 2)))},
        "experts": LowRank(experts, draw(2, 3, 5, 2), draw(2, 3, 2, 4), draw(2, 3), Axes((0, 1), (2,), (3,))),
        "table": [table, LowRank(square, draw(3, 3), draw(3, 3), scale, Axes((), (1,), (0,)))],
    }
    save_adapter(tmp_path / "a", params)
    assert_same(load_adapter(tmp_path / "a", base), params)


def test_an_extracted_adapter_saves_too_and_pieces_keep_their_rows(tmp_path):
    model, params = zoo_adapter()
    save_adapter(tmp_path / "a", lorax.extract(params))
    assert_same(load_adapter(tmp_path / "a", model.params), params)
    pieces = moved(train_last(model.params, 2))
    save_adapter(tmp_path / "b", pieces)
    back = load_adapter(tmp_path / "b", model.params)
    assert isinstance(back["layers"]["attn"]["q_proj"]["kernel"], Concat)
    assert_same(back, pieces)


def test_a_16_bit_copy_of_the_base_is_the_same_base(tmp_path):
    model, params = zoo_adapter()
    save_adapter(tmp_path / "a", params)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    assert load_adapter(tmp_path / "a", half)["layers"]["mlp"]["up_proj"]["kernel"].dtype == jnp.bfloat16


def test_another_base_is_refused_by_the_first_weight_that_differs(tmp_path):
    model, params = zoo_adapter(targets="*/q_proj/kernel")
    save_adapter(tmp_path / "a", params)
    other = zoo(key=9).params
    with pytest.raises(LoraxError, match=r"for another base: embed/embedding has other values .*check_base=False"):
        load_adapter(tmp_path / "a", other)
    assert load_adapter(tmp_path / "a", other, check_base=False)["layers"]["attn"]["q_proj"]["kernel"].rank == 3
    with pytest.raises(LoraxError, match=r"it changes layers/attn/q_proj/kernel, which is not here"):
        load_adapter(tmp_path / "a", generic())
    wider = jax.tree.map(lambda x: x, model.params)
    wider["layers"]["attn"]["q_proj"]["kernel"] = jnp.ones((3, 12, 16))
    with pytest.raises(LoraxError, match=r"q_proj/kernel had shape \[3, 12, 12\] and has \[3, 12, 16\] here"):
        load_adapter(tmp_path / "a", wider, check_base=False)


def test_what_cannot_be_saved_or_put_over_says_so(tmp_path):
    model, params = zoo_adapter()
    with pytest.raises(LoraxError, match="nothing in this tree is adapted"):
        save_adapter(tmp_path / "a", model.params)
    with pytest.raises(LoraxError, match="is abstract"):
        save_adapter(tmp_path / "a", jax.eval_shape(lambda: params))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years")
    with pytest.raises(LoraxError, match="holds other things"):
        save_adapter(tmp_path / "full", params)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "years"
    with pytest.raises(LoraxError, match=r"holds no adapter_config\.json"):
        load_adapter(tmp_path / "nowhere", model.params)
    save_adapter(tmp_path / "a", params)
    with pytest.raises(LoraxError, match="is adapted already"):
        load_adapter(tmp_path / "a", params)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft") / "a"
    model, params = zoo_adapter(targets=("*/q_proj/kernel",), train_also="norm/scale")
    save_adapter(folder, params)
    return model, folder


def changed(saved, tmp_path, notes=True, **settings):
    model, folder = saved
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    if not notes:
        (copy / NOTES).unlink()
    config = json.loads((copy / CONFIG).read_text()) | settings
    (copy / CONFIG).write_text(json.dumps(config))
    return model, copy


REFUSED = {
    "DoRA that is none": ({"use_dora": True}, "disagree about DoRA at"),
    "other methods": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "unknown settings": ({"use_marvel": {"x": 1}}, "use_marvel=.* is not served"),
    "changed bases": ({"init_lora_weights": "pissa"}, "changes the base weights"),
    "steps of a base change": ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
    "replicated layers": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "rank in words": ({"r": "three"}, "r is 'three'"),
    "endless alpha": ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
    "slow patterns": ({"alpha_pattern": {"(a+)+b": 2}}, "too involved"),
    "broken patterns": ({"alpha_pattern": {"(": 2}}, "not a regular expression"),
    "another alpha": ({"lora_alpha": 8}, "disagree about the scale"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_settings_that_change_the_meaning_are_refused(settings, message, saved, tmp_path):
    model, copy = changed(saved, tmp_path, **settings)
    with pytest.raises(LoraxError, match=message):
        load_adapter(copy, model.params)


def test_dora_without_a_length_and_beside_lora_is_refused(tmp_path):
    model, params = zoo_adapter(variant="dora", targets="*/q_proj/kernel")
    save_adapter(tmp_path / "a", params)
    tensors = {name: t.array().copy() for name, t in safetensors.read(tmp_path / "a" / WEIGHTS).items()}
    lengths = [name for name in tensors if name.endswith("lora_magnitude_vector")]
    assert [tensors[name].shape for name in lengths] == 3 * [(12,)]
    assert json.loads((tmp_path / "a" / CONFIG).read_text())["use_dora"] is True
    (tmp_path / "a" / NOTES).unlink()
    safetensors.write_arrays(tmp_path / "a" / WEIGHTS, {n: t for n, t in tensors.items() if n != lengths[1]})
    with pytest.raises(LoraxError, match=r"lacks .*lora_magnitude_vector"):
        load_adapter(tmp_path / "a", model.params)
    plain = zoo_adapter(targets="*/v_proj/kernel")[1]["layers"]["attn"]["v_proj"]
    mixed = {**params, "layers": {**params["layers"], "attn": {**params["layers"]["attn"], "v_proj": plain}}}
    with pytest.raises(LoraxError, match="is plain LoRA beside DoRA"):
        save_adapter(tmp_path / "b", mixed)


def test_variants_without_a_format_are_stored_as_the_lora_that_they_equal(tmp_path):
    base = generic()
    params = moved(lorax.adapt(jax.random.key(0), base, lorax.LoraSpec(targets="dense/kernel", rank=2, variant="vera")))
    save_adapter(tmp_path / "a", params)
    back = load_adapter(tmp_path / "a", base)
    assert type(back["dense"]["kernel"]) is LowRank
    np.testing.assert_allclose(
        lorax.merge(back)["dense"]["kernel"], lorax.merge(params)["dense"]["kernel"], rtol=1e-5, atol=1e-6
    )


def test_a_tensor_that_nobody_takes_is_refused(saved, tmp_path):
    model, copy = changed(saved, tmp_path)
    tensors = {name: t.array().copy() for name, t in safetensors.read(copy / WEIGHTS).items()}
    extra = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    safetensors.write_arrays(copy / WEIGHTS, {**tensors, extra: np.ones(12, np.float32)})
    with pytest.raises(LoraxError, match="lora_magnitude_vector"):
        load_adapter(copy, model.params)
    (copy / NOTES).unlink()
    with pytest.raises(LoraxError, match="lora_magnitude_vector"):
        load_adapter(copy, model.params)
    del tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"]
    safetensors.write_arrays(copy / WEIGHTS, tensors)
    with pytest.raises(LoraxError, match=r"lacks .*layers\.1\.self_attn\.q_proj\.lora_B"):
        load_adapter(copy, model.params)


def test_layers_of_different_rank_and_layers_left_alone_are_one_function(saved, tmp_path):
    """PEFT's rank_pattern and layers_to_transform: zeros fill up, and no gradient reaches them."""
    model, copy = changed(
        saved, tmp_path, notes=False, alpha_pattern={r"model\.layers\.2\..*": 4.0}, modules_to_save=None
    )
    rng = np.random.default_rng(5)
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    pairs = {i: (rng.normal(size=(r, 12)), rng.normal(size=(12, r))) for i, r in ((0, 2), (2, 5))}
    arrays = {name.format(i, "AB"[j]): p.astype(np.float32) for i, pair in pairs.items() for j, p in enumerate(pair)}
    safetensors.write_arrays(copy / WEIGHTS, arrays)
    params = load_adapter(copy, model.params)
    leaf = params["layers"]["attn"]["q_proj"]["kernel"]
    base = np.asarray(model.params["layers"]["attn"]["q_proj"]["kernel"])
    merged = np.asarray(lorax.merge(params)["layers"]["attn"]["q_proj"]["kernel"])
    for i, alpha in ((0, 7.0), (2, 4.0)):
        a, b = pairs[i]
        np.testing.assert_allclose(merged[i], base[i] + alpha / len(a) * (b @ a).T, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(merged[1], base[1])
    ids = jnp.array([[1, 2, 3]])
    grads = jax.grad(lambda p: lorax.lift(model.apply)(p, ids).sum())(params)["layers"]["attn"]["q_proj"]["kernel"]
    assert not np.asarray(grads.A)[np.asarray(leaf.A) == 0].any()
    assert not np.asarray(grads.B)[np.asarray(leaf.B) == 0].any()
    assert np.asarray(grads.B)[0, :2].any()


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS, NOTES])
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
def test_damaged_files_end_in_one_clear_error(saved, file, data, tmp_path_factory):
    model, folder = saved
    good = (folder / file).read_bytes()
    bad = data.draw(st.one_of(_cut(good), _flipped(good), _other_values(good, file)))
    hypothesis.assume(bad != good)
    copy = tmp_path_factory.mktemp("bad")
    for name in (CONFIG, WEIGHTS, NOTES):
        (copy / name).write_bytes(bad if name == file else (folder / name).read_bytes())
    said = ""
    try:
        # Some damage is none: a value inside a factor, a note that nothing reads.
        load_adapter(copy, model.params)
    except LoraxError as error:
        said = str(error)
    shutil.rmtree(copy)
    assert "\n" not in said


def _cut(good):
    return st.integers(0, len(good) - 1).map(lambda n: good[:n])


def _flipped(good):
    # The first kilobytes hold the structure; the rest of a weights file is values.
    places = st.tuples(st.integers(0, min(len(good), 2000) - 1), st.integers(0, 255))
    return places.map(lambda at: good[: at[0]] + bytes([at[1]]) + good[at[0] + 1 :])


def _other_values(good, file):
    """The same JSON with one value somewhere in it replaced by something of another kind."""
    if file == WEIGHTS:
        return st.binary(max_size=300)
    odd = st.sampled_from([None, -1, 0, 2**63, 1e308, "x", "(a*)*b", [], [[1]], {}, {"x": [1, "y"]}, True])

    def put(choice):
        path, value = choice
        tree = json.loads(good)
        node = tree
        for step in path[:-1]:
            node = node[step]
        node[path[-1]] = value
        return json.dumps(tree).encode()

    return st.tuples(st.sampled_from(sorted(_places(json.loads(good)), key=repr)), odd).map(put)


def _places(tree, at=()):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*at, key)
        yield from _places(value, (*at, key))
