"""Adapters come from allowed folders alone, and from safetensors alone.

A path from a request is resolved with every symbolic link followed, and so is every file in it that would be read: what
ends outside the allowed folders is refused, whatever it is called on the way there. Weights are read by a parser of
numbers; a pickle, which can run code, is never opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lorax.serve.http.errors import ApiError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth", "adapter_model.pkl")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+-]{0,127}")


class Folders:
    """Folders that adapters may come from.

    Args:
        roots: allowed folders. Without any, no adapter can be loaded.

    Example:
        >>> import tempfile
        >>> Folders([tempfile.mkdtemp()]).resolve("../../etc")
        Traceback (most recent call last):
        lorax.serve.http.errors.ApiError: lora_path: '../../etc' is outside the folders that adapters may come from
    """

    def __init__(self, roots: Sequence[str | Path]):
        self.roots = [Path(os.path.realpath(root)) for root in roots]

    def resolve(self, text: str) -> Path:
        """The folder of an adapter that a request names: absolute, or below one of the roots.

        Raises:
            ApiError: outside the roots (403), no adapter there (404), or not safetensors (400).
        """
        if not text or "\0" in text or len(text) > 4096:
            raise ApiError(400, "lora_path: give the folder of an adapter", "invalid_value", "lora_path")
        given = Path(text)
        tries = [given] if given.is_absolute() else [root / given for root in self.roots]
        inside = [real for real in map(_real, tries) if real is not None and self._allowed(real)]
        if not inside:
            # The same answer whether or not something is there: a request cannot feel its way through the disk.
            message = f"lora_path: {text!r} is outside the folders that adapters may come from"
            raise ApiError(403, message, "path_not_allowed", "lora_path")
        folders = [adapter_folder(path) for path in inside]
        found = next((folder for folder in folders if folder is not None), None)
        if found is None:
            raise self._nothing(inside[0], text)
        self._files(found, text)
        return found

    def scan(self) -> dict[str, Path]:
        """name -> folder of every adapter below the roots: itself, its children, or theirs (a run's `adapter/`)."""
        found: dict[str, Path] = {}
        for root in self.roots:
            for place in (root, *sorted(_folders(root))):
                folder = adapter_folder(place) if self._allowed(_real(place) or Path("/")) else None
                if folder is None or not NAME.fullmatch(place.name) or not self._allowed(_real(folder) or Path("/")):
                    continue
                found.setdefault(place.name, folder)
        return found

    def _files(self, folder: Path, text: str) -> None:
        """Every file that could be read lies inside, its links followed too."""
        for file in folder.iterdir():
            real = _real(file)
            if real is None or not self._allowed(real):
                message = f"lora_path: {text!r}: {file.name} is a link to outside the allowed folders"
                raise ApiError(403, message, "path_not_allowed", "lora_path")
        if not (folder / WEIGHTS).is_file():
            raise self._nothing(folder, text)

    def _nothing(self, folder: Path, text: str) -> ApiError:
        """Why there is no adapter to load."""
        if any((folder / name).exists() for name in PICKLES):
            message = f"{text!r} holds a pickle, which can run code and is never opened; save it as {WEIGHTS}"
            return ApiError(400, f"lora_path: {message}", "unsafe_format", "lora_path")
        message = f"lora_path: {text!r} holds no adapter ({CONFIG} and {WEIGHTS})"
        return ApiError(404, message, "adapter_not_found", "lora_path")

    def _allowed(self, real: Path) -> bool:
        return any(real == root or root in real.parents for root in self.roots)


def adapter_folder(place: Path) -> Path | None:
    """The adapter's own folder of a run's or an adapter's folder; None where there is no adapter."""
    for folder in (place, place / "adapter"):
        if (folder / CONFIG).is_file():
            return folder
    return None


def _folders(root: Path) -> list[Path]:
    """The folders right below; `Path.is_dir` is False, and no error, for a link that leads in a circle."""
    try:
        return [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    except OSError:
        return []


def _real(path: Path) -> Path | None:
    """The path with every link followed; None where links go in circles."""
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError):
        return None
