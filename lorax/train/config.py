"""What a run is: every setting that decides its weights, in one flat record."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorax.errors import LoraxError

if TYPE_CHECKING:
    from lorax.quant import QuantSpec

# Methods whose result is an adapter; the others change whole weights.
ADAPTERS = ("lora", "qlora")

Method = Literal["lora", "qlora", "full", "head", "last-k"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a fine-tuning run."""

    base: str = "smollm2-135m"
    """A directory of Hugging Face safetensors, a .gguf file, hf:org/name, or smollm2-135m."""
    task: Literal["medical", "legal", "code"] | None = None
    """A built-in demo task: code -> chapter, licence text -> SPDX id, docstring -> function name."""
    data: str | None = None
    """JSONL of your own: chat ("messages"), "prompt"/"completion", "prompt"/"label", or for DPO
    "prompt"/"chosen"/"rejected" rows."""
    eval_data: str | None = None
    """Held-out JSONL, in the same format as --data."""
    method: Method = "lora"
    """What may change: low-rank factors (qlora: over a quantised base), every weight, the output head, or the last k
    blocks."""
    head: Literal["lm", "classification", "regression"] = "lm"
    """What the model says: text, one of the labels that the data has, or a number. The last two put a small head on the
    features of the last token (or train on the one that the base has); it trains with every method."""
    loss: Literal["sft", "dpo"] = "sft"
    """Learn the answers of the data, or (DPO) to prefer the chosen over the rejected ones."""
    beta: float = 0.1
    """DPO: how much a change against the reference, the base without adapters, counts."""
    rank: int = 16
    """LoRA rank r."""
    alpha: float = 32.0
    """LoRA alpha; the change is scaled by alpha/r (lora) or alpha/sqrt(r) (rslora)."""
    targets: tuple[str, ...] = ("all-linear",)
    """Weights that get factors: globs over paths such as layers/attn/q_proj/kernel, or all-linear."""
    train_also: tuple[str, ...] = ()
    """Weights that train as they are beside the method's own: globs, such as */bias, *norm*/scale or embed/*."""
    rank_pattern: tuple[str, ...] = ()
    """Ranks of some weights, as GLOB=RANK; the first that fits counts, --rank is for the others."""
    alpha_pattern: tuple[str, ...] = ()
    """Alphas of some weights, as GLOB=ALPHA, likewise."""
    scaling: Literal["lora", "rslora"] = "lora"
    """How alpha becomes the scale."""
    variant: Literal["lora", "dora", "lora-fa", "vera"] = "lora"
    """Kind of change: low-rank; lengths and directions apart (dora); A frozen (lora-fa); shared factors (vera)."""
    init: Literal["gaussian", "uniform", "pissa", "pissa-fast", "milora", "milora-fast", "olora", "eva"] = "gaussian"
    """How the factors start: at random, in the weight (pissa, milora, olora), or in the data's activations (eva)."""
    dropout: float = 0.0
    """Probability of dropping an input of the low-rank path."""
    lora_plus: float = 1.0
    """LoRA+: the learning rate of B over that of A; 16 is the paper's."""
    quant: Literal["nf4", "fp4", "int8", "bf16"] = "nf4"
    """Format of the base with --method qlora."""
    double_quant: bool = True
    """Scales of the quantised base in 8 bits as well: 4.127 bits a parameter instead of 4.5."""
    quant_block: Literal[32, 64, 128, 256] = 64
    """Parameters that share a scale in the quantised base."""
    loftq: int = 0
    """Turns of LoftQ with --method qlora in 4 bits: factors that start by making up for the quantisation error instead
    of at zero. With 1 the base stays as it is; more make one of its own, which is saved beside the adapter; 5 come
    nearest to LoRA over an unquantised base."""
    last_k: int = 2
    """Blocks that train with --method last-k."""
    lr: float = 1e-3
    """Peak learning rate."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """AdamW, or AdamW with its moments in 8 bits."""
    paged: bool = False
    """Keep the optimizer's state in host memory between steps, where the platform has pinned_host memory."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the base's weights and of the arithmetic; factors are float32 whatever it is."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    steps: int | None = None
    """Optimizer steps; by default what --epochs comes to."""
    epochs: float = 1.0
    """Passes over the data, when --steps is not given."""
    batch_size: int = 16
    """Rows in a micro-batch."""
    seq_len: int = 512
    """Longest row in tokens; longer examples are cut or refused by the data reader."""
    accumulate: int = 1
    """Micro-batches to an optimizer step; their mean is over tokens, exactly as in one large batch."""
    clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    warmup: int = 0
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up."""
    remat: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    pack: bool = False
    """Several examples to a row, each with its own attention and positions."""
    eval_every: int = 0
    """Evaluate every so many steps too; 0 is before and after only."""
    eval_items: int = 300
    """Held-out examples to evaluate on."""
    save_every: int = 50
    """Steps between checkpoints; one is always written at the end."""
    seed: int = 0
    """Decides the factors, the order of the data and everything else that is drawn."""

    def check(self) -> None:
        """Refuse what cannot work before anything is loaded.

        Raises:
            LoraxError: names the setting.
        """
        if (self.task is None) == (self.data is None):
            raise LoraxError("give either --task or --data: a built-in task, or a JSONL file of your own")
        for name in ("data", "eval_data"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise LoraxError(f"{path}: no such file (--{name.replace('_', '-')})")
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise LoraxError(f"{name} is {value}: must be at least {least}")
            if value is not None and value > _AT_MOST:
                raise LoraxError(f"{name} is {value}: must be at most {_AT_MOST}")
        for name in ("lr", "alpha", "epochs", "lora_plus", "beta"):
            if not 0 < getattr(self, name) < float("inf"):
                raise LoraxError(f"{name} is {getattr(self, name)}: must be above 0")
        if self.method not in ADAPTERS and self.dtype != "float32":
            raise LoraxError(
                f"--dtype {self.dtype}: --method {self.method} would train weights of that dtype, which swallow small "
                "steps; leave it out, or train factors with --method lora or qlora"
            )
        self._check_variant()
        self._check_task()
        self.ranks()
        self.alphas()
        if self.loftq and self.method != "qlora":
            raise LoraxError(f"--loftq {self.loftq}: makes up for quantisation, and --method {self.method} has none")
        if self.loftq and self.quant not in ("nf4", "fp4"):
            raise LoraxError(f"--loftq {self.loftq}: its base is kept in 4 bits; use --quant nf4 or fp4")
        if not self.targets:
            raise LoraxError('targets is empty: give at least one pattern, for instance "all-linear"')

    def _check_variant(self) -> None:
        """Settings of the low-rank change that nothing would heed, or that contradict each other."""
        if not 0 <= self.dropout < 1:
            raise LoraxError(f"dropout is {self.dropout}: must be a probability below 1")
        for name, plain in (("variant", "lora"), ("init", "gaussian"), ("dropout", 0.0), ("lora_plus", 1.0)):
            value = getattr(self, name)
            if value != plain and self.method not in ADAPTERS:
                raise LoraxError(f"--{name.replace('_', '-')} {value}: --method {self.method} has no low-rank change")
        if self.variant == "vera" and self.init != "gaussian":
            raise LoraxError(f"--init {self.init}: --variant vera has its own start")
        if self.loftq and (self.init != "gaussian" or self.variant != "lora"):
            raise LoraxError(f"--loftq {self.loftq}: starts plain factors its own way; leave --init and --variant out")
        if self.moves_base and self.method == "qlora":
            raise LoraxError(f"--init {self.init}: takes its factors out of the weights, and a quantised base has none")

    def _check_task(self) -> None:
        """Heads, losses and weights that train beside, where they do not go together."""
        if self.loss == "dpo":
            for bad, why in (
                (self.method not in ADAPTERS, f"--method {self.method} leaves no base to compare with"),
                (bool(self.train_also), "--train-also leaves no base of those weights to compare with"),
                (self.head != "lm", f"--head {self.head} writes no answers"),
                (self.moves_base, f"--init {self.init} takes its factors out of the base that it compares with"),
                (bool(self.loftq), f"--loftq {self.loftq} starts somewhere else than the base that it compares with"),
                (self.pack, "--pack puts answers together that are compared"),
            ):
                if bad:
                    raise LoraxError(f"--loss dpo: {why}; leave one of them out")
        elif self.beta != 0.1:
            raise LoraxError(f"--beta {self.beta}: is DPO's; add --loss dpo")
        if self.train_also and self.method == "full":
            raise LoraxError(f"--train-also {self.train_also[0]}: with --method full everything trains already")
        whole = "--train-also" if self.train_also else f"--head {self.head}" if self.head != "lm" else None
        if whole and self.dtype != "float32":
            raise LoraxError(
                f"--dtype {self.dtype}: {whole} trains weights of that dtype, which swallow small steps; leave it out"
            )
        for name in ("rank_pattern", "alpha_pattern"):
            if getattr(self, name) and self.method not in ADAPTERS:
                raise LoraxError(f"--{name.replace('_', '-')}: --method {self.method} has no low-rank change")

    def ranks(self) -> int | dict[str, int]:
        """The rank, or one for each pattern.

        Raises:
            LoraxError: an entry of --rank-pattern that is none.
        """
        found = _pattern("rank_pattern", self.rank_pattern, int, "a whole number of at least 1")
        return {**found, "*": self.rank} if found else self.rank

    def alphas(self) -> float | dict[str, float]:
        """The alpha, or one for each pattern; see `ranks`."""
        found = _pattern("alpha_pattern", self.alpha_pattern, float, "a number above 0")
        return {**found, "*": self.alpha} if found else self.alpha

    @property
    def moves_base(self) -> bool:
        """Whether the factors start in the weights, and the base is what is left."""
        return self.init not in ("gaussian", "uniform", "eva")

    @property
    def quantised(self) -> QuantSpec | None:
        """How the base is packed while it is loaded; None if it is not."""
        if self.method != "qlora":
            return None
        from lorax.quant import QuantSpec  # as late as the weights: `lorax train --help` needs none of it

        return QuantSpec(self.quant, self.double_quant, self.quant_block)

    def as_json(self) -> dict[str, Any]:
        """The settings as JSON keeps them (tuples become lists)."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def _pattern(name: str, entries: tuple[str, ...], kind: Callable[[str], Any], wanted: str) -> dict[str, Any]:
    """GLOB=VALUE entries as a mapping."""
    out: dict[str, Any] = {}
    for entry in entries:
        glob, _, text = entry.rpartition("=")
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not glob or not 0 < value <= _AT_MOST:
            raise LoraxError(f"--{name.replace('_', '-')} {entry}: must be GLOB=VALUE, the value {wanted}")
        out[glob] = value
    return out


# Counts and seeds are 32-bit numbers somewhere below.
_AT_MOST = 2**31 - 1
_AT_LEAST = {
    "rank": 1, "last_k": 1, "steps": 1, "batch_size": 1, "seq_len": 2, "accumulate": 1, "clip": 0, "loftq": 0,
    "warmup": 0, "weight_decay": 0, "eval_every": 0, "eval_items": 1, "save_every": 1, "seed": 0,
}  # fmt: skip


def same_run(recorded: dict[str, Any], now: dict[str, Any], place: Path) -> None:
    """Refuse to resume with other settings than the run began with: the weights would be nobody's.

    Raises:
        LoraxError: names the first field that differs, and both values.
    """
    for name in sorted(set(recorded) | set(now)):
        if recorded.get(name) != now.get(name):
            raise LoraxError(
                f"{place}: the run began with {name}={recorded.get(name)!r} and cannot resume with "
                f"{now.get(name)!r}; leave that setting alone or start another run with another --out"
            )
