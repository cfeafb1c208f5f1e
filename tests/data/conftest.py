"""A real tokenizer in miniature: bytes, a few merges, special tokens and a chat template."""

from collections.abc import Sequence

import pytest
from jinja2 import Environment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CHAT = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class TinyTokenizer:
    """What `lorax.data.chat.Tokenizer` asks for. Two newlines are one token, so borders can be joined over."""

    def __init__(self, template: str | None = CHAT):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {c: i for i, c in enumerate([*alphabet, "ĊĊ", "he", "ll"])}
        merges = [("Ċ", "Ċ"), ("h", "e"), ("l", "l")]
        self.model = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        self.model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self.model.decoder = decoders.ByteLevel()
        self.model.add_special_tokens(["<|im_start|>", "<|im_end|>"])
        self.bos_id = self.model.token_to_id("<|im_start|>")
        self.eos_id = self.model.token_to_id("<|im_end|>")
        self.chat_template = template

    def encode(self, text: str) -> list[int]:
        return self.model.encode(text, add_special_tokens=False).ids

    def encode_chat(self, messages: Sequence, add_generation_prompt: bool) -> list[int]:
        template = Environment().from_string(self.chat_template)
        return self.encode(template.render(messages=messages, add_generation_prompt=add_generation_prompt))

    def show(self, ids) -> str:
        return self.model.decode(list(ids), skip_special_tokens=False)


@pytest.fixture(scope="session")
def tokenizer():
    return TinyTokenizer()


@pytest.fixture(scope="session")
def tokenizer_with():
    return TinyTokenizer
