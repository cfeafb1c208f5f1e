"""An adapter's factors as the numbers that its pages hold (see `geometry`), and where it may change a model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from lorax.errors import LoraxError
from lorax.io import peft_read
from lorax.serve.errors import AdapterError
from lorax.serve.geometry import Geometry
from lorax.weights import Axes, LowRank

FILES = (peft_read.CONFIG, peft_read.WEIGHTS, "lorax.json")


@dataclass(frozen=True, eq=False)
class Packed:
    """An adapter in host memory, ready to be copied into pages.

    pages: `(shards, pages, page_size)`, site after site.
    counts: pages of each site. ranks: of each site, 0 where it changes nothing.
    scales: `(sites, layers)`.
    """

    pages: Float[np.ndarray, "shards pages size"] = field(repr=False)
    counts: tuple[int, ...]
    ranks: tuple[int, ...]
    scales: Float[np.ndarray, "sites layers"] = field(repr=False)

    @property
    def bytes(self) -> int:
        return self.pages.nbytes


def digest(folder: Path) -> str:
    """sha256 over the adapter's files, hexadecimal.

    Raises:
        AdapterError: missing, or the disk refuses.
    """
    total = hashlib.sha256()
    for name in FILES:
        try:
            data = (folder / name).read_bytes()
        except FileNotFoundError:
            if name != FILES[-1]:
                raise AdapterError(f"{folder}: holds no {name}, so it is no adapter", "missing") from None
            continue
        except OSError as error:
            raise AdapterError(f"{folder / name}: cannot be read ({error.strerror or error})", "io") from None
        total.update(f"{name} {len(data)}\n".encode())
        total.update(data)
    return total.hexdigest()


def read(folder: Path, base: Any, check_base: bool) -> dict[str, LowRank]:
    """An adapter's changes by the path of their weight.

    Raises:
        AdapterError: says why it cannot be served.
    """
    try:
        leaves = peft_read.read_adapter(folder, base, check_base)
    except LoraxError as error:
        text = str(error)
        reason = "wrong_base" if "another base" in text or "no place in this base" in text else "corrupt"
        raise AdapterError(text, "missing" if "is no adapter" in text else reason) from None
    except OSError as error:
        raise AdapterError(f"{folder}: cannot be read ({error.strerror or error})", "io") from None
    for path, leaf in leaves.items():
        if type(leaf) is not LowRank:
            raise AdapterError(
                f"{folder}: changes {path} by a {type(leaf).__name__}; low-rank changes alone are served together, "
                "merge it (lorax merge) and serve it alone",
                "unsupported",
            )
    return leaves


def pack(folder: Path, leaves: dict[str, LowRank], place: Geometry, shards: int, max_rank: int, dtype: Any) -> Packed:
    """Factors in the order of their pages, for each device its part.

    Raises:
        AdapterError: a rank above the bound, or a change outside the layers' linear maps.
    """
    known = {f"layers/{site.path}" for site in place.sites}
    for path, leaf in leaves.items():
        if path not in known or leaf.axes != Axes((0,), (1,), (2,)):
            raise AdapterError(
                f"{folder}: changes {path}, and an engine serves changes of the linear maps inside layers; merge it "
                "(lorax merge) and serve it alone",
                "unsupported",
            )
        if leaf.rank > max_rank:
            raise AdapterError(
                f"{folder}: rank {leaf.rank} at {path} is above max_rank={max_rank} of this engine", "too_large"
            )
        if not all(np.isfinite(np.asarray(x, np.float32)).all() for x in (leaf.A, leaf.B, leaf.scale)):
            raise AdapterError(f"{folder}: {path} has values that are no finite numbers", "corrupt")
    parts, counts, ranks = [], [], []
    scales = np.zeros((len(place.sites), place.layers), np.float32)
    for i, site in enumerate(place.sites):
        leaf = leaves.get(f"layers/{site.path}")
        rank = 0 if leaf is None else leaf.rank
        count = place.pages_of_weight(i, rank)
        ranks.append(rank)
        counts.append(count)
        if leaf is None:
            continue
        scales[i] = np.broadcast_to(np.asarray(leaf.scale, np.float32), (place.layers,))
        part = np.zeros((shards, count * place.page_size), dtype)
        a, b = np.asarray(leaf.A), np.asarray(leaf.B)
        for shard in range(shards):
            mine_a = a[:, shard * site.size_in :][:, : site.size_in] if site.split == "in" else a
            mine_b = b[..., shard * site.size_out :][..., : site.size_out] if site.split == "out" else b
            rows = part[shard, : place.layers * rank * (site.size_in + site.size_out)].reshape(place.layers, -1)
            cut = rank * site.size_in
            rows[:, :cut].reshape(place.layers, rank, site.size_in)[:] = np.swapaxes(mine_a, 1, 2)
            rows[:, cut:].reshape(place.layers, rank, site.size_out)[:] = mine_b
        parts.append(part.reshape(shards, count, place.page_size))
    return Packed(np.concatenate(parts, axis=1), tuple(counts), tuple(ranks), scales)


def table(packed: Packed, pages: list[int], width: int) -> Int[np.ndarray, "sites width"]:
    """Which page holds what of each site; zeros beyond."""
    out, at = np.zeros((len(packed.counts), width), np.int32), 0
    for i, count in enumerate(packed.counts):
        out[i, :count] = pages[at : at + count]
        at += count
    return out
