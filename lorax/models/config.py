"""What a decoder of the Llama family is, in numbers: read from and written to Hugging Face's
`config.json`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorax.errors import LoraxError
from lorax.models.packed import check_config

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# What a key means when the file leaves it out: the defaults of each family's published configuration class.
_LENGTHS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretching of the rotary frequencies for contexts longer than the original training.

    factor: how much the slow frequencies are divided by.
    low_freq_factor, high_freq_factor: original_max_length divided by these are the wavelengths (in tokens)
        above which a frequency is divided and below which it is kept; in between the two are blended.
    original_max_length: the context length of the original training, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_length: int


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder. Hashable, so that compiled functions can be keyed by it.

    family: "llama" (also SmolLM2), "mistral", "qwen2" (also Qwen2.5) or "qwen3".
    norm_eps: added to the mean square inside RMSNorm.
    rope_theta: base of the rotary frequencies, theta^(-2i / head_dim).
    attention_bias, output_bias: whether queries, keys and values, and attention's output, have biases.
    sliding_window: a token sees itself and this many minus one before it; None for all.
    full_layers: this many of the first layers see everything in spite of the window.
    max_length: the longest context that the model was trained for, in tokens.
    eos_ids: tokens that end a generation, besides the tokenizer's own.
    labels: what a classifier tells apart, in the order of its outputs; empty for a language model. Its head is `score`
        instead of one over the vocabulary, and is read at the last token of a text.
    regression: the outputs are numbers, not classes.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    full_layers: int = 0
    max_length: int = 2048
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()
    regression: bool = False

    def __post_init__(self) -> None:
        if self.family not in ARCHITECTURES:
            raise LoraxError(f"model config: family {self.family!r} is unknown; choose one of {tuple(ARCHITECTURES)}")
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim", "max_length"):
            _positive(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise LoraxError(
                f"model config: num_heads {self.num_heads} is not a multiple of num_kv_heads "
                f"{self.num_kv_heads}; each key head serves a whole group of query heads"
            )
        if self.head_dim % 2:
            raise LoraxError(f"model config: head_dim {self.head_dim} is odd; rotary embedding pairs features")
        if self.sliding_window is not None:
            _positive("sliding_window", self.sliding_window)
        if not 0 <= self.full_layers < self.num_layers or (self.full_layers and self.sliding_window is None):
            raise LoraxError(
                f"model config: full_layers {self.full_layers} must leave some of {self.num_layers} layers a window"
            )

    @classmethod
    def from_hf(cls, config_json: dict[str, Any]) -> ModelConfig:
        """The config from the contents of a Hugging Face `config.json`.

        Raises:
            LoraxError: another architecture, a missing or malformed value, or an option outside this decoder.

        Example:
            >>> ModelConfig.from_hf({"model_type": "llama", "vocab_size": 11, "hidden_size": 8,
            ...     "num_hidden_layers": 2, "intermediate_size": 12, "num_attention_heads": 2}).head_dim
            4
        """
        return _from_hf(cls, config_json)

    def to_hf(self) -> dict[str, Any]:
        """The contents of a `config.json` that Hugging Face transformers reads; `from_hf` is its inverse."""
        return _to_hf(self)


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise LoraxError(f"model config: {name} must be a whole number of at least 1, not {value!r}")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise LoraxError(f"config.json: {name} must be a number above 0, not {value!r}")
    return float(value)


def _from_hf(cls: type[ModelConfig], c: dict[str, Any]) -> ModelConfig:
    if not isinstance(c, dict):
        raise LoraxError("config.json: not a JSON object; point at the directory of a Hugging Face model")
    family = c.get("model_type")
    if family not in ARCHITECTURES:
        raise LoraxError(f"config.json: model_type {family!r} is not served; lorax reads {tuple(ARCHITECTURES)}")
    _refuse_unknown(c, family)
    check_config(c.get("quantization_config"))

    def size(key: str, default: int | None = None) -> int:
        value = c.get(key)
        value = default if value is None else value
        if value is None:
            raise LoraxError(f"config.json: {key} is missing; the file is not a complete {family} config")
        return _positive(f"{key} in config.json", value)

    heads = size("num_attention_heads")
    hidden = size("hidden_size")
    theta, scaling = _rope(c)
    window, full = _sliding_window(c, family)
    bias = bool(c.get("attention_bias")) and family != "qwen2"
    return cls(
        family=family,
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        num_layers=size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=size("num_key_value_heads", _KV_HEADS.get(family, heads)),
        head_dim=size("head_dim", 128 if family == "qwen3" else max(hidden // heads, 1)),
        norm_eps=_number("rms_norm_eps", c.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=bool(c.get("tie_word_embeddings", False)),
        attention_bias=family == "qwen2" or bias,
        output_bias=bias,
        qk_norm=family == "qwen3",
        sliding_window=window,
        full_layers=full,
        max_length=size("max_position_embeddings", _LENGTHS[family]),
        bos_id=_token("bos_token_id", c.get("bos_token_id")),
        eos_ids=_tokens("eos_token_id", c.get("eos_token_id")),
        **_labels(c),
    )


def _labels(c: dict[str, Any]) -> dict[str, Any]:
    """A classifier's outputs, as transformers' `...ForSequenceClassification` names them; nothing for other models."""
    architectures = c.get("architectures")
    kinds = architectures if isinstance(architectures, list) else []
    if not any(str(kind).endswith("ForSequenceClassification") for kind in kinds):
        return {}
    # What its configuration class takes when the file leaves it out.
    names = c.get("id2label") or {str(i): f"LABEL_{i}" for i in range(2)}
    if not isinstance(names, dict) or sorted(names) != sorted(map(str, range(len(names)))):
        raise LoraxError("config.json: id2label must have an entry for each output, numbered from 0")
    labels = tuple(str(names[str(i)]) for i in range(len(names)))
    kind = c.get("problem_type") or ("regression" if len(labels) == 1 else "single_label_classification")
    if kind not in ("regression", "single_label_classification"):
        raise LoraxError(f"config.json: problem_type {kind!r} is not served; one class of several, or numbers, are")
    return {"labels": labels, "regression": kind == "regression"}


def _refuse_unknown(c: dict[str, Any], family: str) -> None:
    """Options that would change the arithmetic and that this decoder does not have."""
    # Llama and Qwen3 have biases on all four projections or on none, Qwen2 on three of them, Mistral never.
    biases = {"qwen2": (True, None), "mistral": (False, None)}.get(family, (False, True, None))
    served = {"hidden_act": ("silu", "swish"), "mlp_bias": (False, None), "attention_bias": biases}
    for key, values in served.items():
        if key in c and c[key] not in values:
            raise LoraxError(f"config.json: {key} = {c[key]!r} is not served for {family}; only {values[0]!r} is")
    if c.get("partial_rotary_factor", 1.0) != 1.0:
        raise LoraxError("config.json: partial_rotary_factor other than 1 is not served")


def _rope(c: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Rotary base and scaling; newer files keep both in `rope_parameters`, older in two keys."""
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise LoraxError(f"config.json: the rope parameters must be an object, not {rope!r}")
    theta = _number("rope_theta", rope.get("rope_theta", c.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise LoraxError(f"config.json: rope scaling {kind!r} is not served; only 'default' and 'llama3' are")
    low, high = (_number(key, rope.get(key)) for key in ("low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise LoraxError(f"config.json: high_freq_factor {high} must be above low_freq_factor {low}")
    original = _positive("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
    return theta, RopeScaling(_number("factor", rope.get("factor")), low, high, original)


def _sliding_window(c: dict[str, Any], family: str) -> tuple[int | None, int]:
    """The window, and how many of the first layers are without one.

    Mistral's window holds for all layers; Qwen's only if asked for, and then from layer `max_window_layers` on.
    """
    if family == "llama":
        return None, 0
    window, layers, full = c.get("sliding_window", 4096), c.get("num_hidden_layers", 0), 0
    if family != "mistral":
        window = window if c.get("use_sliding_window", False) else None
        full = c.get("max_window_layers", 28)
        if isinstance(full, bool) or not isinstance(full, int) or full < 0:
            raise LoraxError(f"config.json: max_window_layers must be a number of layers, not {full!r}")
    window, full = (None, 0) if window is None or full >= layers else (window, full)
    kinds = ["full_attention"] * (layers if window is None else full)
    kinds += ["sliding_attention"] * (layers - len(kinds))
    if family != "mistral" and c.get("layer_types") not in (None, kinds):
        raise LoraxError(
            "config.json: layer_types is not what use_sliding_window and max_window_layers say; other orders of full "
            "and sliding attention are not served"
        )
    return window, full


def _token(name: str, value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise LoraxError(f"config.json: {name} must be a token id, not {value!r}")
    return value


def _tokens(name: str, value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    return tuple(token for token in (_token(name, v) for v in values) if token is not None)


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    out: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling_to_hf(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_length,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else list(config.eos_ids) or None,
    }
    if config.family != "qwen2":
        out["attention_bias"] = config.attention_bias
    if config.family != "llama":
        out["sliding_window"] = config.sliding_window
    if config.labels:
        out["architectures"] = [ARCHITECTURES[config.family].replace("ForCausalLM", "ForSequenceClassification")]
        out["id2label"] = {str(i): label for i, label in enumerate(config.labels)}
        out["label2id"] = {label: i for i, label in enumerate(config.labels)}
        out["problem_type"] = "regression" if config.regression else "single_label_classification"
    if config.family in ("qwen2", "qwen3"):
        out["use_sliding_window"] = config.sliding_window is not None
        out["max_window_layers"] = config.num_layers if config.sliding_window is None else config.full_layers
    return out


def _scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_length,
    }
