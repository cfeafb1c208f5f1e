"""Files of torch.save: what is in them comes out, and nothing in them is run. Made by hand; torch's own are golden."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from lorax import LoraxError
from lorax.io import torch_zip

GOLDEN = Path(__file__).parents[1] / "golden" / "peft" / "peft-0.1.0" / "adapter_model.bin"


class Named:
    """Pickled as a global of a module that need not be there."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    def __init__(self, function, *args):
        self.function, self.args = function, args


class Stored:
    def __init__(self, kind, key, count, what="storage"):
        self.pid = (what, Named("torch", kind), key, "cpu", count)


class Writer(pickle._Pickler):
    """Python's own pickler, with words for the things above."""

    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, Stored) else None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Named):
            self.write(b"c" + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Call):
            self.save(obj.function)
            self.save(obj.args)
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


def tensor(kind="FloatStorage", key="0", count=6, offset=0, shape=(2, 3), stride=(3, 1), **more):
    return Call(
        Named("torch._utils", "_rebuild_tensor_v2"), Stored(kind, key, count, **more), offset, shape, stride, False, {}
    )


def archive(path, value, storages, method=zipfile.ZIP_STORED, order=b"little"):
    data = io.BytesIO()
    Writer(data, 2).dump(value)
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("adapter_model/data.pkl", data.getvalue())
        file.writestr("adapter_model/byteorder", order)
        for key, bytes_ in storages.items():
            file.writestr(f"adapter_model/data/{key}", bytes_)
    return path


X = np.arange(12, dtype=np.float32)


def test_tensors_come_out_at_their_offsets_and_in_their_dtypes(tmp_path):
    half = X.astype(ml_dtypes.bfloat16)
    value = {
        "a": tensor(count=12, offset=6),
        "b": tensor("BFloat16Storage", "1", 12, shape=(4, 3)),
        "c": tensor(shape=(), stride=()),
    }
    value["d"] = Call(
        Named("torch._utils", "_rebuild_parameter"), tensor(offset=1, shape=(1, 3), stride=(9, 1)), True, {}
    )
    found = torch_zip.read(archive(tmp_path / "x.bin", value, {"0": X.tobytes(), "1": half.tobytes()}))
    np.testing.assert_array_equal(found["a"].array(), X[6:].reshape(2, 3))
    np.testing.assert_array_equal(found["b"].array(), half.reshape(4, 3))
    assert found["b"].array().dtype == ml_dtypes.bfloat16
    assert found["c"].array().shape == ()
    np.testing.assert_array_equal(found["d"].array(), X[None, 1:4])
    out = np.zeros((2, 3), np.float64)
    found["a"].copy_to(out)
    np.testing.assert_array_equal(out, X[6:].reshape(2, 3))


def test_torchs_own_file_is_read():
    found = torch_zip.read(GOLDEN)
    assert len(found) == 2 * 3 * 3
    assert all(np.isfinite(x.array()).all() and x.array().any() for x in found.values())


def test_nothing_in_a_pickle_is_run(tmp_path):
    file = tmp_path / "ran"
    for bad in (
        Call(Named(os.name, "system"), f"touch {file}"),
        Call(Named("builtins", "eval"), "1"),
        Named("torch", "load"),
    ):
        path = archive(tmp_path / "x.bin", {"a": bad}, {"0": X.tobytes()})
        with pytest.raises(
            LoraxError, match=r"holds something else than plain tensors .*save the adapter as safetensors"
        ):
            torch_zip.read(path)
    assert not file.exists()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"a": tensor(count=99, offset=7)}, "reaches beyond its bytes"),
        ({"a": tensor(shape=(10**9, 10**9), stride=(10**9, 1))}, "reaches beyond its bytes"),
        ({"a": tensor(shape=(2, -3))}, "is malformed"),
        ({"a": tensor(key="7")}, "is malformed"),
        ({"a": tensor(shape=(2, 3), stride=(1, 2))}, "is a view of another one"),
        ({"a": tensor("IntStorage")}, "plain tensors"),
        ({"a": tensor(what="module")}, "another kind"),
        ({"a": 3}, "something else than named tensors"),
        ([tensor()], "something else than named tensors"),
    ],
)
def test_what_is_wrong_is_said(value, says, tmp_path):
    path = archive(tmp_path / "x.bin", value, {"0": X[:6].tobytes()})
    with pytest.raises(LoraxError, match=says):
        torch_zip.read(path)


def test_damaged_files_are_errors(tmp_path):
    good = GOLDEN.read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "x.bin"
    for cut in (0, 1, 50, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:cut])
        with pytest.raises(LoraxError):
            torch_zip.read(path)
    for _ in range(200):
        data = bytearray(good)
        at = int(rng.integers(0, len(data)))
        data[at] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        try:
            for stored in torch_zip.read(path).values():
                stored.array()
        except LoraxError:
            continue
    for method, order in ((zipfile.ZIP_DEFLATED, b"little"), (zipfile.ZIP_STORED, b"big")):
        with pytest.raises(LoraxError, match=r"torch\.save|byte order"):
            torch_zip.read(archive(path, {"a": tensor()}, {"0": X.tobytes()}, method, order))
    path.write_bytes(struct.pack("<Q", 2) + b"{}")
    with pytest.raises(LoraxError, match=r"is no archive of torch\.save"):
        torch_zip.read(path)
