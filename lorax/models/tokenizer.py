"""Text to token ids and back, with the chat template that the model was trained on.

The `tokenizers` library does the work; here it is set up, from a Hugging Face directory or from the metadata of a GGUF
file (see `tokenizer_gguf`).
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lorax.errors import LoraxError
from lorax.io.atomic import write_json, write_text


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer and its chat template.

    inner: the `tokenizers.Tokenizer`.
    bos_id, eos_id, pad_id: ids of the special tokens, None where the model has none.
    chat_template: Jinja source, None for a base model without one.

    Example:
        >>> import tokenizers
        >>> inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
        >>> inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        >>> Tokenizer(inner).encode("b a")
        [1, 0]
    """

    inner: tokenizers.Tokenizer
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    chat_template: str | None = None

    @property
    def vocab_size(self) -> int:
        return self.inner.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Nothing is added around it; special tokens written out in it are recognised."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ids; special tokens are left out by default."""
        return self.inner.decode(list(ids), skip_special_tokens=skip_special)

    def chat(self, messages: Sequence[Any], add_generation_prompt: bool = True) -> str:
        """A conversation as the model expects it.

        Args:
            messages: mappings with "role" and "content".
            add_generation_prompt: open the assistant's turn at the end.

        Raises:
            LoraxError: the model has no chat template, or the template refuses these messages.
        """
        if self.chat_template is None:
            raise LoraxError("this model has no chat template; use plain prompts, or an instruct model")
        try:
            return _template(self.chat_template).render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token=self._text(self.bos_id),
                eos_token=self._text(self.eos_id),
                tools=None,
            )
        except Exception as error:
            # A template is a program from a file: whatever it raises is about the file or the messages.
            raise LoraxError(f"the chat template refuses these messages: {_first_line(error)}") from error

    def encode_chat(self, messages: Sequence[Any], add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation."""
        return self.encode(self.chat(messages, add_generation_prompt))

    def save(self, directory: str | Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which transformers reads."""
        directory = Path(directory)
        write_text(directory / "tokenizer.json", self.inner.to_str(pretty=False))
        special = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        config: dict[str, Any] = {name: self._text(i) for name, i in special.items() if i is not None}
        config |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        write_json(directory / "tokenizer_config.json", config)

    def _text(self, token: int | None) -> str:
        return "" if token is None else self.inner.id_to_token(token) or ""


@functools.lru_cache(maxsize=8)
def _template(source: str) -> jinja2.Template:
    """A template from a model file is a stranger's program: it runs in Jinja's sandbox and can change nothing."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    env.globals["raise_exception"] = _raise
    env.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return env.from_string(source)
    except jinja2.TemplateError as error:
        raise LoraxError(f"the model's chat template is not valid Jinja: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def from_directory(directory: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory.

    Raises:
        LoraxError: `tokenizer.json` is missing or cannot be read.
    """
    directory = Path(directory)
    path = directory / "tokenizer.json"
    if not path.exists():
        raise LoraxError(f"{path}: is missing; save the fast tokenizer beside the model")
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:
        # The library's only error type for a bad file is Exception itself.
        raise LoraxError(f"{path}: is no tokenizer that the tokenizers library reads ({_first_line(error)})") from error
    # Some files were saved in the middle of somebody's batch.
    inner.no_truncation()
    inner.no_padding()
    config = _json(directory / "tokenizer_config.json")
    texts = [_token_text(config.get(name)) for name in ("bos_token", "eos_token", "pad_token")]
    bos, eos, pad = (inner.token_to_id(text) if text else None for text in texts)
    return Tokenizer(inner, bos, eos, pad, _chat_template(directory, config))


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoraxError(f"{path}: is not valid JSON ({str(error)[:80]})") from error
    if not isinstance(value, dict):
        raise LoraxError(f"{path}: is not a JSON object")
    return value


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, Mapping) else value
    return text if isinstance(text, str) else None


def _chat_template(directory: Path, config: dict[str, Any]) -> str | None:
    """Newer directories keep the template in a file of its own; older ones in the config, alone or as a named list."""
    file = directory / "chat_template.jinja"
    if file.exists():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise LoraxError(f"{file}: cannot be read ({_first_line(error)})") from error
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, Mapping)}
        found = named.get("default")
    return found if isinstance(found, str) else None
