"""`AdapterStore`: every registered adapter, and where its weights are now.

    disk      always; the folder that it was loaded from
    host      packed, as its pages will hold it; least recently used ones go when `host_bytes` are full
    device    in pages; least recently used ones go when somebody needs the pages. One in use never goes

Reading and packing happen in a thread of their own, from the moment on that a request waits for an adapter, while the
device computes. What is on the device is known and changed by the engine's thread alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from lorax.serve import pack, registry
from lorax.serve.delta import table_width
from lorax.serve.errors import AdapterError, UnknownAdapter
from lorax.serve.geometry import Geometry
from lorax.serve.pages import PagePool
from lorax.serve.registry import Entry
from lorax.serve.scheduler import FAILED, LOADING, NO_ROOM, READY


@dataclass(frozen=True)
class AdapterInfo:
    """What is known of a registered adapter.

    digest: sha256 over its files. rank: the largest of its weights. bytes: of the pages that it takes.
    tier: "device", "host" or "disk". in_use: running and waiting requests. loaded_at: seconds since the epoch.
    """

    name: str
    path: str
    digest: str
    rank: int
    parameters: int
    bytes: int
    tier: str
    in_use: int
    loaded_at: float


@dataclass(eq=False)
class Adapter:
    """One version of an adapter: a name that is loaded anew is another.

    packed: in host memory. pages, table: on the device. pins: running sequences. refs: requests not over.
    error: why it could not be read when it was needed.
    """

    entry: Entry
    packed: pack.Packed | None = None
    pages: list[int] | None = None
    table: Int[np.ndarray, "sites width"] | None = None
    scales: Float[np.ndarray, "sites layers"] | None = None
    pins: int = 0
    refs: int = 0
    loading: Future[None] | None = None
    error: str | None = None
    loads: int = 0

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def digest(self) -> str:
        return self.entry.digest


class AdapterStore:
    """The registered adapters over one pool.

    Args:
        base: the base's tree, for checking that an adapter fits.
        place, shards, dtype: how weights lie in pages.
        pool: who has which page.
        upload: `upload(pages, packed)` copies an adapter into its pages.
        max_rank, largest: bounds on an adapter's rank and on its pages.
        most: adapters on the device; None for as many as there is room for.
        host_bytes: of packed adapters in host memory.
        folder: where the registered set is kept; None keeps it nowhere.
        woken: called from the reading thread when an adapter has come.

    Raises:
        LoraxError: the kept set is damaged.
    """

    def __init__(
        self,
        base: Any,
        place: Geometry,
        shards: int,
        dtype: Any,
        pool: PagePool,
        upload: Callable[[list[int], pack.Packed], None],
        max_rank: int,
        largest: int,
        most: int | None,
        host_bytes: int,
        folder: Path | None,
        woken: Callable[[], None],
    ):
        self._base, self._place, self._shards, self._dtype = base, place, shards, dtype
        self._pool, self._upload, self._woken = pool, upload, woken
        self._max_rank, self._largest, self._most = max_rank, largest, most
        self._host_bytes, self._folder = host_bytes, folder
        self._lock = threading.RLock()
        self._writing = threading.Lock()
        # What an earlier process kept; weights are read when somebody asks for them.
        self._names = {entry.name: Adapter(entry) for entry in registry.read(folder)}
        # In order of last use, the oldest first.
        self._host: dict[Adapter, None] = {}
        self._device: dict[Adapter, None] = {}
        self._idle = self._host_used = 0
        self._reader = ThreadPoolExecutor(1, "lorax-adapters")
        self.loads_disk = self.loads_device = self.evictions_device = self.evictions_host = 0

    # The registered set: any thread.

    def load(self, name: str, path: str | Path, replace: bool) -> Adapter:
        """Read, check and register an adapter; it is in host memory then.

        Raises:
            AdapterError: it cannot be served, or the name is taken.
        """
        folder = Path(path)
        if not name or len(name) > 256 or not name.isprintable():
            raise AdapterError(f"{name!r} is no name for an adapter; use 1 to 256 printable characters", "unsupported")
        with self._lock:
            if name in self._names and not replace:
                raise AdapterError(f"an adapter {name!r} is loaded already; unload it, or ask to replace it", "exists")
        mark = pack.digest(folder)
        packed = self._read(folder, check_base=True)
        pages = packed.pages.shape[1]
        if pages > self._largest:
            raise AdapterError(
                f"{folder}: takes {pages} pages, and the pool has {self._largest} beside one sequence; give the engine "
                "more pool_bytes",
                "too_large",
            )
        entry = Entry(
            name, str(folder.resolve()), mark, packed.ranks, packed.counts, self._parameters(packed), time.time()
        )
        adapter = Adapter(entry, packed)
        with self._writing:
            with self._lock:
                if name in self._names and not replace:
                    raise AdapterError(
                        f"an adapter {name!r} is loaded already; unload it, or ask to replace it", "exists"
                    )
                self._names[name] = adapter
                self._keep(adapter)
            self._write()
        return adapter

    def unload(self, name: str) -> None:
        """Forget a name. Requests that have it end as they began.

        Raises:
            UnknownAdapter: no such name.
        """
        with self._writing:
            with self._lock:
                adapter = self.find(name)
                del self._names[name]
                if not adapter.refs:
                    self._drop_host(adapter)
            self._write()

    def find(self, name: str) -> Adapter:
        """The adapter of a name.

        Raises:
            UnknownAdapter: no such name.
        """
        with self._lock:
            if name not in self._names:
                raise UnknownAdapter(name, list(self._names))
            return self._names[name]

    def hold(self, name: str) -> Adapter:
        """`find` for a request, which then counts; its weights are fetched from the disk at once."""
        with self._lock:
            adapter = self.find(name)
            adapter.refs += 1
            self._fetch(adapter)
            return adapter

    def let_go(self, adapter: Adapter) -> None:
        """A request is over."""
        with self._lock:
            adapter.refs -= 1
            if not adapter.refs and self._names.get(adapter.name) is not adapter:
                self._drop_host(adapter)

    def infos(self) -> list[AdapterInfo]:
        """All of them."""
        with self._lock:
            return [self.info(adapter) for adapter in self._names.values()]

    def info(self, adapter: Adapter) -> AdapterInfo:
        """What is known of one."""
        e, p = adapter.entry, self._place
        tier = "device" if adapter.pages is not None else "host" if adapter.packed is not None else "disk"
        size = sum(e.counts) * p.page_size * self._shards * np.dtype(self._dtype).itemsize
        return AdapterInfo(e.name, e.path, e.digest, max(e.ranks), e.parameters, size, tier, adapter.refs, e.loaded_at)

    def loads_by_name(self) -> dict[str, int]:
        """How often each was copied to the device."""
        with self._lock:
            return {name: adapter.loads for name, adapter in self._names.items()}

    def close(self) -> None:
        """End the reading thread."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    # The device: the engine's thread.

    def ensure(self, adapter: Adapter, room: Callable[[int], bool], now: float) -> str:
        """See `scheduler.Adapters`."""
        if adapter.pages is not None:
            return READY
        with self._lock:
            if adapter.error is not None:
                return FAILED
            packed = adapter.packed
            if packed is None:
                self._fetch(adapter)
                return LOADING
            self._host[adapter] = self._host.pop(adapter, None)
        if self._most is not None and len(self._device) >= self._most and not self._evict_one():
            return NO_ROOM
        count = packed.pages.shape[1]
        if not room(count):
            return NO_ROOM
        pages = self._pool.take(count)
        assert pages is not None
        self._upload(pages, packed)
        adapter.pages = pages
        adapter.table = pack.table(packed, pages, table_width(self._place, self._max_rank))
        adapter.scales = packed.scales
        adapter.loads += 1
        self.loads_device += 1
        self._device[adapter] = None
        self._idle += count
        return READY

    def pin(self, adapter: Adapter, now: float) -> None:
        """See `scheduler.Adapters`."""
        assert adapter.pages is not None
        self._idle -= 0 if adapter.pins else len(adapter.pages)
        adapter.pins += 1
        self._device[adapter] = self._device.pop(adapter)

    def unpin(self, adapter: Adapter) -> None:
        """See `scheduler.Adapters`."""
        assert adapter.pages is not None
        assert adapter.pins > 0
        adapter.pins -= 1
        self._idle += 0 if adapter.pins else len(adapter.pages)

    def cost(self, adapter: Adapter) -> int:
        """See `scheduler.Adapters`."""
        return 0 if adapter.pins else sum(adapter.entry.counts)

    def evict(self, pages: int) -> int:
        """See `scheduler.Adapters`."""
        before = self._pool.free
        while self._pool.free - before < pages and self._evict_one():
            pass
        return self._pool.free - before

    def idle_pages(self) -> int:
        """See `scheduler.Adapters`."""
        return self._idle

    @property
    def device_pages(self) -> int:
        """Pages that adapters have."""
        return sum(len(adapter.pages or ()) for adapter in list(self._device))

    def _evict_one(self) -> bool:
        # One that nobody can ask for any more goes before all others.
        idle = [adapter for adapter in self._device if not adapter.pins]
        stale = [adapter for adapter in idle if not adapter.refs and self._names.get(adapter.name) is not adapter]
        victim = next(iter([*stale, *idle]), None)
        if victim is None:
            return False
        assert victim.pages is not None
        del self._device[victim]
        self._idle -= len(victim.pages)
        self._pool.give(victim.pages)
        victim.pages = victim.table = None
        self.evictions_device += 1
        return True

    # The host: under the lock.

    def _fetch(self, adapter: Adapter) -> None:
        if adapter.pages is None and adapter.packed is None and adapter.loading is None:
            adapter.error = None
            adapter.loading = self._reader.submit(self._bring, adapter)

    def _bring(self, adapter: Adapter) -> None:
        folder, packed, error = Path(adapter.entry.path), None, None
        try:
            if pack.digest(folder) != adapter.digest:
                raise AdapterError(f"{folder}: changed since it was loaded; load it again", "corrupt")
            packed = self._read(folder, check_base=False)
        except AdapterError as caught:
            error = str(caught)
        except MemoryError:
            error = f"{folder}: there is too little memory to read it"
        with self._lock:
            adapter.loading, adapter.error = None, error
            if packed is not None:
                adapter.packed = packed
                self.loads_disk += 1
                self._keep(adapter)
        self._woken()

    def _read(self, folder: Path, check_base: bool) -> pack.Packed:
        leaves = pack.read(folder, self._base, check_base)
        return pack.pack(folder, leaves, self._place, self._shards, self._max_rank, self._dtype)

    def _keep(self, adapter: Adapter) -> None:
        """An adapter is in host memory; others go where that is too much, those that are asked for last."""
        assert adapter.packed is not None
        self._host[adapter] = None
        self._host_used += adapter.packed.bytes
        if self._host_used <= self._host_bytes:
            return
        for other in sorted(self._host, key=lambda a: a.refs > 0):
            # One that was replaced may no longer be on the disk: it stays for those who have asked for it.
            last = other.refs > 0 and self._names.get(other.name) is not other
            if other is not adapter and not last and self._host_used > self._host_bytes:
                self._drop_host(other)
                self.evictions_host += 1

    def _drop_host(self, adapter: Adapter) -> None:
        if adapter.packed is not None:
            self._host_used -= adapter.packed.bytes
            del self._host[adapter]
            adapter.packed = None

    def _write(self) -> None:
        if self._folder is not None:
            with self._lock:
                entries = [adapter.entry for adapter in self._names.values()]
            registry.write(self._folder, entries)

    def _parameters(self, packed: pack.Packed) -> int:
        sites = zip(self._place.sites, packed.ranks, strict=True)
        return self._place.layers * sum(rank * (site.size_in + site.size_out) for site, rank in sites)
