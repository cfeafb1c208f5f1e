"""Golden token ids, from byte-pair encoding written out in plain Python: nothing of the `tokenizers` library.

    python tests/golden/make_tokenizer.py SmolLM2-135M-Instruct.Q4_1.gguf

needs `regex` and `gguf`. It reads vocabulary and merges from the file and writes `tokenizer.json` beside itself: for
each way of cutting text (`tokenizer.ggml.pre`), texts and their ids.
"""

import itertools
import json
import sys
import unicodedata
from pathlib import Path

import gguf
import regex

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MODERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = {
    "smollm": [r"\p{N}", GPT2],
    "gpt-2": [GPT2],
    "llama-bpe": [MODERN % r"\p{N}{1,3}"],
    "qwen2": [MODERN % r"\p{N}"],
    "tekken": [TEKKEN],
}

TEXTS = [
    "",
    " ",
    "   ",
    "a",
    "Hello, world!",
    " leading and trailing  ",
    "The capital of France is Paris.",
    "It's John's; we've they'll I'D CAN'T ain't ''s",
    "1 12 123 1234 12345 3.14159 1,000,000 x86_64 ½ ٣٤ Ⅷ 1٣",
    "tabs\tand\t\tmore \t mixed",
    "lines\nand\n\nmore\r\nwindows\r\n\r\n  indented\n    deeper\n",
    "def f(x):\n    return x ** 2  # square\n\n\nclass A:\n\tpass\n",
    "for (int i = 0; i < 10; ++i) { sum += a[i] * b[i]; }",
    '{"key": [1, 2.5, null, true], "ü": "\\u00fc"}',
    "Größe, naïve, café, façade, Ærøskøbing, Łódź",
    "cafe\u0301 and A\u030angstro\u0308m",
    "Привет, как дела? Всё хорошо.",
    "日本語のテキスト、漢字とかな。",
    "你好，世界！今天是2024年。",
    "한국어 문장입니다.",
    "مرحبا بالعالم",
    "हिन्दी में लिखा",
    "שלום עולם",
    "👩‍👩‍👧‍👦 🇫🇷 🤖👍🏽 ❤️",
    "zero\u200bwidth\u00a0nbsp\u2003em\u3000ideographic\ufefffeff",
    "\u0000\u0001\u001f\u007f\u0085",
    "https://example.org/a/b?c=d&e=%20f#g",
    "!!!???...,,,;;;:::---___***###@@@$$$%%%^^^&&&",
    "e=mc² ∑∞∂ √2 ≈ 1.41421356 ± 10⁻⁸",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa bbbbbbbbbbbbbbbb",
    "iPhone JavaScript GitHub YouTube LaTeX",
    "// a/\n//\n/b ends,/\n/",
    "camelCaseAndPascalCase snake_case kebab-case SCREAMING",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|><|im_end|><|endoftext|>",
    "almost <|im_start |> and <|im_end",
    "text<|endoftext|>more  <|im_end|>  spaces",
    "acute myocardial infarction, ICD-10: I21.9",
    "Permission is hereby granted, free of charge, to any person obtaining a copy",
    "\n",
    "\n\n",
    " \n \n ",
    "end with spaces    ",
    "a  b   c    d     e",
]


def byte_characters():
    """GPT-2's way to write a byte as a visible character."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, extra = {}, 256
    for byte in range(256):
        table[byte] = chr(byte if byte in visible else extra)
        extra += byte not in visible
    return table


def cut(text, patterns):
    """Every match of a pattern is a piece, and what is between two matches is one."""
    pieces = [text]
    for pattern in patterns:
        pieces = [part for piece in pieces for part in split(piece, pattern)]
    return pieces


def split(text, pattern):
    out, at = [], 0
    for match in regex.finditer(pattern, text):
        out += [text[at : match.start()], match.group()]
        at = match.end()
    return [part for part in [*out, text[at:]] if part]


class Reference:
    def __init__(self, path):
        fields = gguf.GGUFReader(path).fields
        tokens = fields["tokenizer.ggml.tokens"].contents()
        kinds = fields["tokenizer.ggml.token_type"].contents()
        merges = fields["tokenizer.ggml.merges"].contents()
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
        self.special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
        self.letters = byte_characters()

    def encode(self, text, pre):
        out = []
        special = "|".join(regex.escape(t) for t in sorted(self.special, key=len, reverse=True))
        for part in split(text, special):
            if part in self.special:
                out.append(self.ids[part])
                continue
            part = unicodedata.normalize("NFC", part) if pre == "qwen2" else part
            for piece in cut(part, CUTS[pre]):
                out += self.word("".join(self.letters[byte] for byte in piece.encode()), pre)
        return out

    def word(self, word, pre):
        if pre in ("llama-bpe", "tekken") and word in self.ids:
            return [self.ids[word]]
        parts = list(word)
        while True:
            ranked = [(self.ranks[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in self.ranks]
            if not ranked:
                # Some control characters and bytes that begin no assigned character are not in the vocabulary.
                return [self.ids[part] for part in parts if part in self.ids]
            _, i = min(ranked)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]


def main():
    reference = Reference(sys.argv[1])
    golden = {pre: [[text, reference.encode(text, pre)] for text in TEXTS] for pre in CUTS}
    path = Path(__file__).with_name("tokenizer.json")
    lines = [f'"{pre}": [\n' + ",\n".join(json.dumps(row) for row in rows) + "\n]" for pre, rows in golden.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
