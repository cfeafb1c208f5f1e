"""DPO against TRL: the same adapter, the same pairs, the same loss and gradients."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import tokenizers
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

import lorax
from lorax.data import Example, eval_batches
from lorax.io.peft import load_adapter
from lorax.models import load
from lorax.train.preference import preference_loss

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

BETA = 0.3
PAIRS = [
    {"prompt_ids": [1, 5, 9], "chosen_ids": [4, 7, 2], "rejected_ids": [8]},
    {"prompt_ids": [3], "chosen_ids": [6, 6], "rejected_ids": [11, 30, 12, 2]},
    {"prompt_ids": [20, 21], "chosen_ids": [22], "rejected_ids": [23, 24]},
]


def tokenizer():
    words = {f"w{i}": i for i in range(35)} | {"<pad>": 35, "<eos>": 36}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_loss_and_gradients_are_trls(tied, tmp_path):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=37, hidden_size=12, intermediate_size=20, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=1, tie_word_embeddings=tied, max_position_embeddings=64, initializer_range=0.3,
        use_sliding_window=False, pad_token_id=35, eos_token_id=36,
    )  # fmt: skip
    base = Qwen2ForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    # A new adapter: of one that was there TRL would take a copy for its reference.
    trainer = DPOTrainer(
        base,
        args=DPOConfig(
            str(tmp_path / "out"), beta=BETA, use_cpu=True, report_to=[], bf16=False, gradient_checkpointing=False
        ),
        train_dataset=Dataset.from_list([{"prompt": "w1", "chosen": " w2", "rejected": " w3"}] * 2),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "down_proj"]),
    )
    peft = trainer.model
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    peft.save_pretrained(tmp_path / "adapter")
    peft.eval()
    # TRL's padding must not be a token that counts.
    theirs = trainer._compute_loss(trainer.model, DataCollatorForPreference(pad_token_id=35)(PAIRS), False)
    theirs.backward()
    wanted = {name: p.grad.numpy() for name, p in peft.named_parameters() if p.grad is not None}

    model = load(str(tmp_path / "base"))
    trainable, frozen = lorax.split(load_adapter(tmp_path / "adapter", model.params))
    examples = [
        Example(tuple(p["prompt_ids"]), tuple(p[side])) for p in PAIRS for side in ("chosen_ids", "rejected_ids")
    ]
    (batch,) = eval_batches(examples, batch_size=4, seq_len=16, group=2)
    loss = preference_loss(model, BETA)
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (total, pairs), grads = step(trainable, frozen, batch, jax.random.key(0))
    assert float(pairs) == 3
    assert float(total / pairs) == pytest.approx(float(theirs), rel=1e-4)
    assert abs(float(theirs) - np.log(2)) > 1e-2
    compared = 0
    for module, path in (("self_attn.q_proj", ("attn", "q_proj")), ("mlp.down_proj", ("mlp", "down_proj"))):
        leaf = grads["layers"][path[0]][path[1]]["kernel"]
        for layer in range(3):
            for letter, ours in (("A", leaf.A), ("B", leaf.B)):
                name = f"base_model.model.model.layers.{layer}.{module}.lora_{letter}.default.weight"
                np.testing.assert_allclose(np.asarray(ours[layer]).T / 3, wanted[name], atol=1e-4, rtol=1e-3)
                compared += 1
    assert compared == len(wanted)
