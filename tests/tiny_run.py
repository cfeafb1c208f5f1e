"""A base model small enough to train in a second: random weights in a Hugging Face directory, bytes for
tokens."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

LAYERS, WIDTH, HIDDEN, HEADS, VOCAB = 3, 16, 24, 2, 260

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny_base(folder: Path, seed: int = 0) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(scale=0.3, size=shape).astype(np.float32)

    weights = {
        "model.embed_tokens.weight": draw(VOCAB, WIDTH),
        "model.norm.weight": np.ones(WIDTH, np.float32),
    }
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        weights |= {
            at + "input_layernorm.weight": np.ones(WIDTH, np.float32),
            at + "post_attention_layernorm.weight": np.ones(WIDTH, np.float32),
            at + "self_attn.q_proj.weight": draw(WIDTH, WIDTH),
            at + "self_attn.k_proj.weight": draw(WIDTH // HEADS, WIDTH),
            at + "self_attn.v_proj.weight": draw(WIDTH // HEADS, WIDTH),
            at + "self_attn.o_proj.weight": draw(WIDTH, WIDTH),
            at + "mlp.gate_proj.weight": draw(HIDDEN, WIDTH),
            at + "mlp.up_proj.weight": draw(HIDDEN, WIDTH),
            at + "mlp.down_proj.weight": draw(WIDTH, HIDDEN),
        }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 1,
        "head_dim": WIDTH // HEADS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 512,
        "bos_token_id": 257,
        "eos_token_id": 258,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT}))


def write_examples(path: Path, count: int, seed: int = 0) -> Path:
    """Prompts of odd lengths whose completion is their first letter, doubled."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        word = "".join(rng.choice(list("abcdefgh"), size=rng.integers(3, 12)))
        rows.append({"prompt": word, "completion": word[0] * 2})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def same_weights(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """Two runs of one arithmetic in another order of sums. Adam divides a gradient by its own size, so where one is
    nothing but rounding its sign decides a step: one number in two hundred may differ by more than rounding.
    """
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        off = np.abs(ours[name] - value) > 5e-5 * np.abs(value).max()
        assert off.mean() <= 0.005, (name, off.mean())
