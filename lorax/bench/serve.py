"""`lorax bench serve`: what many adapters cost a server, against the base alone, merging, and PEFT on torch.

    together   a full batch: the base, 32 adapters, and 8 adapters against transformers + PEFT
    cold       time to first token of an adapter in host memory and on the disk, above one on the device
    stream     a power-law workload as fast as it goes: 1 to 2,000 registered adapters, and swapping by merging
    arrive     the same at its own times, Poisson and bursty: latencies and SLO attainment

Within a part all that is compared takes turns in one run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from lorax.bench import record
from lorax.bench.protocol import Worker
from lorax.bench.serve_load import Workload
from lorax.errors import LoraxError

PARTS = ("together", "cold", "stream", "arrive")


@dataclass(frozen=True)
class ServeConfig:
    """What is measured."""

    parts: tuple[str, ...] = PARTS
    """Of together, cold, stream, arrive."""
    base: str = "smollm2-135m"
    """The base model."""
    batch: int = 32
    """Requests that are decoded together."""
    prompt: int = 32
    """Tokens of a prompt of the full batch."""
    answer: int = 48
    """Tokens of its answers."""
    tenants: int = 8
    """Adapters of the batch that PEFT runs as well."""
    counts: tuple[int, ...] = (1, 5, 100, 1000, 2000)
    """Registered adapters of the streams."""
    pool: int = 50
    """Adapters that the pool holds at once in them."""
    requests: int = 192
    """Requests of a stream."""
    arrivals: int = 96
    """Requests of a workload with arrivals."""
    rate: float = 6.0
    """Its requests a second."""
    slo_first: float = 1.0
    """Seconds in which a first token should come."""
    slo_each: float = 0.2
    """Seconds in which each further one should."""
    rounds: int = 3
    """Times that each thing takes its turn."""
    threads: int = 0
    """Cores that each side may use; 0 is all of this process's."""
    peer_python: str | None = None
    """A Python with torch, transformers and peft; without it only our own times are taken."""
    pool_mb: int = 1024
    """Device memory of the engine."""
    folder: str | None = None
    """Where the adapters are written; by default in the cache, where the next run finds them."""
    seed: int = 0
    """Draws tokens and workloads."""


def run(config: ServeConfig) -> dict[str, Any]:
    """Measure, and return everything as plain data: `figures`, `seconds`, `parts`, `machine`, `versions`, `config`.

    Raises:
        LoraxError: numbers below one, a part that there is not, or a side that does not run.
    """
    numbers = (config.batch, config.answer - 1, config.tenants, config.rounds, config.requests, *config.counts)
    if min(numbers) < 1 or not config.counts:
        raise LoraxError("bench serve: batch, tenants, counts, requests and rounds are at least 1, answer at least 2")
    if unknown := set(config.parts) - set(PARTS):
        raise LoraxError(f"bench serve: there is no part {', '.join(sorted(unknown))}; choose of {', '.join(PARTS)}")
    busy, threads = os.getloadavg()[0], config.threads or len(os.sched_getaffinity(0))
    folder, parts, versions = _folder(config), {}, record.versions()
    with ExitStack() as stack:
        ours = [sys.executable, "-m", "lorax.bench.serve_worker"]
        side = stack.enter_context(Worker("lorax", ours, {"JAX_PLATFORMS": "cpu"}))
        peer = config.peer_python is not None and "together" in config.parts
        about = side.ask(op="open", base=config.base, folder=str(folder), threads=threads, export=peer)
        if "together" in config.parts:
            parts["together"] = _together(config, side, folder, threads, about["vocab"], versions)
        for name, measure in (("cold", _cold), ("stream", _stream), ("arrive", _arrive)):
            if name in config.parts:
                parts[name] = measure(config, side)
    return {
        "bench": "serve",
        "config": {**asdict(config), "threads": threads, "folder": None},
        "machine": {**record.machine(), "load_average": busy},
        "versions": versions,
        "figures": figures(parts, config),
        "seconds": seconds(parts),
        "parts": parts,
    }


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A result with the parts of an older one that it has not measured itself, each with where it was measured.

    Raises:
        LoraxError: the older one is of another machine or other versions.
    """
    for name in ("processor", "cores"):
        if old["machine"][name] != new["machine"][name]:
            raise LoraxError(f"the older result is of another machine ({old['machine'][name]}); write to another --out")
    parts = old["parts"] | new["parts"]
    config = ServeConfig(**{**old["config"], **new["config"], "parts": tuple(parts)})
    whole = {"figures": figures(parts, config), "seconds": seconds(parts), "parts": parts}
    said = {"config": new["config"] | {"parts": sorted(parts)}, "versions": old["versions"] | new["versions"]}
    return {**new, **said, **whole}


def _folder(config: ServeConfig) -> Path:
    from lorax.models.resolve import cache_dir

    return Path(config.folder) if config.folder else cache_dir() / "bench-serve"


def _start(config: ServeConfig, side: Worker, pool: int | None, host: int = 8 << 30) -> None:
    sizes = {"batch": config.batch, "pool_adapters": pool, "pool_bytes": config.pool_mb << 20, "host_bytes": host}
    side.ask(op="start", length=max(128, config.prompt + config.answer), **sizes)


def _together(
    config: ServeConfig, side: Worker, folder: Path, threads: int, vocab: int, versions: dict[str, str]
) -> dict[str, Any]:
    """The base, adapters of two kinds, and the peer, in turns."""
    from lorax.bench.serve_worker import full_batch

    shape = {"batch": config.batch, "prompt": config.prompt, "answer": config.answer, "seed": config.seed}
    _start(config, side, None)
    for targets in ("attention", "all"):
        side.ask(op="write", first=0, count=config.batch, targets=targets)
        side.ask(op="load", count=config.batch, targets=targets)
    turns = [("base", 0, "attention"), ("attention", config.batch, "attention")]
    turns += [("tenants", config.tenants, "attention"), ("all", config.batch, "all")]
    out: dict[str, list[Any]] = {}
    with ExitStack() as stack:
        peer, peers = None, {}
        if config.peer_python is not None:
            script = str(Path(__file__).with_name("peft_serve_worker.py"))
            peer = stack.enter_context(Worker("PEFT", [config.peer_python, script]))
            loaded = peer.ask(
                op="load", folder=str(folder), targets="attention", adapters=config.tenants, threads=threads
            )
            versions |= loaded["versions"]
            batch = full_batch(config.tenants, config.batch, config.prompt, config.answer, config.seed, vocab)
            peers = {"prompts": [a.prompt for a in batch], "adapters": config.tenants, "answer": config.answer}
        # The first turn of each brings its adapters into the pool, or warms torch up, and is not counted.
        for turn in range(config.rounds + 1):
            for name, adapters, targets in turns:
                found = side.ask(op="together", adapters=adapters, targets=targets, **shape)
                if turn:
                    out.setdefault(name, []).append(found)
            if peer is not None:
                found = peer.ask(op="together", **peers)
                if turn:
                    out.setdefault("PEFT", []).append({k: v for k, v in found.items() if k != "tokens"})
    return {name: _middle(rows) for name, rows in out.items()}


def _cold(config: ServeConfig, side: Worker) -> dict[str, Any]:
    rounds, out = 6 * config.rounds, {}
    side.ask(op="write", first=0, count=2 * rounds + 4, targets="attention")
    for tier, host in (("device", 8 << 30), ("host", 8 << 30), ("disk", 0)):
        _start(config, side, 1, host)
        side.ask(op="load", count=2 * rounds + 4, targets="attention")
        out[tier] = side.ask(op="first_token", tier=tier, targets="attention", rounds=rounds, prompt=config.prompt)
    return out


def _load(config: ServeConfig, requests: int, adapters: int, cv: float = 1.0) -> dict[str, Any]:
    return asdict(Workload(requests, config.rate, cv, adapters, seed=config.seed, prompt=(8, 48), answer=(8, 48)))


def _stream(config: ServeConfig, side: Worker) -> dict[str, Any]:
    """The base and each number of adapters in turns; the most are registered throughout, and so many are asked for."""
    out: dict[str, list[Any]] = {}
    side.ask(op="write", first=0, count=max(config.counts), targets="few")
    _start(config, side, config.pool)
    shape = {"concurrency": 2 * config.batch, "targets": "few"}
    registering = side.ask(op="load", count=max(config.counts), targets="few")
    for turn in range(config.rounds + 1):
        for count in (0, *config.counts):
            found = side.ask(op="stream", load=_load(config, config.requests, count), **shape)
            if turn:
                out.setdefault(f"{count} adapters" if count else "base", []).append(found)
    found = side.ask(
        op="swap", load=_load(config, config.requests, max(config.counts)), batch=config.batch, targets="few"
    )
    return {name: _middle(rows) for name, rows in out.items()} | {"merging": found, "registering": registering}


def _arrive(config: ServeConfig, side: Worker) -> dict[str, Any]:
    slo = {"slo_first": config.slo_first, "slo_each": config.slo_each, "targets": "few"}
    side.ask(op="write", first=0, count=max(config.counts), targets="few")
    _start(config, side, config.pool)
    side.ask(op="load", count=max(config.counts), targets="few")
    side.ask(op="stream", load=_load(config, config.batch, 5), concurrency=config.batch, targets="few")
    out = {}
    for kind, cv in (("Poisson", 1.0), ("bursty", 4.0)):
        for count in (0, *config.counts):
            name = f"{count} adapters" if count else "base"
            out[f"{kind}, {name}"] = side.ask(op="arrive", load=_load(config, config.arrivals, count, cv), **slo)
    return out


def _middle(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of a thing's turns, and the shortest of its times."""
    out = {key: median(row[key] for row in rows) for key in rows[0] if rows[0][key] is not None}
    return {**out, "least_seconds": min(row["seconds"] for row in rows)}


def seconds(parts: dict[str, Any]) -> dict[str, Any]:
    """For the table: how long each full batch and each stream took."""
    rows = {}
    for part in ("together", "stream"):
        for name, row in parts.get(part, {}).items():
            if "least_seconds" in row:
                rows[f"{part}: {name}"] = {"median": row["seconds"], "least": row["least_seconds"]}
    return rows


def figures(parts: dict[str, Any], config: ServeConfig) -> dict[str, Any]:
    """The ratios and milliseconds, with the bound that each is held to."""
    together, stream, cold = (parts.get(name, {}) for name in ("together", "stream", "cold"))

    def ratio(rows: dict[str, Any], a: str, b: str, what: str = "tokens_per_second") -> float | None:
        return rows[a][what] / rows[b][what] if a in rows and b in rows else None

    def above(tier: str) -> float | None:
        return 1e3 * (cold[tier]["median"] - cold["device"]["median"]) if cold else None

    shares = [row["host_share"] for row in together.values() if "host_share" in row]
    many = f"{1000 if 1000 in config.counts else max(config.counts)} adapters"
    few = f"{5 if 5 in config.counts else min(config.counts)} adapters"
    rows = {
        f"{config.batch}_adapters_against_the_base": (ratio(together, "attention", "base"), "least", 0.85),
        f"{config.batch}_adapters_on_every_map_against_the_base": (ratio(together, "all", "base"), "least", 0.85),
        f"{many}_against_{few}".replace(" ", "_"): (ratio(stream, many, few), "least", 0.95),
        f"decoding_{config.tenants}_adapters_against_PEFT": (
            ratio(together, "tenants", "PEFT", "decode_tokens_per_second"),
            "least",
            3.0,
        ),
        "scheduling_and_paging_part_of_a_step": (max(shares) if shares else None, "most", 0.05),
        "cold_from_host_ms_above_warm": (above("host"), "most", 150.0),
        "cold_from_disk_ms_above_warm": (above("disk"), "most", 400.0),
        "many_adapters_against_merging": (ratio(stream, f"{max(config.counts)} adapters", "merging"), "least", 1.0),
    }
    return {
        name: {
            "value": None if value is None else round(value, 4),
            "bound": [kind, bound],
            "met": None if value is None else bool(value <= bound if kind == "most" else value >= bound),
        }
        for name, (value, kind, bound) in rows.items()
    }
