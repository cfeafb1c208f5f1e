"""Checkpoints that survive being killed, filled disks and flipped bits.

A checkpoint is a folder `checkpoints/00000040/`:

    state/         the arrays of `State`, written by Orbax (one flat mapping of path to array)
    meta.json      step, data position, evaluations so far, and the SHA-256 of every file of `state/` and of itself

It is written under a name that no reader looks at, every file is fsynced, and one rename publishes it. So
whatever moment a process dies at, a folder with a number for a name is complete; and because disks lie,
`restore` checks the hashes and steps back to the previous checkpoint, saying so, when they do not match.

Over several processes every one of them calls `save` and `restore`, with a folder that all of them see. Each writes the
parts of arrays that its devices hold; process 0 does the rest, and the others hear how it went. An array is restored to
wherever the array of `like` lies: another mesh, or another number of processes, than it was saved from.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lorax.distributed import from_main, is_main, on_main
from lorax.errors import LoraxError
from lorax.train.step import State

# What the index of a checkpoint takes beside its arrays, generously.
_MARGIN = 1 << 18


class Restored(NamedTuple):
    """A state read back, and what was saved beside it."""

    state: State
    meta: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        root: folder that holds them; made on the first save.
        keep: how many of the newest to keep, at least 1.
        say: where messages for the user go.

    Example:
        >>> import tempfile, optax, jax.numpy as jnp
        >>> from lorax.train.step import init_state
        >>> state = init_state({"w": jnp.ones(2)}, optax.sgd(0.1), seed=0)
        >>> store = Checkpoints(Path(tempfile.mkdtemp()))
        >>> _ = store.save(state, {"note": "hello"})
        >>> store.restore(state).meta["note"]
        'hello'
    """

    def __init__(self, root: Path, *, keep: int = 2, say: Callable[[str], None] = print):
        self.root, self.keep, self.say = root, keep, say

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, oldest first."""
        if not self.root.is_dir():
            return []
        return sorted(int(p.name) for p in self.root.iterdir() if p.name.isdigit() and p.is_dir())

    def latest(self) -> Path | None:
        """The newest published checkpoint's folder."""
        steps = self.steps()
        return self.path(steps[-1]) if steps else None

    def path(self, step: int) -> Path:
        return self.root / f"{step:08d}"

    def save(self, state: State, meta: dict[str, Any]) -> Path:
        """Write `state` and `meta` (anything JSON takes), publish, and drop all but the newest `keep`.

        Saving a step that is already there does nothing: it would be the same bytes.

        Raises:
            LoraxError: the disk is full or a file could not be written; earlier checkpoints are untouched.
        """
        final = self.path(int(state.step))
        if from_main(final.exists()):
            return final
        aside = self.root / f"{final.name}.writing"
        try:
            on_main(self._sweep)
            _write(aside, state, meta)
            on_main(lambda: self._publish(aside, final))
        except Exception as error:
            if is_main():
                shutil.rmtree(aside, ignore_errors=True)
            raise self._refused(final, error) from error
        return final

    def _publish(self, aside: Path, final: Path) -> None:
        os.rename(aside, final)
        _fsync(self.root)
        for step in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(step), ignore_errors=True)

    def restore(self, like: State) -> Restored | None:
        """The newest checkpoint that is whole, in the structure of `like`; None when there is none at all.

        Raises:
            LoraxError: checkpoints exist and every one of them is damaged, or holds another tree.
        """
        step = on_main(self._newest_whole)
        return None if step is None else _read(self.path(step), like)

    def _newest_whole(self) -> int | None:
        steps = self.steps()
        for step in reversed(steps):
            fault = _fault(self.path(step))
            if fault is None:
                return step
            self.say(f"checkpoint {self.path(step)} is damaged ({fault}): falling back to the one before it")
        if steps:
            raise LoraxError(f"{self.root}: every checkpoint is damaged; start again with another --out")
        return None

    def drop_after(self, step: int) -> None:
        """Remove checkpoints newer than `step`: they were found damaged and the run will write them again."""
        on_main(lambda: [shutil.rmtree(self.path(later)) for later in self.steps() if later > step] and None)

    def _sweep(self) -> None:
        """Make the folder, and remove what a killed process left half-written in it."""
        self.root.mkdir(parents=True, exist_ok=True)
        for old in self.root.glob("*.writing"):
            shutil.rmtree(old, ignore_errors=True)

    def _refused(self, final: Path, error: Exception) -> LoraxError:
        if not _is_full(error) and not isinstance(error, OSError):
            raise error
        why = "no space left on the device" if _is_full(error) else str(error)
        last = self.latest()
        kept = f"the previous checkpoint {last} is intact" if last else "there is no earlier checkpoint"
        return LoraxError(f"could not save {final}: {why}; {kept}; free some space and run again with --resume")


def flat(state: State) -> dict[str, Any]:
    """The arrays of a state by readable path, for instance `trainable/layers/attn/q_proj/kernel/B`."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {path_name(path): leaf for path, leaf in leaves}


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of `jax.tree_util` as words between slashes."""
    return "/".join(_part(key) for key in path)


def _part(key: Any) -> str:
    for name in ("name", "key", "idx"):
        if hasattr(key, name):
            return str(getattr(key, name))
    return str(key)


def _write(folder: Path, state: State, meta: dict[str, Any]) -> None:
    # Orbax takes a second to import; only runs that save should wait for it.
    import orbax.checkpoint as ocp

    arrays = flat(state)
    on_main(lambda: _reserve(folder, sum(x.nbytes for x in arrays.values()) + _MARGIN))
    with _one_voice(), ocp.PyTreeCheckpointer() as writer:
        writer.save((folder / "state").absolute(), arrays)
    step = int(state.step)
    on_main(lambda: _seal(folder, step, arrays, meta))


def _seal(folder: Path, step: int, arrays: dict[str, Any], meta: dict[str, Any]) -> None:
    """Write down what is there, and force it to the disk."""
    hashes = {str(p.relative_to(folder)): _sha256(p) for p in _files(folder)}
    record = {"step": step, "meta": meta, "arrays": _shapes(arrays), "sha256": hashes}
    record["own_sha256"] = _own_sha256(record)
    (folder / "meta.json").write_text(json.dumps(record, indent=1) + "\n")
    for path in _files(folder):
        _fsync(path)
    for directory in {p.parent for p in _files(folder)}:
        _fsync(directory)


def _reserve(folder: Path, size: int) -> None:
    """Fail now if `size` bytes cannot be written, rather than inside TensorStore, whose threads print tracebacks."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / "reserve"
    with place.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        elif shutil.disk_usage(folder).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    place.unlink()


@contextlib.contextmanager
def _one_voice() -> Iterator[None]:
    """Keep Orbax from logging an error that it raises as well: the user gets one line, from us."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _read(folder: Path, like: State) -> Restored:
    import orbax.checkpoint as ocp

    record = json.loads((folder / "meta.json").read_text())
    wanted = flat(like)
    _same_tree(folder, record["arrays"], _shapes(wanted))
    with ocp.PyTreeCheckpointer() as reader:
        args = ocp.checkpoint_utils.construct_restore_args(wanted)
        found = reader.restore((folder / "state").absolute(), restore_args=args)
    state = jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in wanted])
    return Restored(state, record["meta"])


def _shapes(arrays: dict[str, Any]) -> dict[str, str]:
    return {name: f"{jnp.dtype(x.dtype).name}{list(x.shape)}" for name, x in arrays.items()}


def _same_tree(folder: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    for name in sorted(set(saved) | set(wanted)):
        if saved.get(name) != wanted.get(name):
            has, wants = saved.get(name, "nothing"), wanted.get(name, "nothing")
            raise LoraxError(f"checkpoint {folder}: {name} is {has} there, and {wants} in this run")


def _fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if every byte is as it was written."""
    try:
        record = json.loads((folder / "meta.json").read_text())
        hashes, own = record["sha256"], record["own_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"meta.json: {type(error).__name__}"
    if own != _own_sha256(record):
        return "meta.json has changed"
    here = {str(p.relative_to(folder)) for p in _files(folder)} - {"meta.json"}
    if here != set(hashes):
        return f"{sorted(here ^ set(hashes))[0]} missing or unexpected"
    for name, digest in hashes.items():
        if _sha256(folder / name) != digest:
            return f"{name} has changed"
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _own_sha256(record: dict[str, Any]) -> str:
    """The digest of a record without its own digest: a flipped bit in the data position is no less a fault."""
    rest = {key: value for key, value in record.items() if key != "own_sha256"}
    as_read = json.loads(json.dumps(rest))  # keys that are numbers come back as words, and sort otherwise
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_full(error: BaseException) -> bool:
    """Whether an error, or one that it came from, says that the disk (or a size limit) is full.

    TensorStore reports the operating system's words inside its own exception, without an errno.
    """
    full = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in full:
            return True
        if any(os.strerror(code) in str(seen) for code in full):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
