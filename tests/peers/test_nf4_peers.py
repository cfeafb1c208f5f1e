"""The 4-bit format against the installed bitsandbytes and transformers, on fresh random weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from bitsandbytes import functional
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

import lorax
from lorax.models import load, save_hf
from lorax.quant import QuantSpec
from lorax_kernels import nf4

pytestmark = [pytest.mark.peers, pytest.mark.optimised, pytest.mark.filterwarnings("ignore")]

SHAPES = [(1,), (65,), (5, 13), (100, 70), (576, 192), (1536, 576), (3000, 1001), (4096, 1024)]


@pytest.fixture(autouse=True)
def two_threads():
    """The last bit of bitsandbytes' offset depends on torch's threads from 32,768 scales on; ours is that of two."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def pair(shape, dtype, block, double, format):
    x = torch.randn(shape, dtype=torch.float32).mul(0.05).to(getattr(torch, dtype))
    codes, state = functional.quantize_4bit(x, blocksize=block, compress_statistics=double, quant_type=format)
    return x, codes, state, nf4.quantize(jnp.asarray(x.float().numpy()).astype(dtype), block, double, format)


def dense_of(codes, state, block):
    """bitsandbytes' values, by its implementation for all devices.

    The one for AVX-512 (0.50.2) begins each row of the last axis with a block of its own where 16 divides the row and
    the block does not; `quantize_4bit` does not block so, and its codes come back as other weights.
    """
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    dense = _dequantize_4bit_compute(codes.reshape(-1), absmax, state.code, block, state.shape, state.dtype)
    if state.shape[-1] % block == 0:
        assert torch.equal(functional.dequantize_4bit(codes, state), dense)
    return dense.float().numpy()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize(
    ("dtype", "block", "double", "format"),
    [
        ("float32", 64, True, "nf4"),
        ("bfloat16", 64, True, "nf4"),
        ("float16", 32, True, "nf4"),
        ("float32", 128, False, "nf4"),
        ("bfloat16", 256, True, "fp4"),
    ],
)
def test_every_code_and_scale_is_equal(shape, dtype, block, double, format):
    for _ in range(3):
        _, codes, state, q = pair(shape, dtype, block, double, format)
        np.testing.assert_array_equal(np.asarray(q.codes).reshape(-1), codes.numpy().reshape(-1))
        np.testing.assert_array_equal(np.asarray(q.scales).reshape(-1), state.absmax.numpy())
        if double:
            np.testing.assert_array_equal(np.asarray(q.scales2), state.state2.absmax.numpy())
            assert float(q.offset) == state.offset.item()
        np.testing.assert_array_equal(np.asarray(nf4.dequantize(q).astype(jnp.float32)), dense_of(codes, state, block))


@pytest.mark.parametrize("double", [True, False])
def test_arrays_travel_both_ways(double):
    _, codes, state, q = pair((100, 128), "float32", 64, double, "nf4")
    theirs = {name: np.asarray(value) for name, value in state.as_dict(packed=True).items()} | {"weight": codes.numpy()}
    np.testing.assert_array_equal(nf4.dequantize(nf4.from_bitsandbytes(theirs)), nf4.dequantize(q))
    ours = {
        name: torch.from_numpy(np.array(value)) for name, value in nf4.bitsandbytes.to_checkpoint(q).items() if name
    }
    back = functional.QuantState.from_dict(ours, device=torch.device("cpu"))
    dense = functional.dequantize_4bit(torch.from_numpy(np.array(q.codes)).reshape(-1, 1), back)
    np.testing.assert_array_equal(dense.numpy(), nf4.dequantize(q))


def settings(**more):
    # Whole blocks in a row: where the processor has AVX-512, bitsandbytes reads other blocks' scales without that.
    return transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, **more,
    )  # fmt: skip


def logits_of(model, folder):
    ids = np.arange(1, 40)[None] % 97
    # Outside training, bitsandbytes rounds the scales to bfloat16 where a processor has AVX-512 BF16. No dropout here.
    model.train()
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids)).logits.float().numpy()
    ours = load(folder)
    return np.asarray(lorax.lift(ours.apply)(ours.params, jnp.asarray(ids))), theirs


def test_a_checkpoint_that_transformers_saved_in_4_bits(tmp_path):
    transformers.LlamaForCausalLM(settings()).save_pretrained(tmp_path / "plain")
    how = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=how, dtype=torch.float32
    )
    model.save_pretrained(tmp_path / "packed")
    ours, theirs = logits_of(model, tmp_path / "packed")
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    packed = load(tmp_path / "packed").params
    again = load(tmp_path / "plain", quantize=QuantSpec()).params
    for mine, other in zip(jax.tree.leaves(packed), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(other))


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_what_lorax_saved_in_4_bits(tmp_path, tied):
    transformers.LlamaForCausalLM(settings(tie_word_embeddings=tied)).save_pretrained(tmp_path / "plain")
    model = load(tmp_path / "plain", quantize=QuantSpec())
    save_hf(tmp_path / "packed", model, model.params)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    ours, theirs = logits_of(theirs, tmp_path / "packed")
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
