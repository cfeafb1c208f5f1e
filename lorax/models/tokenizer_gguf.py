"""The tokenizer inside a GGUF file, rebuilt for the `tokenizers` library from its vocabulary, merges and names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from lorax.errors import LoraxError
from lorax.models.tokenizer import Tokenizer

# Kinds of token in the file: the others (unknown 2, unused 5, single bytes 6) are never the result of a merge.
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4

# How text is cut before merging, by the file's `tokenizer.ggml.pre`. Source: the tokenizer.json of each family.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_OTHERS}"
QWEN2 = rf"{_WORDS}|\p{{N}}|{_OTHERS}"
# Mistral's: runs of capitals, then of small letters; no English suffixes, digits one by one, slashes with punctuation.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
TEKKEN = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"llama-bpe": LLAMA3, "llama3": LLAMA3, "qwen2": QWEN2, "deepseek-r1-qwen": QWEN2, "tekken": TEKKEN}
GPT2, SMOLLM = ("default", "gpt-2"), "smollm"


def from_metadata(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describes.

    Args:
        metadata: the file's keys (`gguf_header.Header.metadata`).
        path: the file, for messages.

    Raises:
        LoraxError: a kind of tokenizer that is not served, or keys that are missing or contradict each other.
    """
    file = _Keys(metadata, path)
    kind = file.text("model", "")
    if kind not in ("gpt2", "llama"):
        raise LoraxError(f"{path}: tokenizer {kind[:40]!r} is not served; lorax reads 'gpt2' (BPE) and 'llama' (SPM)")
    tokens = file.strings("tokens")
    if not tokens or len(set(tokens)) != len(tokens):
        raise file.wrong("tokens", "is empty or names a token twice")
    kinds = file.numbers("token_type", len(tokens), NORMAL)
    inner, bos_first = _byte_level(file, tokens) if kind == "gpt2" else _sentencepiece(file, tokens, kinds)
    pairs = list(zip(tokens, kinds.tolist(), strict=True))
    inner.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t, k in pairs if k == CONTROL])
    inner.add_tokens([tokenizers.AddedToken(t, normalized=False) for t, k in pairs if k == USER_DEFINED])
    bos, eos, pad = (file.token(name, len(tokens)) for name in ("bos", "eos", "padding"))
    if bos is not None and file.flag("add_bos_token", bos_first):
        one, two = f"{tokens[bos]}:0 $A:0", f"{tokens[bos]}:0 $A:0 {tokens[bos]}:1 $B:1"
        inner.post_processor = processors.TemplateProcessing(one, two, [(tokens[bos], bos)])
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(inner, bos, eos, pad, template if isinstance(template, str) else None)


class _Keys:
    """The keys under `tokenizer.ggml.`, each checked to be of the kind that is asked for."""

    def __init__(self, metadata: Mapping[str, Any], path: Path):
        self.metadata, self.path = metadata, path

    def wrong(self, key: str, what: str) -> LoraxError:
        return LoraxError(f"{self.path}: key tokenizer.ggml.{key} {what}; the file is damaged, fetch it again")

    def get(self, key: str) -> Any:
        return self.metadata.get(f"tokenizer.ggml.{key}")

    def text(self, key: str, default: str) -> str:
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, "is not text")
        return default if value is None else value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(key, "is neither true nor false")
        return default if value is None else value

    def strings(self, key: str) -> list[str]:
        value = self.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "is missing or no list of texts")
        return value

    def numbers(self, key: str, size: int, default: float | None) -> np.ndarray:
        """One finite number for each token."""
        value = self.get(key)
        if value is None and default is not None:
            return np.full(size, default)
        if not (isinstance(value, np.ndarray) and value.shape == (size,) and np.all(np.isfinite(value))):
            raise self.wrong(key, f"has not one number for each of {size} tokens")
        return value

    def token(self, name: str, size: int) -> int | None:
        value = self.get(f"{name}_token_id")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < size:
            raise self.wrong(f"{name}_token_id", f"is {str(value)[:40]}, outside the vocabulary of {size}")
        return value


def _byte_level(file: _Keys, tokens: list[str]) -> tuple[tokenizers.Tokenizer, bool]:
    """BPE over bytes written as characters, as GPT-2 has it, and whether it begins texts with a token by itself."""
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for merge in file.strings("merges"):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise file.wrong("merges", f"joins {merge[:60]!r}, which are not all tokens")
        merges.append((left, right))
    pre = file.text("pre", "default")
    whole = PATTERNS.get(pre) in (LLAMA3, TEKKEN)
    # These two take a whole word that is a token as it is, even where merges would not lead to it, and begin a text.
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole))
    inner.pre_tokenizer = _cutter(pre, file.path)
    if PATTERNS.get(pre) == QWEN2:
        inner.normalizer = normalizers.NFC()
    inner.decoder = decoders.ByteLevel()
    return inner, whole


def _cutter(pre: str, path: Path) -> Any:
    if pre in GPT2:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == SMOLLM:
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if pre not in PATTERNS:
        served = ", ".join((SMOLLM, *GPT2, *PATTERNS))
        raise LoraxError(f"{path}: pre-tokenizer {pre[:40]!r} is not served; lorax reads {served}")
    cut = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[pre]), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece(file: _Keys, tokens: list[str], kinds: np.ndarray) -> tuple[tokenizers.Tokenizer, bool]:
    """A sentencepiece BPE as merges: two pieces join if their union is a piece, the better score first."""
    scores = file.numbers("scores", len(tokens), None)
    vocab = {token: i for i, token in enumerate(tokens)}
    pieces = {token: score for token, score, kind in zip(tokens, scores.tolist(), kinds, strict=True) if kind == NORMAL}
    ranked = []
    for piece, score in pieces.items():
        for i in range(1, len(piece)):
            if piece[:i] in pieces and piece[i:] in pieces:
                ranked.append((-score, -i, piece[:i], piece[i:]))
    ranked.sort(key=lambda merge: merge[:2])
    unknown = file.token("unknown", len(tokens))
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(left, right) for _, _, left, right in ranked],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaced = file.flag("add_space_prefix", True)
    inner.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if spaced else []), normalizers.Replace(" ", "▁")]
    )
    strip = [decoders.Strip(content=" ", left=1)] if spaced else []
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return inner, True
