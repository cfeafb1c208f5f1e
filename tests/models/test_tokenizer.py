"""Tokenizers: the same ids as plain byte-pair encoding, the same texts back, chat templates in a sandbox."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax.errors import LoraxError
from lorax.models.gguf import read_tensors
from lorax.models.resolve import resolve_base
from lorax.models.tokenizer import Tokenizer, from_directory
from lorax.models.tokenizer_gguf import from_metadata

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def metadata():
    return read_tensors(resolve_base("smollm2-135m"))[1]


@pytest.fixture(scope="module")
def smollm(metadata):
    return from_metadata(metadata, Path("smollm2.gguf"))


@pytest.mark.base
@pytest.mark.parametrize("pre", GOLDEN)
def test_ids_are_those_of_plain_byte_pair_encoding(metadata, pre):
    tokenizer = from_metadata(metadata | {"tokenizer.ggml.pre": pre}, Path("x.gguf"))
    for text, ids in GOLDEN[pre]:
        assert tokenizer.encode(text) == ids, text


@pytest.mark.base
def test_the_golden_texts_tell_the_cuts_apart():
    ids = [[ids for _, ids in rows] for rows in GOLDEN.values()]
    assert all(a != b for i, a in enumerate(ids) for b in ids[:i])


@pytest.mark.base
def test_texts_come_back(smollm):
    for text, ids in GOLDEN["smollm"]:
        assert smollm.decode(ids, skip_special=False) == text


# Bytes that SmolLM2's vocabulary lacks: six control characters, and first bytes of planes that Unicode leaves empty.
LACKING = set(b"\x04\x06\x13\x14\x16\x1d\xf1\xf2")


@pytest.mark.base
@settings(deadline=None, max_examples=200)
@given(text=st.text(max_size=40).filter(lambda text: not LACKING & set(text.encode())))
def test_any_text_comes_back(smollm, text):
    assert smollm.decode(smollm.encode(text), skip_special=False) == text


@pytest.mark.base
def test_the_special_tokens_of_smollm(smollm):
    assert (smollm.bos_id, smollm.eos_id, smollm.pad_id, smollm.vocab_size) == (1, 2, 2, 49152)
    assert smollm.decode([1, 504, 2]) == "The"
    assert smollm.decode([1, 504, 2], skip_special=False) == "<|im_start|>The<|im_end|>"


CONVERSATION = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


@pytest.mark.base
def test_a_conversation_of_smollm(smollm):
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    turns = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    assert smollm.chat(CONVERSATION, add_generation_prompt=False) == system + turns
    assert smollm.chat(CONVERSATION, add_generation_prompt=True) == system + turns + "<|im_start|>assistant\n"
    ids = smollm.encode_chat(CONVERSATION[:1], add_generation_prompt=True)
    assert ids.count(smollm.bos_id) == 3
    assert ids.count(smollm.eos_id) == 2


@pytest.mark.base
def test_what_is_saved_reads_the_same(smollm, tmp_path):
    smollm.save(tmp_path)
    again = from_directory(tmp_path)
    for text, ids in GOLDEN["smollm"]:
        assert again.encode(text) == ids
    assert (again.bos_id, again.eos_id, again.pad_id) == (smollm.bos_id, smollm.eos_id, smollm.pad_id)
    assert again.chat(CONVERSATION) == smollm.chat(CONVERSATION)


# Sentencepiece: a vocabulary with scores, and what the published algorithm makes of a text.

PIECES = ["▁", "a", "b", "c", "ab", "bc", "▁a", "▁ab", "abc", "▁abc", "aa", "▁b", "cab", "ü", "."]
SCORES = [-9.0, -8.0, -7.5, -7.0, -1.0, -0.5, -2.0, -1.5, -3.0, -2.5, -0.25, -4.0, -0.75, -6.0, -6.5]


def sentencepiece_keys(**change):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *PIECES]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(PIECES)]
    keys = {
        "model": "llama",
        "tokens": tokens,
        "token_type": np.array(kinds, np.int32),
        "scores": np.array([0.0] * 259 + SCORES, np.float32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in (keys | change).items() if v is not None}


def sentencepiece(text):
    """Join the two neighbours whose union has the best score, the leftmost first, as long as there are any."""
    score = dict(zip(PIECES, SCORES, strict=True))
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        ranked = [(-score.get(a + b, -math.inf), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        best = min(ranked, default=(math.inf, 0))
        if best[0] == math.inf:
            break
        parts[best[1] : best[1] + 2] = [parts[best[1]] + parts[best[1] + 1]]
    out = []
    for part in parts:
        out += [259 + PIECES.index(part)] if part in score else [3 + byte for byte in part.encode()]
    return out


@settings(deadline=None, max_examples=300)
@given(text=st.text(st.sampled_from("aabbcc  .üß🙂"), max_size=24))
def test_sentencepiece_joins_the_best_pair_first(text):
    tokenizer = from_metadata(sentencepiece_keys(), Path("x.gguf"))
    ids = tokenizer.encode(text)
    assert ids == sentencepiece(text)
    assert tokenizer.decode(ids) == text


def test_sentencepiece_without_the_leading_space():
    tokenizer = from_metadata(sentencepiece_keys(add_space_prefix=False), Path("x.gguf"))
    assert tokenizer.encode("abc") == [3 + 256 + PIECES.index("abc")]
    assert tokenizer.decode(tokenizer.encode(" abc")) == " abc"


def test_the_first_token_of_a_text_is_written_down_for_other_readers(tmp_path):
    tokenizer = from_metadata(sentencepiece_keys(), Path("x.gguf"))
    assert 1 not in tokenizer.encode("abc")
    tokenizer.save(tmp_path)
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert other.encode("abc").ids == [1, *tokenizer.encode("abc")]
    plain = from_metadata(sentencepiece_keys(add_bos_token=False), Path("x.gguf"))
    assert plain.inner.encode("abc").ids == plain.encode("abc")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": None}, "tokenizer '' is not served"),
        ({"model": "bert"}, "tokenizer 'bert' is not served"),
        ({"model": 3}, "key tokenizer.ggml.model is not text"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": []}, "tokens is empty"),
        ({"tokens": ["a", "a"]}, "names a token twice"),
        ({"scores": None}, "one number for each of 274"),
        ({"scores": np.full(274, np.nan)}, "one number for each of 274"),
        ({"token_type": np.ones(3)}, "one number for each of 274"),
        ({"eos_token_id": 274}, "eos_token_id is 274, outside"),
        ({"bos_token_id": True}, "bos_token_id is True"),
        ({"add_space_prefix": "yes"}, "neither true nor false"),
        ({"model": "gpt2"}, "merges is missing"),
        ({"model": "gpt2", "merges": ["a  b"]}, "joins 'a  b'"),
        ({"model": "gpt2", "merges": ["a c"]}, "joins 'a c'"),
        ({"model": "gpt2", "merges": [], "pre": "viking"}, "pre-tokenizer 'viking' is not served"),
    ],
)
def test_metadata_that_does_not_fit_is_named(change, said):
    with pytest.raises(LoraxError, match=rf"x\.gguf: .*{said}"):
        from_metadata(sentencepiece_keys(**change), Path("x.gguf"))


# Directories and templates.


def bytes_tokenizer(**fields):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(inner, 256, 257, None, **fields)


def write(folder, tokenizer=None, **files):
    (tokenizer or bytes_tokenizer()).save(folder)
    for name, value in files.items():
        path = folder / name.replace("_json", ".json").replace("_jinja", ".jinja")
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return folder


NAMED = [{"name": "tools", "template": "two"}, {"name": "default", "template": "one"}]


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config_json": {"chat_template": "one"}},
        {
            "tokenizer_config_json": {
                "chat_template": [{"name": "tools", "template": "two"}, {"name": "default", "template": "one"}]
            }
        },
        {"tokenizer_config_json": {"chat_template": "two"}, "chat_template_jinja": "one"},
    ],
)
def test_where_templates_stand(tmp_path, files):
    assert from_directory(write(tmp_path, **files)).chat([]) == "one"


def test_special_tokens_as_objects(tmp_path):
    config = {"bos_token": {"content": "<s>", "special": True}, "eos_token": "</s>", "pad_token": "nowhere"}
    tokenizer = from_directory(write(tmp_path, tokenizer_config_json=config))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.chat_template) == (256, 257, None, None)


def test_somebody_s_truncation_and_padding_are_undone(tmp_path):
    tokenizer = bytes_tokenizer()
    tokenizer.inner.enable_truncation(3)
    tokenizer.inner.enable_padding(length=9)
    assert len(from_directory(write(tmp_path, tokenizer)).encode("abcdef")) == 6


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"tokenizer_json": "{}"}, r"tokenizer\.json: is no tokenizer"),
        ({"tokenizer_json": "\0"}, r"tokenizer\.json: is no tokenizer"),
        ({"tokenizer_config_json": "{"}, r"tokenizer_config\.json: is not valid JSON"),
        ({"tokenizer_config_json": "[]"}, r"tokenizer_config\.json: is not a JSON object"),
        ({"tokenizer_config_json": "[" * 100_000}, r"tokenizer_config\.json: is not valid JSON"),
    ],
)
def test_a_damaged_directory_is_named(tmp_path, files, said):
    write(tmp_path, **files)
    with pytest.raises(LoraxError, match=said):
        from_directory(tmp_path)


def test_a_directory_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(LoraxError, match=r"tokenizer\.json: is missing"):
        from_directory(tmp_path)


def test_what_templates_may_use():
    template = (
        "{{ bos_token }}{% for m in messages %}\n    {% if loop.index > 2 %}{% break %}{% endif %}\n"
        "{{ m.content | tojson }}{% endfor %}{{ strftime_now('%Y') | length }}{{ eos_token }}"
    )
    messages = [{"role": "user", "content": text} for text in ("<ü>", "b", "c")]
    assert bytes_tokenizer(chat_template=template).chat(messages) == '<s>"<ü>""b"4</s>'


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{% for %}", "not valid Jinja"),
        ("{{ messages.append(1) }}", "refuses these messages"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses these messages"),
        ("{% for i in range(10**9) %}{% endfor %}", "refuses these messages"),
        ("{{ 1 // 0 }}", "refuses these messages"),
        ("{{ messages[0]['content'] + 1 }}", "refuses these messages"),
    ],
)
def test_a_template_that_misbehaves_is_one_line(template, said):
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(LoraxError, match=said) as error:
        bytes_tokenizer(chat_template=template).chat(messages)
    assert len(str(error.value).splitlines()) == 1
    assert messages == [{"role": "user", "content": "x"}]


def test_a_model_without_a_template_says_so():
    with pytest.raises(LoraxError, match="no chat template"):
        bytes_tokenizer().chat([])
