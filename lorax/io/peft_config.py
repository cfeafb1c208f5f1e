"""`adapter_config.json`: PEFT's description of an adapter, written plainly and read with suspicion.

    scale = lora_alpha / r          or lora_alpha / sqrt(r) with use_rslora

`rank_pattern` and `alpha_pattern` map a regular expression over module names to another r or alpha. A setting that
changes what the tensors mean and that lorax does not have is an error: an adapter is loaded as what it is or not.

Source: https://huggingface.co/docs/peft/package_reference/lora
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lorax.errors import LoraxError

# Settings that say nothing about what the stored tensors mean, or that the loader reads itself.
UNDERSTOOD = frozenset({
    "task_type", "auto_mapping", "peft_type", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules",
    "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "bias", "init_lora_weights",
    "eva_config", "megatron_core", "merge_weights",
    "trainable_token_indices", "qalora_group_size", "runtime_config", "ensure_weight_tying",
})  # fmt: skip
REASONS = {
    "fan_in_fan_out": "its base keeps weights as (in, out)",
    "layer_replication": "its base has layers twice",
    "enable_lora": "its factors are for parts of one fused projection",
    "lora_bias": "its factors carry biases",
    "target_parameters": "it changes parameters outside linear layers",
    "loftq_config": "it was trained over a quantised copy of the base",
}
# Starting points that leave the base weights as they are.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_QUANTIFIER = re.compile(r"[*+?{]")


class Module(NamedTuple):
    """A matrix with factors: its torch name, the name it shares with its sisters, its rank and its scale."""

    name: str
    short: str
    rank: int
    scale: float


def describe(
    modules: Sequence[Module], whole: Sequence[str], *, base_name: str | None, task: str | None, **more: Any
) -> Any:
    """The configuration of an adapter with these matrices.

    Args:
        modules: every matrix with factors.
        whole: names of modules that are stored whole.
        base_name: the base model's name.
        task: PEFT's word for what the model does, where the names are those of one it knows.
        more: further settings, as they are.
    """
    rslora = not _all_round(modules, False) and _all_round(modules, True)
    alphas = [_alpha(m, rslora)[0] for m in modules]
    (rank, alpha), _ = (
        Counter(zip([m.rank for m in modules], alphas, strict=True)).most_common(1)[0] if modules else ((1, 1.0), 0)
    )
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": rslora,
        "rank_pattern": _pattern(modules, [m.rank for m in modules], rank),
        "alpha_pattern": _pattern(modules, alphas, alpha),
        # PEFT refuses an empty list; this expression fits no module.
        "target_modules": sorted({m.short for m in modules}) or "(?!)",
        "modules_to_save": sorted(set(whole)) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        **more,
    }


def _alpha(module: Module, rslora: bool) -> tuple[float, bool]:
    """The alpha that gives a matrix its scale, and whether it is a number that somebody would have chosen."""
    divisor = math.sqrt(module.rank) if rslora else module.rank
    chosen = round(module.scale * divisor, 4)
    good = np.float32(chosen / divisor) == np.float32(module.scale)
    value = chosen if good else module.scale * divisor
    return (int(value) if float(value).is_integer() else value), bool(good)


def _all_round(modules: Sequence[Module], rslora: bool) -> bool:
    return all(_alpha(m, rslora)[1] for m in modules)


def _pattern(modules: Sequence[Module], values: Sequence[Any], usual: Any) -> dict[str, Any]:
    """Entries for the matrices that differ from the usual: one for all layers where they agree, else one each."""
    by_short: dict[str, set[Any]] = {}
    for module, value in zip(modules, values, strict=True):
        by_short.setdefault(module.short, set()).add(value)
    out = {}
    for module, value in zip(modules, values, strict=True):
        if by_short[module.short] != {usual}:
            name = module.short if len(by_short[module.short]) == 1 else module.name
            out[re.escape(name)] = value
    return out


class Settings(NamedTuple):
    """What the loader needs of a configuration; all of it checked."""

    rank: int
    alpha: float
    rslora: bool
    alpha_pattern: dict[str, float]
    whole: tuple[str, ...]
    bias: str
    tied: bool
    dora: bool
    tokens: tuple[int, ...]
    path: Path

    def scale(self, module: str, rank: int) -> float:
        """The scale of a module's change, given the rank of its stored factors.

        The first entry of `alpha_pattern` that fits the module's name, or the end of it after a dot, counts.
        """
        alpha = next((a for key, a in self.alpha_pattern.items() if _fits(key, module)), self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _fits(key: str, module: str) -> bool:
    return re.fullmatch(rf"(?:.*\.)?(?:{key})", module) is not None


def read(path: Path, loftq: bool = False) -> Settings:
    """Read and check a configuration.

    loftq: the folder says itself to which quantised base the factors belong, and that is checked elsewhere.

    Raises:
        LoraxError: it is missing, malformed, or describes what lorax cannot represent; the message has the setting.
    """
    raw = read_object(path)
    if raw.get("peft_type") != "LORA":
        raise LoraxError(f"{path}: peft_type is {_cut(raw.get('peft_type'))}; only LORA adapters are served")
    for name, value in raw.items():
        if name not in UNDERSTOOD and not (loftq and name == "loftq_config") and value not in (None, False, {}, [], ""):
            reason = REASONS.get(name, "lorax does not know what it changes")
            raise LoraxError(
                f"{path}: {name[:40]}={_cut(value)} is not served: {reason}; merge the adapter with PEFT first"
            )
    init = raw.get("init_lora_weights", True)
    if not any(init is ok or init == ok for ok in PLAIN_INITS) or (
        isinstance(init, (int, float)) and not isinstance(init, bool)
    ):
        raise LoraxError(
            f"{path}: init_lora_weights={_cut(init)} changes the base weights when training starts, so the factors "
            "fit another base; convert it with PEFT to plain LoRA first"
        )
    return Settings(
        rank=_whole_number(path, "r", raw.get("r", 8)),
        alpha=_number(path, "lora_alpha", raw.get("lora_alpha", 8)),
        rslora=_choice(path, "use_rslora", raw.get("use_rslora") or False, (True, False)),
        alpha_pattern=_checked_pattern(path, raw.get("alpha_pattern") or {}),
        whole=_names(path, raw.get("modules_to_save") or []),
        bias=_choice(path, "bias", raw.get("bias") or "none", ("none", "all", "lora_only")),
        tied=_choice(path, "ensure_weight_tying", raw.get("ensure_weight_tying") or False, (True, False)),
        dora=_choice(path, "use_dora", raw.get("use_dora") or False, (True, False)),
        tokens=_tokens(path, raw.get("trainable_token_indices")),
        path=path,
    )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        LoraxError: the file cannot be read or holds something else.
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise LoraxError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError):
        raise LoraxError(f"{path}: is not valid JSON; the adapter is damaged, save or fetch it again") from None
    if not isinstance(value, dict):
        raise LoraxError(f"{path}: is not a JSON object; the adapter is damaged, save or fetch it again")
    return value


def _cut(value: Any) -> str:
    return repr(value)[:60]


def _number(path: Path, name: str, value: Any) -> float:
    # float() of a JSON integer of a thousand digits overflows; so compare first.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e30 < value < 1e30:
        raise LoraxError(f"{path}: {name} is {_cut(value)}, not a finite number")
    return float(value)


def _whole_number(path: Path, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise LoraxError(f"{path}: {name} is {_cut(value)}, not a whole number of at least 1")
    return value


def _choice(path: Path, name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if not isinstance(value, (bool, str)) or value not in allowed:
        raise LoraxError(f"{path}: {name} is {_cut(value)}; known are {', '.join(map(repr, allowed))}")
    return value


def _names(path: Path, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise LoraxError(f"{path}: modules_to_save is {_cut(value)}, not a list of names")
    return tuple(value)


def _tokens(path: Path, value: Any) -> tuple[int, ...]:
    """Rows of the embedding that are replaced one by one: a list, or a list under the embedding's name."""
    if isinstance(value, dict) and value:
        other = next((name for name in value if name.rpartition(".")[2] != "embed_tokens"), None)
        if other is not None or len(value) > 1:
            raise LoraxError(
                f"{path}: trainable_token_indices of {_cut(other or list(value))} is not served: lorax replaces rows "
                "of embed_tokens alone; merge the adapter with PEFT first"
            )
        (value,) = value.values()
    rows = value or []
    if not isinstance(rows, list) or not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in rows):
        raise LoraxError(f"{path}: trainable_token_indices is {_cut(value)}, not a list of token ids")
    if len(set(rows)) != len(rows):
        raise LoraxError(f"{path}: trainable_token_indices has a token twice; the adapter is damaged")
    return tuple(rows)


def _checked_pattern(path: Path, value: Any) -> dict[str, float]:
    """alpha_pattern with its expressions tried: a file from elsewhere must not be able to make matching hang."""
    if not isinstance(value, Mapping):
        raise LoraxError(f"{path}: alpha_pattern is {_cut(value)}, not an object")
    for key in value:
        plain = re.sub(r"\\.", "x", key)
        if len(key) > 300 or (")" in plain and re.search(r"\)[*+?{]", plain)) or len(_QUANTIFIER.findall(plain)) > 3:
            raise LoraxError(f"{path}: alpha_pattern key {_cut(key)} is too involved; name the modules plainly")
        try:
            re.compile(rf"(?:.*\.)?(?:{key})")
        except (re.error, OverflowError, RecursionError):
            raise LoraxError(f"{path}: alpha_pattern key {_cut(key)} is not a regular expression") from None
    return {key: _number(path, f"alpha_pattern[{_cut(key)}]", alpha) for key, alpha in value.items()}
