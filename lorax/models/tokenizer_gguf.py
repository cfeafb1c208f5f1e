"""The tokenizer inside a GGUF file, rebuilt for the `tokenizers` library from its vocabulary, merges and names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from lorax.errors import LoraxError
from lorax.models.tokenizer import Tokenizer

# Kinds of token in the file.
_CONTROL, _USER_DEFINED = 3, 4

# How text is cut before merging, by the file's `tokenizer.ggml.pre`: letters, digits and spaces of each family.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def from_metadata(metadata: dict[str, Any], path: Path) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describes.

    Args:
        metadata: the file's keys.
        path: the file, for messages.

    Raises:
        LoraxError: a kind of tokenizer that is not served, or keys that are missing or contradict each other.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
        raise LoraxError(f"{path}: lacks a list of tokens (tokenizer.ggml.tokens); fetch it again")
    if len(set(tokens)) != len(tokens):
        raise LoraxError(f"{path}: a token occurs twice in tokenizer.ggml.tokens; fetch it again")
    if kind == "gpt2":
        inner = _byte_level(metadata, tokens, path)
    elif kind == "llama":
        inner = _sentencepiece(metadata, tokens, path)
    else:
        raise LoraxError(f"{path}: tokenizer {kind!r} is not served; lorax reads 'gpt2' (BPE) and 'llama' (SPM)")
    _add_special(inner, tokens, metadata.get("tokenizer.ggml.token_type"), path)
    ids = [_id(metadata, name, len(tokens), path) for name in ("bos", "eos", "padding")]
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(inner, *ids, template if isinstance(template, str) else None)


def _id(metadata: dict[str, Any], name: str, size: int, path: Path) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if value is not None and (not isinstance(value, int) or not 0 <= value < size):
        raise LoraxError(f"{path}: {name}_token_id {value!r} is outside the vocabulary of {size}; fetch it again")
    return value


def _byte_level(metadata: dict[str, Any], tokens: list[str], path: Path) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for merge in metadata.get("tokenizer.ggml.merges") or []:
        left, space, right = str(merge).partition(" ")
        if not space or left not in vocab or right not in vocab or left + right not in vocab:
            raise LoraxError(f"{path}: the merge {merge!r} is not made of its tokens; fetch it again")
        merges.append((left, right))
    pre = metadata.get("tokenizer.ggml.pre", "default")
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    inner.pre_tokenizer = _pre_tokenizer(pre, path)
    if pre == "qwen2":
        inner.normalizer = normalizers.NFC()
    inner.decoder = decoders.ByteLevel()
    return inner


def _pre_tokenizer(pre: Any, path: Path) -> Any:
    if pre == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    if pre in ("default", "gpt-2"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    patterns = {"llama-bpe": _LLAMA3, "qwen2": _QWEN2}
    if pre not in patterns:
        served = ", ".join(("smollm", "gpt-2", "default", *patterns))
        raise LoraxError(f"{path}: pre-tokenizer {pre!r} is not served; served: {served}")
    cut = pre_tokenizers.Split(tokenizers.Regex(patterns[pre]), behavior="isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], path: Path) -> tokenizers.Tokenizer:
    """A sentencepiece BPE as merges: two pieces merge if their union is a piece, the better score first."""
    scores = metadata.get("tokenizer.ggml.scores")
    scores = np.asarray(scores).tolist()
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise LoraxError(f"{path}: has no score for each token (tokenizer.ggml.scores); fetch it again")
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges += [(-scores[vocab[token]], *pair) for pair in pairs]
    merges.sort(key=lambda merge: merge[0])
    unknown = _id(metadata, "unknown", len(tokens), path)
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(left, right) for _, left, right in merges],
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = [normalizers.Prepend("▁")] if metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    inner.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(content=" ", left=1)] if prefix else []
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return inner


def _add_special(inner: tokenizers.Tokenizer, tokens: list[str], kinds: Any, path: Path) -> None:
    if kinds is None:
        return
    kinds = np.asarray(kinds).tolist()
    if not isinstance(kinds, list) or len(kinds) != len(tokens):
        raise LoraxError(f"{path}: tokenizer.ggml.token_type does not fit its {len(tokens)} tokens; fetch it again")
    pairs = list(zip(tokens, kinds, strict=True))
    inner.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t, k in pairs if k == _CONTROL])
    inner.add_tokens([tokenizers.AddedToken(t, normalized=False) for t, k in pairs if k == _USER_DEFINED])
