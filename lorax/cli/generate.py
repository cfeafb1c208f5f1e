"""`lorax generate`: let a model write."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorax.cli.output import print_json
from lorax.cli.source import find, open_model
from lorax.errors import LoraxError


@dataclass(frozen=True)
class Args:
    """Continue a prompt with a base model, or with an adapter over it.

    Example: lorax generate --prompt "The capital of France is" --max-tokens 8
    """

    prompt: str
    """The text to continue."""
    base: str | None = None
    """The base model; by default the one that the adapter was trained on."""
    adapter: str | None = None
    """A run's folder or an adapter's."""
    chat: bool = False
    """Put the prompt into the model's chat template as a user's message."""
    system: str | None = None
    """A system message before it; implies --chat."""
    max_tokens: int = 64
    """Longest continuation in tokens."""
    temperature: float = 0.0
    """0 takes the most likely token each time."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens that has this probability."""
    seed: int = 0
    """Decides the draws."""
    json: bool = False
    """Print one JSON object."""

    def run(self, words: Sequence[str]) -> None:
        self._check()
        source = find(self.base, self.adapter)
        from lorax.models.generate import generate
        from lorax.train.runtime import keep_compiled_programs

        keep_compiled_programs()
        model, params = open_model(source)
        if model.config.labels:
            raise LoraxError(f"{source.adapter or source.base}: is a classifier, which writes no text; use lorax eval")
        tokens = model.tokenizer
        if tokens is None:
            raise LoraxError(f"{source.base}: has no tokenizer.json, and text cannot be read without one")
        chat = self.chat or self.system is not None
        ids = tokens.encode(self._conversation(tokens, source.base) if chat else self.prompt)
        if not ids:
            raise LoraxError("--prompt: is empty; give at least one token of text")
        if len(ids) + self.max_tokens > model.config.max_length:
            raise LoraxError(
                f"--max-tokens {self.max_tokens}: with a prompt of {len(ids)} that is more than the "
                f"{model.config.max_length} tokens that {source.base} reads; ask for fewer"
            )
        (new,) = generate(
            model,
            params,
            [ids],
            self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
        )
        text = tokens.decode(new)
        if self.json:
            print_json({"prompt": self.prompt, "completion": text, "ids": [int(i) for i in new], "base": source.base})
        else:
            print(text if chat else self.prompt + text)

    def _conversation(self, tokens: Any, base: str) -> str:
        """The messages in the model's own chat template, with the assistant's turn opened."""
        if tokens.chat_template is None:
            option = "--chat" if self.system is None else "--system"
            raise LoraxError(f"{option}: {base} has no chat template; leave it out, or take an instruct model")
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        text = tokens.chat([*system, {"role": "user", "content": self.prompt}], add_generation_prompt=True)
        if self.system is not None and self.system.strip() not in text:
            raise LoraxError(f"--system: the chat template of {base} leaves system messages out; say it in --prompt")
        return text

    def _check(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise LoraxError(f"--seed {self.seed}: must be at least 0 and below 2^32")
        if self.max_tokens < 1:
            raise LoraxError(f"--max-tokens {self.max_tokens}: must be at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise LoraxError(f"--temperature {self.temperature}: must be 0 or above")
        if not 0 < self.top_p <= 1:
            raise LoraxError(f"--top-p {self.top_p}: must be above 0 and at most 1")
