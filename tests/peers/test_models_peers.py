"""The decoder beside the installed transformers: fresh golden logits, and directories that it reads."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lorax.models import load, save_hf

pytestmark = pytest.mark.peers

GOLDEN = Path(__file__).parents[1] / "golden"
_spec = importlib.util.spec_from_file_location("make_models", GOLDEN / "make_models.py")
assert _spec is not None
assert _spec.loader is not None
make_models = importlib.util.module_from_spec(_spec)
sys.modules["make_models"] = make_models
_spec.loader.exec_module(make_models)


@pytest.mark.parametrize("family", make_models.FAMILIES)
def test_family_against_the_installed_transformers(family, tmp_path):
    from transformers import AutoModelForCausalLM

    peer = make_models.peer(make_models.FAMILIES[family])
    peer.save_pretrained(tmp_path / "theirs")
    model = load(tmp_path / "theirs")
    ids = make_models.token_ids(make_models.FAMILIES[family]["vocab_size"])
    want = make_models.peer_logits(peer, ids)
    np.testing.assert_allclose(model.apply(model.params, jnp.asarray(ids)), want, atol=1e-4, rtol=0)
    with np.load(GOLDEN / "models" / family / "golden.npz") as file:
        np.testing.assert_allclose(file["logits"], want, atol=1e-5, rtol=0)

    save_hf(tmp_path / "ours", model, model.params)
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    np.testing.assert_allclose(make_models.peer_logits(back, ids), want, atol=1e-5, rtol=0)
