"""GGUF: every storage type, the metadata as a config, and a reader that believes nothing."""

import functools
import random
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf_files import CONFIG, gguf_weights, hf_weights, write_gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorax.errors import LoraxError
from lorax.models.config import ModelConfig, RopeScaling
from lorax.models.gguf import BLOCKS, read_gguf, read_tensors
from lorax.models.hf import open_checkpoint
from lorax.models.read import load_params
from lorax.models.tokenizer_gguf import from_metadata

FILES = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
Types = gguf.GGMLQuantizationType


def half(raw):
    return np.frombuffer(bytes(raw), np.float16)[0].astype(np.float32)


def q8_0(block):
    return half(block[:2]) * block[2:].view(np.int8).astype(np.float32)


def nibbles(packed):
    return np.concatenate([packed & 15, packed >> 4]).astype(np.float32)


def q4_0(block):
    return half(block[:2]) * (nibbles(block[2:]) - 8)


def q4_1(block):
    return half(block[:2]) * nibbles(block[4:]) + half(block[2:4])


def fifth_bits(packed):
    word = int.from_bytes(bytes(packed), "little")
    return np.array([(word >> i & 1) * 16 for i in range(32)], np.float32)


def q5_0(block):
    return half(block[:2]) * (nibbles(block[6:]) + fifth_bits(block[2:6]) - 16)


def q5_1(block):
    return half(block[:2]) * (nibbles(block[8:]) + fifth_bits(block[4:8])) + half(block[2:4])


def six_bits(packed, j):
    """Scale and minimum of part j of eight, out of twelve bytes."""
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    return (packed[j + 4] & 15) | (packed[j - 4] >> 6) << 4, (packed[j + 4] >> 4) | (packed[j] >> 6) << 4


def k_parts(block, quants):
    scale, least = half(block[:2]), half(block[2:4])
    out = []
    for j in range(8):
        s, m = six_bits([int(x) for x in block[4:16]], j)
        out.append(scale * np.float32(s) * quants(j) - least * np.float32(m))
    return np.concatenate(out)


def q4_k(block):
    low = block[16:].reshape(4, 32)
    return k_parts(block, lambda j: (low[j // 2] >> 4 * (j % 2) & 15).astype(np.float32))


def q5_k(block):
    high, low = block[16:48], block[48:].reshape(4, 32)
    return k_parts(block, lambda j: ((low[j // 2] >> 4 * (j % 2) & 15) + 16 * (high >> j & 1)).astype(np.float32))


def q6_k(block):
    low, high, scales, scale = block[:128], block[128:192], block[192:208].view(np.int8), half(block[208:])
    out = np.empty(256, np.float32)
    for i in range(256):
        part, at = divmod(i, 128)
        column, row = at % 32, at // 32
        nibble = int(low[64 * part + 32 * (row % 2) + column]) >> 4 * (row // 2) & 15
        upper = int(high[32 * part + column]) >> 2 * row & 3
        out[i] = scale * np.float32(scales[i // 16]) * np.float32(nibble + 16 * upper - 32)
    return out


BY_HAND = {
    "Q8_0": q8_0,
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
}


def random_blocks(kind, rows, blocks):
    """Any bytes are valid blocks, as long as the half-precision scales are finite."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    raw = np.random.default_rng(kind).integers(0, 256, (rows * blocks, size)).astype(np.uint8)
    at = {"Q6_K": [208], "Q2_K": [80, 82], "Q3_K": [108]}.get(kind.name, [0, 2] if size % 4 == 0 else [0])
    scales = np.linspace(-0.1, 0.2, rows * blocks).astype("<f2")
    for start in at:
        raw[:, start : start + 2] = scales.view(np.uint8).reshape(-1, 2)
    return raw.reshape(rows, -1)


def one_tensor(tmp_path, value):
    tensors, _ = read_tensors(write_gguf(tmp_path / "x.gguf", CONFIG, {"other": np.ones(3, np.float32), "x": value}))
    return tensors["x"]


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_blocks_mean_what_the_format_says(tmp_path, name):
    kind = Types[name]
    raw = random_blocks(kind, 3, 2)
    stored = one_tensor(tmp_path, (raw, kind))
    size = gguf.GGML_QUANT_SIZES[kind][1]
    want = np.stack([np.concatenate([BY_HAND[name](b) for b in row.reshape(-1, size)]) for row in raw])
    assert stored.shape == want.shape
    np.testing.assert_allclose(stored.array(), want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", BLOCKS)
def test_chunks_transposes_and_dtypes_do_not_change_the_values(tmp_path, monkeypatch, name):
    monkeypatch.setattr("lorax.io.stored.CHUNK_BYTES", 1)
    kind = Types[name]
    raw = random_blocks(kind, 5, 3)
    stored = one_tensor(tmp_path, (raw, kind))
    want = gguf.quants.dequantize(raw, kind)
    assert np.abs(want).max() > 0
    out = np.empty(want.shape[::-1], np.float64).T
    stored.copy_to(out)
    np.testing.assert_array_equal(out, want)
    short = np.empty(want.shape, ml_dtypes.bfloat16)
    stored.copy_to(short)
    np.testing.assert_array_equal(short, want.astype(ml_dtypes.bfloat16))


@pytest.mark.parametrize(("kind", "dtype"), [("F64", "f8"), ("F32", "f4"), ("F16", "f2"), ("BF16", ml_dtypes.bfloat16)])
def test_plain_numbers(tmp_path, kind, dtype):
    x = np.linspace(-3, 3, 35).reshape(5, 7).astype(dtype)
    stored = one_tensor(tmp_path, (x.view(np.uint8), Types.BF16) if kind == "BF16" else x)
    assert stored.dtype == kind
    np.testing.assert_array_equal(stored.array(), x)


def test_a_type_that_is_not_read_is_named(tmp_path):
    raw = np.zeros((1, gguf.GGML_QUANT_SIZES[Types.IQ1_S][1]), np.uint8)
    with pytest.raises(LoraxError, match=r"x\.gguf: tensor 'x': type IQ1_S is not read; .*Q4_1"):
        one_tensor(tmp_path, (raw, Types.IQ1_S))


def write_model(path, config=CONFIG, extra=lambda writer: None, drop=(), **more):
    tensors = gguf_weights(config, hf_weights(config))
    return write_gguf(path, config, {k: v for k, v in tensors.items() if k not in drop} | more, extra)


def test_the_metadata_is_a_config(tmp_path):
    config, _, metadata = read_gguf(write_model(tmp_path / "x.gguf"))
    assert ModelConfig.from_hf(config) == ModelConfig.from_hf(CONFIG)
    assert metadata["general.architecture"] == "llama"


def llama3_divisors(factor, theta, head_dim):
    out = []
    for i in range(0, head_dim, 2):
        turns = 8192 / (2 * np.pi * theta ** (i / head_dim))
        smooth = (turns - 1) / 3
        out.append(1.0 if turns > 4 else factor if turns < 1 else 1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


def test_llama_3_scaling_is_read_off_its_divisors(tmp_path):
    stored = {"rope_freqs.weight": llama3_divisors(32.0, 500000.0, 8)}
    assert 1.0 < stored["rope_freqs.weight"].max() <= 32.0
    config, _, _ = read_gguf(write_model(tmp_path / "x.gguf", **stored))
    assert ModelConfig.from_hf(config).rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)


def test_other_rope_scalings_are_refused(tmp_path):
    path = tmp_path / "x.gguf"
    with pytest.raises(LoraxError, match=r"rope_freqs\.weight' is not Llama 3's"):
        read_gguf(write_model(path, **{"rope_freqs.weight": np.linspace(1, 8, 4, dtype=np.float32)}))
    with pytest.raises(LoraxError, match="'yarn' is not served"):
        read_gguf(write_model(path, extra=lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"extra": lambda w: w.add_uint16("split.count", 2)}, "join them into one file"),
        ({"drop": ("token_embd.weight",)}, r"'token_embd\.weight' is missing"),
        ({"config": CONFIG | {"model_type": "gemma"}}, "architecture 'gemma' is not served"),
        ({"extra": lambda w: w.add_uint32("general.alignment", 48)}, "not a power of two"),
        ({"extra": lambda w: w.add_rope_dimension_count(4)}, "different sizes"),
    ],
)
def test_what_is_not_served_is_named(tmp_path, change, said):
    with pytest.raises(LoraxError, match=said):
        read_gguf(write_model(tmp_path / "x.gguf", **change))


def string(text):
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def head(keys=(), tensors=(), version=3, counts=None):
    count_t, count_k = counts or (len(tensors), len(keys))
    body = b"".join(string(k) + v for k, v in keys) + b"".join(tensors)
    return b"GGUF" + struct.pack("<IQQ", version, count_t, count_k) + body


def info(name, dims, kind=0, offset=0):
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def padded(data, after=b""):
    return data + b"\0" * (-len(data) % 32) + after


STRING, ARRAY = struct.pack("<I", 8), struct.pack("<I", 9)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (b"GGU", "the magic needs 4 bytes"),
        (b"PK\x03\x04" * 9, "not a GGUF file"),
        (head(version=1), "version 1"),
        (head(version=3 << 24), "version 50331648"),
        (head(counts=(2**63, 0)), "number of tensors"),
        (head(counts=(0, 2**63)), "number of keys"),
        (head([("k", STRING + struct.pack("<Q", 2**62))]), "'k' needs 4611686018427387904 bytes"),
        (head([("k", struct.pack("<I", 13))]), "type 13"),
        (head([("k", ARRAY + struct.pack("<IQ", 8, 2**61))]), "for which"),
        (head([("k", ARRAY + struct.pack("<IQ", 6, 2**61))]), "for which"),
        (head([("k", ARRAY + (ARRAY + struct.pack("<Q", 1)) * 9)]), "type 9"),
        (head([("k", struct.pack("<IB", 0, 1))] * 2), "twice"),
        (head(tensors=[info("t", [])]), "0 dimensions"),
        (head(tensors=[info("t", [1] * 5)]), "5 dimensions"),
        (head(tensors=[info("t", [0])]), "no length"),
        (padded(head(tensors=[info("t", [2**63, 2**63])]), b"1234"), "cut off"),
        (padded(head(tensors=[info("t", [1], offset=2**63)]), b"1234"), "cut off"),
        (padded(head(tensors=[info("t", [2])]), b"1234"), "cut off"),
        (padded(head(tensors=[info("t", [33], kind=8)]), b"1" * 99), "blocks of 32"),
        (padded(head(tensors=[info("t", [1], kind=99)]), b"1" * 99), "number 99"),
        (padded(head(tensors=[info("t", [2]), info("u", [2], offset=4)]), b"1" * 99), "'t' and 'u' overlap"),
        (padded(head(tensors=[info("t", [2]), info("t", [2], offset=32)]), b"1" * 99), "share a name"),
    ],
)
def test_a_lie_is_named(tmp_path, data, said):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(LoraxError, match=said) as error:
        read_tensors(path)
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_text_that_is_no_utf_8_is_kept_as_far_as_it_goes(tmp_path):
    (tmp_path / "x").write_bytes(padded(head([("k", STRING + string(b"a\xff"))])))
    assert read_tensors(tmp_path / "x")[1] == {"k": "a\ufffd"}


def tokenizer(writer):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([chr(65 + i) for i in range(35)] + ["AB", "ABC"])
    writer.add_token_types([1] * 37)
    writer.add_token_merges(["A B", "AB C"])
    writer.add_chat_template("{{ messages[0]['content'] }}")


@functools.cache
def whole_file():
    config = CONFIG | {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 3, "num_attention_heads": 2}
    config |= {"num_key_value_heads": 1, "head_dim": 4}
    with tempfile.TemporaryDirectory() as folder:
        return write_model(Path(folder) / "x.gguf", config, tokenizer).read_bytes()


def outcome(path, data):
    """Open the file and load everything in it: done, or one LoraxError that names the file or the config."""
    path.write_bytes(data)
    start = time.process_time()
    try:
        source = open_checkpoint(path)
        load_params(source, ModelConfig.from_hf(source.config), np.float32)
        from_metadata(source.metadata, path).encode("ABCD")
        said = None
    except LoraxError as error:
        said = str(error)
    assert time.process_time() - start < 5
    return said


def test_the_whole_file_is_read(tmp_path):
    whole = whole_file()
    assert outcome(tmp_path / "x.gguf", whole) is None


def test_truncations_are_errors(tmp_path):
    whole = whole_file()
    sizes = random.Random(0).sample(range(len(whole)), 200)
    for size in [*sizes, len(whole) - 1]:
        # What the writer pads at the very end holds no weights.
        said = outcome(tmp_path / "x.gguf", whole[:size])
        assert said is not None or len(whole) - size < 32


@FILES
@given(data=st.data())
def test_mutations_are_an_error_or_a_model(tmp_path, data):
    whole = whole_file()
    mutated = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        # The head is where the lies are.
        at = data.draw(st.integers(0, len(whole) - 1 if data.draw(st.booleans()) else 2500))
        mutated[at] = data.draw(st.sampled_from([0, 1, 2, 8, 9, 127, 128, 255]) | st.integers(0, 255))
    outcome(tmp_path / "x.gguf", bytes(mutated))


@FILES
@given(data=st.binary(max_size=300))
def test_random_bytes_after_the_magic_are_an_error(tmp_path, data):
    assert outcome(tmp_path / "x.gguf", b"GGUF\x03\0\0\0" + data) is not None


VALUES = st.one_of(
    st.binary(max_size=12).map(lambda raw: STRING + string(raw)),
    st.integers(0, 2**32 - 1).map(lambda n: struct.pack("<II", 4, n)),
    st.floats(width=32).map(lambda x: struct.pack("<If", 6, x)),
    st.lists(st.floats(width=32), max_size=3).map(lambda v: ARRAY + struct.pack(f"<IQ{len(v)}f", 6, len(v), *v)),
    st.lists(st.binary(max_size=3), max_size=3).map(
        lambda v: ARRAY + struct.pack("<IQ", 8, len(v)) + b"".join(map(string, v))
    ),
)


@FILES
@given(data=st.data())
def test_keys_of_another_kind_are_an_error_or_a_model(tmp_path, data):
    """The same model, with one value replaced by one of any other type."""
    whole = whole_file()
    places, end = table_of(whole)
    start, stop = places[data.draw(st.sampled_from(sorted(places)))]
    new = padded(whole[:start] + data.draw(VALUES) + whole[stop:end])
    outcome(tmp_path / "x.gguf", new + whole[len(padded(whole[:end])) :])


@functools.cache
def table_of(whole):
    """Where the reference library sees each key's value, and the end of the table of tensors."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        path.write_bytes(whole)
        reader = gguf.GGUFReader(path)
        places = {}
        for name, field in reader.fields.items():
            start = field.offset + 8 + len(name.encode())
            places[name] = (start, start + sum(int(part.nbytes) for part in field.parts[2:]))
        last = max((t.field for t in reader.tensors), key=lambda field: field.offset)
        end = last.offset + sum(int(part.nbytes) for part in last.parts)
        del reader
    return {name: place for name, place in places.items() if not name.startswith("GGUF.")}, end


def test_a_head_that_lies_about_gigabytes_costs_no_memory(tmp_path):
    (tmp_path / "x").write_bytes(padded(head(tensors=[info("t", [2**20, 2**20])]), b"1234"))
    program = f"""
        import resource
        from lorax.errors import LoraxError
        from lorax.models.gguf import read_tensors
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
        try:
            read_tensors({str(tmp_path / "x")!r})
        except LoraxError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert "cut off" in done.stdout
