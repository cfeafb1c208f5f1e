"""Makes the golden adapters of `tests/golden/peft`: what PEFT writes, and the logits it computes with it.

    python tests/golden/make_peft.py        (needs the `peers` extra: torch, transformers, peft)

Adapters of older releases, each in a folder of its own beside the rest of the environment:

    python -m pip install --no-deps --target old/0.1.0 peft==0.1.0
    PYTHONPATH=old/0.1.0 python tests/golden/make_peft.py old

The bases are models of `make_models`, whose weights are made from their names. Each folder has the two files that PEFT
saves and `golden.npz` with token ids and logits. The values of an adapter are made from its tensors' names, too.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import make_models

FOLDER = Path(__file__).parent / "peft"

# name -> (base, settings of LoraConfig)
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama2", {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}),
    "rslora": ("qwen2.5", {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    "patterns": (
        "llama2",
        {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"v_proj": 1},
            "alpha_pattern": {"up_proj": 9, r"layers\.[01]\.self_attn\.q_proj": 2},
        },
    ),
    "layer-ranks": (
        "llama2",
        {"r": 2, "lora_alpha": 5, "target_modules": ["o_proj"], "rank_pattern": {r".*\.2\.self_attn\.o_proj": 4}},
    ),
    "modules_to_save": (
        "llama2",
        {"r": 2, "lora_alpha": 3, "target_modules": ["k_proj"], "modules_to_save": ["input_layernorm", "lm_head"]},
    ),
    "biases": ("qwen2.5", {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "bias": "all"}),
    # Values that bfloat16 holds, saved as bfloat16; the logits are those of float32 arithmetic.
    "bf16": ("qwen2.5", {"r": 3, "lora_alpha": 4, "target_modules": ["k_proj", "gate_proj"]}),
    # The same in 16 bits of the other kind.
    "fp16": ("llama2", {"r": 2, "lora_alpha": 3, "target_modules": ["o_proj", "up_proj"]}),
}

# Releases that wrote pickles, or other settings: name -> (release, base, settings of LoraConfig). 0.1.0 is the oldest
# that runs beside today's torch without further packages.
OLD: dict[str, tuple[str, str, dict[str, Any]]] = {
    "peft-0.1.0": (
        "0.1.0",
        "llama2",
        {"lora_dropout": 0.0, "r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    ),
    "peft-0.1.0-biases": (
        "0.1.0",
        "qwen2.5",
        {"lora_dropout": 0.0, "r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "k_proj"], "bias": "all"},
    ),
    "peft-0.5.0": (
        "0.5.0",
        "llama2",
        {"r": 2, "lora_alpha": 3, "target_modules": ["k_proj"], "modules_to_save": ["input_layernorm", "lm_head"]},
    ),
    "peft-0.9.0": (
        "0.9.0",
        "qwen2.5",
        {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {"up_proj": 2},
            "use_rslora": True,
            "use_dora": True,
        },
    ),
}


def main() -> None:
    if sys.argv[1:] == ["old"]:
        return old()
    for name, (family, _) in ADAPTERS.items():
        model = peer(name, *ADAPTERS[name])
        ids = make_models.token_ids(make_models.FAMILIES[family]["vocab_size"])
        logits = make_models.peer_logits(model, ids)
        save(model, FOLDER / name, narrow={"bf16": "bfloat16", "fp16": "float16"}.get(name))
        np.savez_compressed(FOLDER / name / "golden.npz", ids=ids, logits=logits)
        print(name, family, np.abs(logits).max())


def old() -> None:
    """The adapters of the release that is installed."""
    import peft

    for name, (release, family, settings) in OLD.items():
        if release != peft.__version__:
            continue
        model = peer(name, family, settings)
        ids = make_models.token_ids(make_models.FAMILIES[family]["vocab_size"])
        logits = make_models.peer_logits(model, ids)
        save(model, FOLDER / name)
        np.savez_compressed(FOLDER / name / "golden.npz", ids=ids, logits=logits)
        print(name, family, np.abs(logits).max())


def peer(name: str, family: str, settings: dict[str, Any]) -> Any:
    """PEFT's model of an adapter, in float32, ready to run."""
    import torch
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_models.peer(make_models.FAMILIES[family]), LoraConfig(**settings)).eval()
    config = model.peft_config["default"] if isinstance(model.peft_config, dict) else model.peft_config
    config.base_model_name_or_path = family
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # PEFT's set has another order each time
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                at = f"adapter {key}"
                moved = torch.from_numpy(make_models.weights({at: list(parameter.shape)})[at])
                value = moved if "lora_" in key else parameter + 0.3 * moved
                kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name, torch.float32)
                parameter.copy_(value.to(kind).float())
    return model


def save(model: Any, folder: Path, narrow: str | None = None) -> None:
    """What `save_pretrained` writes, without the model card."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad and narrow:
            parameter.data = parameter.data.to(getattr(torch, narrow))
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
