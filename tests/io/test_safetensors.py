"""The safetensors reader believes nothing; what it writes, the reference library reads."""

import json
import struct
import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorax.errors import LoraxError
from lorax.io import safetensors as ours

FILES = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def encode(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


VALID = encode(
    {"a": tensor([2, 3], 0, 24), "b": tensor([1], 24, 26, "BF16"), "__metadata__": {"k": "v"}}, bytes(range(26))
)


def read_all(path):
    """Read everything that the file has; a damaged one is one LoraxError."""
    return {name: t.array().copy() for name, t in ours.read(path).items()}


def test_what_the_reference_library_writes_we_read(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "f": rng.normal(size=(3, 5)).astype(np.float32),
        "h": rng.normal(size=(7,)).astype(np.float16),
        "i": rng.integers(-9, 9, (2, 3, 4)),
        "none": np.zeros((0, 3), np.uint8),
        "one": np.array(2.5),
        "yes": np.array([True, False]),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "x", metadata={"format": "pt"})
    read = ours.read(tmp_path / "x")
    assert ours.read_metadata(tmp_path / "x") == {"format": "pt"}
    assert read.keys() == arrays.keys()
    for name, want in arrays.items():
        got = read[name].array()
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        np.testing.assert_array_equal(got, want)


def test_what_we_write_the_reference_library_reads(tmp_path):
    arrays = {"w": np.arange(15, dtype=np.float32).reshape(3, 5).T, "s": np.array(1.5), "i": np.arange(3)}
    ours.write_arrays(tmp_path / "x", arrays, {"format": "pt"})
    back = safetensors.numpy.load_file(tmp_path / "x")
    for name, want in arrays.items():
        assert back[name].shape == want.shape
        np.testing.assert_array_equal(back[name], want)


@pytest.mark.parametrize("dtype", sorted(ours.DTYPES))
def test_each_dtype_comes_back_bit_by_bit_even_unaligned(tmp_path, dtype):
    kind = ours.DTYPES[dtype]
    raw = (
        (np.arange(3 * kind.itemsize) % 2).astype(np.uint8)
        if dtype == "BOOL"
        else np.arange(3 * kind.itemsize, dtype="u1")
    )
    header = encode({"odd": tensor([1], 0, 1, "U8"), "x": tensor([3], 1, 1 + raw.size, dtype)})
    (tmp_path / "x").write_bytes(header + b"\0" + raw.tobytes())
    stored = ours.read(tmp_path / "x")["x"]
    assert stored.array().dtype == kind
    assert stored.array().tobytes() == raw.tobytes()
    if stored.floating:
        wide = np.empty(3, np.float64)
        stored.copy_to(wide)
        np.testing.assert_array_equal(wide, raw.view(kind).astype(np.float64))


def test_copying_converts_transposes_and_goes_on_over_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("lorax.io.stored.CHUNK_BYTES", 64)
    x = np.random.default_rng(0).normal(size=(37, 5)).astype(ml_dtypes.bfloat16)
    ours.write_arrays(tmp_path / "x", {"x": x})
    out = np.empty((5, 37), np.float32)
    stored = ours.read(tmp_path / "x")["x"]
    stored.copy_to(out.T)
    np.testing.assert_array_equal(out.T, x.astype(np.float32))
    with pytest.raises(LoraxError, match=r"'x' has shape \(37, 5\), not \(5, 37\)"):
        stored.copy_to(out)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (encode({"a": tensor([2**62, 0, 2**62], 0, 0)}), "beyond any array"),
        (b"", "empty"),
        (b"\0" * 7, "too few"),
        (struct.pack("<Q", 2**63) + b"{}", "claims"),
        (struct.pack("<Q", 3) + b"{}", "claims"),
        (encode(b"[]"), "not a JSON object"),
        (encode(b"{"), "not valid JSON"),
        (encode(b'{"a\xff": 1}'), "not valid JSON"),
        (encode(b'{"a": NaN}'), "not valid JSON"),
        (encode(b"[" * 100_000), "nested too deep"),
        (encode(b'{"a": ' + b"9" * 9999 + b"}"), "not valid JSON"),
        (encode(b'{"a": {}, "a": {}}'), "twice"),
        (encode({"__metadata__": {"k": 1}}), "__metadata__"),
        (encode({"a": 3}), "'a'"),
        (encode({"a": tensor([1], 0, 4) | {"more": 1}}, b"1234"), "'a'"),
        (encode({"a": tensor([1], 0, 4, "F4")}, b"1234"), "dtype 'F4' is not served"),
        (encode({"a": tensor([1], 0, 4, ["F32"])}, b"1234"), "is not served"),
        (encode({"a": tensor([-1, -1], 0, 4)}, b"1234"), "shape"),
        (encode({"a": tensor([True], 0, 4)}, b"1234"), "shape"),
        (encode({"a": tensor([1.0], 0, 4)}, b"1234"), "shape"),
        (encode({"a": tensor([1] * 99, 0, 4)}, b"1234"), "shape"),
        (encode({"a": tensor([2**62, 2**62], 0, 4)}, b"1234"), "do not fit"),
        (encode({"a": tensor([2], 0, 4)}, b"1234"), "do not fit"),
        (encode({"a": tensor([1], 4, 0)}, b"1234"), "do not fit"),
        (encode({"a": tensor([1], 0, 4), "b": tensor([1], 3, 7)}, b"1234567"), "overlaps"),
        (encode({"a": tensor([1], 0, 4), "b": tensor([1], 5, 9)}, b"123456789"), "gap"),
        (encode({"a": tensor([1], 0, 4)}, b"123"), "cut off"),
        (encode({"a": tensor([1], 0, 4)}, b"12345"), "belong to no tensor"),
    ],
)
def test_a_lie_is_named(tmp_path, data, said):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(LoraxError, match=said) as error:
        ours.read(path)
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(LoraxError, match="nowhere: cannot be read"):
        ours.read(tmp_path / "nowhere")


@pytest.mark.parametrize("size", range(len(VALID)))
def test_every_truncation_is_an_error(tmp_path, size):
    (tmp_path / "x").write_bytes(VALID[:size])
    with pytest.raises(LoraxError, match="x: "):
        ours.read(tmp_path / "x")


@FILES
@given(data=st.binary(max_size=200))
def test_random_bytes_are_an_error_or_a_file(tmp_path, data):
    outcome(tmp_path / "x", data)


@FILES
@given(data=st.data())
def test_mutations_are_an_error_or_a_file(tmp_path, data):
    mutated = bytearray(VALID)
    for _ in range(data.draw(st.integers(1, 6))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    outcome(tmp_path / "x", bytes(mutated))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from(["F32", "BF16", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "__metadata__", "a"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@FILES
@given(header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), JSON), data=st.binary(max_size=16))
def test_headers_of_any_json_are_an_error_or_a_file(tmp_path, header, data):
    outcome(tmp_path / "x", encode(header, data))


def outcome(path, data):
    path.write_bytes(data)
    try:
        arrays = read_all(path)
    except LoraxError as error:
        said = str(error)
    else:
        said = str(path)
        assert sum(a.nbytes for a in arrays.values()) <= len(data)
    assert str(path) in said


def shards(folder, weight_map):
    ours.write_arrays(folder / "1.safetensors", {"a": np.arange(3.0)})
    ours.write_arrays(folder / "2.safetensors", {"b": np.arange(4.0)})
    index = folder / "index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_an_index_joins_its_files(tmp_path):
    read = ours.read_sharded(shards(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"}))
    assert {name: t.array().tolist() for name, t in read.items()} == {"a": [0, 1, 2], "b": [0, 1, 2, 3]}


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"a": "2.safetensors"}, r"2\.safetensors: lacks tensor 'a'"),
        ({"a": "3.safetensors"}, r"3\.safetensors: cannot be read"),
        ({"a": "../1.safetensors"}, "not a plain name"),
        ({"a": "/etc/passwd"}, "not a plain name"),
        ({"a": ".."}, "not a plain name"),
        ({"a": 1}, "weight_map"),
        ({}, "weight_map"),
        ([], "weight_map"),
    ],
)
def test_an_index_that_lies_is_named(tmp_path, weight_map, said):
    with pytest.raises(LoraxError, match=said):
        ours.read_sharded(shards(tmp_path, weight_map))


def test_an_index_that_is_no_json_is_named(tmp_path):
    (tmp_path / "i.json").write_text('{"weight_map": ')
    with pytest.raises(LoraxError, match=r"i\.json: not valid JSON"):
        ours.read_sharded(tmp_path / "i.json")


def test_writing_what_was_not_said_leaves_the_old_file(tmp_path):
    path = tmp_path / "x"
    ours.write_arrays(path, {"a": np.arange(3)})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="made"):
        ours.write(path, [ours.Entry("a", (2,), np.float32, lambda: np.zeros(3, np.float32))])
    with pytest.raises(ValueError, match="named 'a'"):
        ours.write(path, [ours.Entry("a", (2,), np.float32, lambda: np.zeros(2, np.float32))] * 2)
    assert path.read_bytes() == before


def test_a_header_that_lies_about_gigabytes_costs_no_memory(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(encode({"a": tensor([2**40], 0, 2**42)}, b"1234"))
    program = f"""
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
        from lorax.errors import LoraxError
        from lorax.io import safetensors
        try:
            safetensors.read({str(path)!r})
        except LoraxError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert "cut off" in done.stdout
