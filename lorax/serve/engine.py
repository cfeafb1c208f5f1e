"""`Engine`: requests in, events out. What it is made of is put together here; what it does is in `worker`."""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from lorax.errors import LoraxError
from lorax.models import Model
from lorax.serve import mesh, pack
from lorax.serve.config import EngineConfig
from lorax.serve.errors import BadRequest, Busy, Draining, UnknownAdapter
from lorax.serve.geometry import Geometry, geometry
from lorax.serve.handle import Handle
from lorax.serve.pages import PagePool
from lorax.serve.prefix import PrefixCache
from lorax.serve.programs import Programs, Progress
from lorax.serve.request import Request
from lorax.serve.scheduler import Scheduler
from lorax.serve.sequence import Sequence
from lorax.serve.stats import AdapterStats, Stats
from lorax.serve.store import AdapterInfo, AdapterStore
from lorax.serve.text import TextStream
from lorax.serve.worker import Worker


class Engine:
    """Serves many adapters over one base.

    Args:
        model: the base.
        config: limits.

    Raises:
        LoraxError: a pool too small for one sequence, or a mesh that does not fit.

    Example:
        >>> import jax
        >>> from lorax.models import Model, ModelConfig
        >>> shape = ModelConfig("llama", 11, 8, 12, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4)
        >>> config = EngineConfig(max_batch=2, max_length=16, page_tokens=4, pool_bytes=1 << 16, chunk=4, max_rank=2)
        >>> with Engine(Model.init(shape, jax.random.key(0)), config) as engine:
        ...     engine.start()
        ...     len(engine.submit(Request((1, 2, 3), max_new_tokens=4)).result().tokens)
        4
    """

    def __init__(self, model: Model, config: EngineConfig | None = None):
        self.config = config = EngineConfig() if config is None else config
        self.model, self.tokenizer = model, model.tokenizer
        self.max_length = min(config.max_length, model.config.max_length)
        self.place = _place(model, config, self.max_length)
        params = model.params if config.only is None else _merged(model, config.only)
        over = mesh.make(config.tensor_parallel)
        dtype = params["norm"]["scale"].dtype
        self.programs = Programs(
            model.config, mesh.placed(params, over), self.place, dtype, config.max_batch, self.max_length,
            config.chunk, config.max_rank, over,
        )  # fmt: skip
        self.pool = PagePool(self.place.pages)
        self.cache = PrefixCache(self.pool, config.page_tokens, config.prefix_cache)
        folder = None if config.state is None else Path(config.state)
        self.store = AdapterStore(
            model.params,
            self.place,
            config.tensor_parallel,
            dtype,
            self.pool,
            self._upload,
            config.max_rank,
            self.pool.pages - self.place.pages_of_tokens(self.max_length) - 1,
            config.pool_adapters,
            config.host_bytes,
            folder,
            self._wake,
        )
        own = getattr(model.tokenizer, "eos_id", None)
        eos = frozenset({*model.config.eos_ids, *(() if own is None else (own,))})
        self._worker = Worker(self.programs, self.store, eos)
        self.scheduler = Scheduler(
            self.pool,
            self.cache,
            self.store,
            config.page_tokens,
            config.max_batch,
            self.programs.shapes,
            config.patience,
        )
        self._ids = self._compiled = 0

    @classmethod
    def open(
        cls, base: str, config: EngineConfig | None = None, *, dtype: str = "float32", quantize: Any = None
    ) -> Engine:
        """An engine over a base model by name or folder; see `lorax.models.load`."""
        from lorax.models import load

        return cls(load(base, dtype, quantize=quantize), config)

    def start(self, progress: Progress | None = None) -> None:
        """Compile every program, and begin to serve.

        Args:
            progress: called as `progress(done, total, what)` after each program.
        """
        self.programs.compile(self.config.compiled, progress)
        self._compiled = self.programs.compilations
        self._worker.start(self.scheduler)

    @property
    def ready(self) -> bool:
        """Started, and not ending."""
        return self._worker.serving

    @property
    def failure(self) -> str | None:
        """Why the engine ended by itself; None while it has not."""
        return self._worker.failure

    def submit(self, request: Request) -> Handle:
        """Queue a request. Never waits.

        Raises:
            BadRequest, UnknownAdapter, Busy, Draining: see there.
        """
        request.check(self.model.config.vocab_size, self.max_length)
        if request.stop and self.tokenizer is None:
            raise BadRequest("stop needs a tokenizer, and this model has none; use stop_ids")
        now = time.monotonic()
        work = self._worker
        with work.turn:
            if not work.serving:
                raise Draining("the engine is not serving: it is starting, or ending")
            waiting = self._waiting()
            if waiting >= self.config.max_queue + self._free_rows():
                work.counters.refused += 1
                # The time in which a quarter of the queue should have gone.
                raise Busy(waiting, min(60.0, max(1.0, work.pace * waiting / 4)))
            adapter = self._adapter_of(request)
            seed = secrets.randbits(63) if request.sampling.seed is None else request.sampling.seed & (2**64 - 1)
            self._ids += 1
            handle = Handle(self._ids, request, seed, work.cancel)
            expires = None if request.deadline is None else now + request.deadline
            sequence = Sequence(request, adapter, now, seed, expires, extra=handle)
            sequence.text = self._text(request)
            work.inbox.append(sequence)
            work.live[handle.id] = sequence
            work.turn.notify()
        return handle

    def load(self, name: str, path: str | Path, replace: bool = False) -> AdapterInfo:
        """Register an adapter; waits for the disk.

        Raises:
            AdapterError: it cannot be served; says why.
        """
        if self.config.only is not None:
            raise BadRequest("this engine serves one adapter, merged into its base, and loads no others")
        return self.store.info(self.store.load(name, path, replace))

    def unload(self, name: str) -> None:
        """Forget an adapter. Requests that have it end as they began.

        Raises:
            UnknownAdapter: no such name.
        """
        self.store.unload(name)

    def adapters(self) -> list[AdapterInfo]:
        """All registered adapters."""
        return self.store.infos()

    def adapter(self, name: str) -> AdapterInfo:
        """One of them.

        Raises:
            UnknownAdapter: no such name.
        """
        return self.store.info(self.store.find(name))

    def stats(self) -> Stats:
        """A snapshot of what the engine counts."""
        c, store, cache = self._worker.counters, self.store, self.cache
        loads = store.loads_by_name()
        adapters = {name: AdapterStats(r, p, g, loads.get(name, 0)) for name, (r, p, g) in list(c.by_adapter.items())}
        held = store.device_pages
        used = self.pool.pages - self.pool.free
        return Stats(
            self._waiting(), len(self.scheduler.running), c.batch, c.steps, c.step_seconds,
            c.host_seconds, c.prompt_tokens, c.cached_tokens, c.generated_tokens, self.pool.pages,
            used - held - cache.idle, cache.idle, held, self.pool.free, cache.hits, cache.lookups, store.loads_disk,
            store.loads_device, store.evictions_device, store.evictions_host, self.scheduler.preemptions,
            self.programs.compilations - self._compiled, dict(c.finished), c.refused, adapters,
            dict(self.scheduler.line.counters),
        )  # fmt: skip

    def drain(self, timeout: float | None = None) -> bool:
        """Take no new requests and wait for those that are here.

        Returns:
            Whether all ended within `timeout` seconds.
        """
        work = self._worker
        with work.turn:
            work.draining = True
            return work.turn.wait_for(lambda: not work.live, timeout)

    def close(self) -> None:
        """End at once: what runs is cancelled."""
        self._worker.close()
        self.store.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _waiting(self) -> int:
        return len(self._worker.inbox) + len(self.scheduler.line)

    def _free_rows(self) -> int:
        return max(0, self.config.max_batch - len(self.scheduler.running))

    def _adapter_of(self, request: Request) -> Any:
        if request.adapter is None:
            return None
        if self.config.only is not None:
            if request.adapter != Path(self.config.only).name:
                raise UnknownAdapter(request.adapter, [Path(self.config.only).name])
            return None
        return self.store.hold(request.adapter)

    def _text(self, request: Request) -> TextStream | None:
        return None if self.tokenizer is None else TextStream(self.tokenizer, request.prompt, request.stop)

    def _upload(self, pages: list[int], packed: pack.Packed) -> None:
        self.programs.upload(pages, packed.pages)

    def _wake(self) -> None:
        self._worker.wake()


def _place(model: Model, config: EngineConfig, max_length: int) -> Geometry:
    """The layout: as many pages as the bytes allow.

    Raises:
        LoraxError: too few for one sequence of full length.
    """
    item = jnp.dtype(model.params["norm"]["scale"].dtype).itemsize
    one = geometry(model.config, config.page_tokens, 1, config.tensor_parallel)
    pages = config.pool_bytes // (one.page_size * item * config.tensor_parallel)
    need = one.pages_of_tokens(max_length) + 2
    if pages < need:
        raise LoraxError(
            f"engine: pool_bytes={config.pool_bytes} gives {pages} pages, and a sequence of {max_length} tokens needs "
            f"{need}; give it {need * one.page_size * item * config.tensor_parallel} or more, or shorten max_length"
        )
    return geometry(model.config, config.page_tokens, pages, config.tensor_parallel)


def _merged(model: Model, folder: str) -> Any:
    """The base with an adapter merged into it."""
    from lorax.io.peft import load_adapter
    from lorax.tree import merge

    return merge(load_adapter(folder, model.params))
