"""Adapters against PEFT itself: saved here and loaded there, saved there and loaded here, the same logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

import lorax
from lorax.errors import LoraxError
from lorax.io.peft import load_adapter, save_adapter
from lorax.models import load, save_hf, with_labels

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

IDS = np.array([[3, 14, 15, 9, 2, 6], [5, 3, 5, 8, 9, 7]], np.int32)


def hf_model(tied):
    """Qwen2 has biases, so every kind of parameter is in it."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=37, hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=1, tie_word_embeddings=tied, max_position_embeddings=64, initializer_range=0.3,
        use_sliding_window=False,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path_factory):
    """The directory of one random model."""
    folder = tmp_path_factory.mktemp("hf") / "model"
    hf_model(request.param).save_pretrained(folder)
    return folder, request.param


def theirs(model):
    with torch.no_grad():
        return model(torch.tensor(IDS, dtype=torch.long)).logits.float().numpy()


def ours(model, params):
    return np.asarray(jax.jit(lorax.lift(model.apply))(params, jnp.asarray(IDS)))


def moved(params, seed=1):
    trainable, frozen = lorax.split(params)
    leaves, treedef = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [x + 0.3 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return lorax.join(jax.tree.unflatten(treedef, drawn), frozen)


OURS = {
    "all-linear": {"targets": "all-linear", "rank": 3},
    "rslora and patterns": {
        "targets": ("*/q_proj/kernel", "*/down_proj/kernel"),
        "rank": {"*/q_proj/*": 2, "*": 4},
        "alpha": {"*/q_proj/*": 3.0, "*": 8.0},
        "scaling": "rslora",
    },
    "dora": {"targets": "all-linear", "rank": 3, "variant": "dora"},
    "norms whole": {"targets": "*/v_proj/kernel", "rank": 3, "train_also": ("norm/scale", "*/attn_norm/scale")},
    "biases": {"targets": "*/q_proj/kernel", "rank": 3, "train_also": "*/bias"},
    "projections whole": {"targets": "*/q_proj/kernel", "rank": 3, "train_also": "*/k_proj/kernel"},
    "projections and biases whole": {"targets": "*/q_proj/kernel", "rank": 3, "train_also": "*/k_proj/*"},
    "embedding": {"targets": ("embed/embedding", "*/o_proj/kernel"), "rank": 3},
    "embedding whole": {"targets": "*/o_proj/kernel", "rank": 3, "train_also": "embed/embedding"},
}


@pytest.mark.parametrize("spec", OURS.values(), ids=OURS)
def test_peft_computes_what_lorax_saved(spec, base, tmp_path):
    folder, _ = base
    model = load(str(folder))
    ids = jax.ShapeDtypeStruct((1, 5), jnp.int32)
    params = moved(lorax.adapt(jax.random.key(0), model.params, lorax.LoraSpec(**spec), fn=model.apply, args=(ids,)))
    save_adapter(tmp_path / "a", params, base_name=str(folder))
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "a").eval()
    plain = np.asarray(model.apply(model.params, jnp.asarray(IDS)))
    mine = ours(model, params)
    assert np.abs(mine - plain).max() > 0.1
    np.testing.assert_allclose(theirs(peft), mine, atol=1e-4, rtol=1e-4)


THEIRS = {
    "plain": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"},
    "rslora": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    "patterns": {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"q_proj": 2, r".*\.2\.mlp\.up_proj": 4},
        "alpha_pattern": {r"layers\.[01]\.self_attn\.q_proj": 9},
    },
    "dora": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear", "use_dora": True},
    "dora, some layers": {"r": 2, "target_modules": ["k_proj"], "layers_to_transform": [0, 2], "use_dora": True},
    "some layers": {"r": 2, "target_modules": ["k_proj"], "layers_to_transform": [0, 2]},
    "whole modules": {"r": 2, "target_modules": ["k_proj"], "modules_to_save": ["input_layernorm"]},
    "biases": {"r": 2, "target_modules": ["q_proj"], "bias": "all"},
    # PEFT replaces the same rows of a tied head.
    "rows of the embedding": {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [3, 9, 36]},
}


def peft_adapter(base, tmp_path, **settings):
    folder, _ = base
    peft = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(**settings)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    peft.save_pretrained(tmp_path / "theirs")
    return peft, tmp_path / "theirs"


@pytest.mark.parametrize("settings", THEIRS.values(), ids=THEIRS)
def test_lorax_computes_what_peft_saved(settings, base, tmp_path):
    peft, saved = peft_adapter(base, tmp_path, **settings)
    model = load(str(base[0]))
    mine = ours(model, load_adapter(saved, model.params))
    assert np.abs(mine - np.asarray(model.apply(model.params, jnp.asarray(IDS)))).max() > 0.1
    np.testing.assert_allclose(mine, theirs(peft), atol=1e-4, rtol=1e-4)


def test_factors_for_the_embedding_depend_on_the_tie(base, tmp_path):
    """PEFT changes the lookup alone; over a tied base that is another model, and refused."""
    peft, saved = peft_adapter(base, tmp_path, r=2, target_modules=["embed_tokens", "q_proj"])
    model = load(str(base[0]))
    if base[1]:
        with pytest.raises(LoraxError, match="ensure_weight_tying is off"):
            load_adapter(saved, model.params)
    else:
        mine = ours(model, load_adapter(saved, model.params))
        np.testing.assert_allclose(mine, theirs(peft), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"init_lora_weights": "pissa"}], ids=["pissa"])
def test_what_lorax_does_not_have_is_refused(settings, base, tmp_path):
    _, saved = peft_adapter(base, tmp_path, r=2, target_modules=["q_proj"], **settings)
    with pytest.raises(LoraxError, match=next(iter(settings))):
        load_adapter(saved, load(str(base[0])).params)


def scores(model, ids):
    """transformers' scores of each row, at its last token."""
    with torch.no_grad():
        return model(torch.tensor(ids, dtype=torch.long)).logits.float().numpy()


@pytest.mark.parametrize("outputs", [1, 3], ids=["number", "labels"])
def test_a_classifier_is_transformers_in_both_directions(outputs, base, tmp_path):
    folder, _ = base
    names = ["value"] if outputs == 1 else ["few", "many", "none"]
    model = with_labels(load(str(folder)), names, jax.random.key(3), regression=outputs == 1)
    save_hf(tmp_path / "ours", model, model.params)
    peer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours", pad_token_id=0).eval()
    want = np.asarray(model.apply(model.params, jnp.asarray(IDS)))[:, -1]
    np.testing.assert_allclose(scores(peer, IDS), want, atol=1e-4, rtol=1e-4)
    assert [peer.config.id2label[i] for i in range(outputs)] == names
    torch.manual_seed(0)
    config = Qwen2Config.from_pretrained(folder, num_labels=outputs, pad_token_id=0)
    other = Qwen2ForSequenceClassification(config).eval()
    other.save_pretrained(tmp_path / "theirs")
    back = load(str(tmp_path / "theirs"))
    assert (len(back.config.labels), back.config.regression) == (outputs, outputs == 1)
    got = np.asarray(back.apply(back.params, jnp.asarray(IDS)))[:, -1]
    np.testing.assert_allclose(got, scores(other, IDS), atol=1e-4, rtol=1e-4)


def test_factors_and_a_head_over_labels_load_in_peft(base, tmp_path):
    folder, _ = base
    model = with_labels(load(str(folder)), ("a", "b", "c"), jax.random.key(3))
    spec = lorax.LoraSpec(targets="*/q_proj/kernel", rank=2, train_also="score/*")
    params = moved(lorax.adapt(jax.random.key(0), model.params, spec))
    save_adapter(tmp_path / "a", params, base_name=str(folder), labels=model.config.labels)
    peer = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0)
    peft = PeftModel.from_pretrained(peer, tmp_path / "a").eval()
    np.testing.assert_allclose(scores(peft, IDS), ours(model, params)[:, -1], atol=1e-4, rtol=1e-4)
    # And from PEFT's own files, without our notes.
    peft.save_pretrained(tmp_path / "theirs")
    back = load_adapter(tmp_path / "theirs", model.params)
    np.testing.assert_allclose(ours(model, back)[:, -1], ours(model, params)[:, -1], atol=1e-4, rtol=1e-4)
