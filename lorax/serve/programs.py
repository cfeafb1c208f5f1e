"""The few programs that an engine runs, compiled before it serves: shapes are buckets, and everything else is data.

    step     (rows, tokens, pages): decoding at a few batch sizes, prompts in two shapes; each at a few context lengths
    draw     rows -> tokens
    upload   one page of an adapter into the pool

Compiled programs are called as they are, so a shape that is not among them is an error, never a compilation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from lorax.models import ModelConfig
from lorax.serve import delta, mesh, sampling
from lorax.serve.geometry import Geometry
from lorax.serve.paged import Rows
from lorax.serve.scheduler import Shape

Progress = Callable[[int, int, str], None]

# Pages of an adapter that are copied at once.
UPLOAD = 4
# Context lengths are at least so many pages.
LEAST_PAGES = 4


def row_buckets(most: int) -> list[int]:
    """Batch sizes of decoding.

    Example:
        >>> row_buckets(32), row_buckets(3)
        ([4, 16, 32], [3])
    """
    return sorted({min(n, most) for n in (4, 16, 32, 64, 128)} | {most})


def page_buckets(most: int, fine: bool = False) -> list[int]:
    """Context lengths in pages: each at most twice the one before, and with those halfway between.

    Example:
        >>> page_buckets(64), page_buckets(7), page_buckets(20, fine=True)
        ([4, 8, 16, 32, 64], [4, 7], [4, 6, 8, 12, 16, 20])
    """
    sizes = [LEAST_PAGES << i for i in range(most.bit_length())]
    sizes += [size + size // 2 for size in sizes] if fine else []
    return sorted({size for size in sizes if size < most} | {most})


def prefill_shapes(chunk: int, max_batch: int) -> list[Shape]:
    """One long prompt, several short ones in as much work, or a single short one.

    Example:
        >>> prefill_shapes(128, 32)
        [Shape(rows=1, tokens=128), Shape(rows=4, tokens=32), Shape(rows=1, tokens=32)]
    """
    rows, part = min(4, max_batch), chunk // 4
    shapes = [Shape(1, chunk)]
    shapes += [Shape(rows, part)] if rows > 1 and part > 1 else []
    return shapes + ([Shape(1, part)] if part >= 16 else [])


class Programs:
    """Compiled programs, and the pool that they work on.

    Args:
        config: the whole model's shape.
        params: the base; placed on the mesh already if there is one.
        place: the layout on one device.
        dtype: of the pool.
        max_batch, max_length, chunk, max_rank: see `EngineConfig`.
        over: the mesh, None for one device.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        place: Geometry,
        dtype: Any,
        max_batch: int,
        max_length: int,
        chunk: int,
        max_rank: int,
        over: Any = None,
    ):
        self.config, self.params, self.place, self.max_rank, self.max_length = (
            config,
            params,
            place,
            max_rank,
            max_length,
        )
        self.mesh = over
        self.rows = row_buckets(max_batch)
        self.most_pages = place.pages_of_tokens(max_length)
        self.shapes = prefill_shapes(chunk, max_batch)
        self.pool = mesh.new_pool(place, dtype, over)
        self.compilations = 0
        self._steps: dict[tuple[int, int, int], Any] = {}
        self._draws: dict[int, Any] = {}
        self._upload: Any = None

    def compile(self, folder: str | None, progress: Progress | None) -> None:
        """Compile everything.

        folder: where compiled programs are kept from one start to the next.
        """
        decode = [(n, 1, pages) for n in self.rows for pages in self.pages(n, 1)]
        prompts = [(*shape, pages) for shape in self.shapes for pages in self.pages(*shape)]
        rows = sorted({*self.rows, *(shape.rows for shape in self.shapes)})
        total, done = len(decode) + len(prompts) + len(rows) + 1, 0

        def tell(what: str) -> None:
            nonlocal done
            done += 1
            self.compilations += 1
            if progress is not None:
                progress(done, total, what)

        with kept_in(folder):
            for key in [*decode, *prompts]:
                self._steps[key] = self._compile_step(*key)
                tell(f"step {key[0]} x {key[1]}, {key[2] * self.place.page_tokens} tokens")
            for n in rows:
                self._draws[n] = self._compile_draw(n)
                tell(f"sampling {n}")
            self._upload = self._compile_upload()
            tell("upload")

    def step(self, rows: Rows, route: delta.Route) -> Any:
        """Run a step on the pool; logits, on the device."""
        key = (*rows.ids.shape, rows.table.shape[1])
        self.pool, logits = self._steps[key](self.params, self.pool, rows, route)
        return logits

    def draw(self, logits: Any, settings: sampling.Settings) -> sampling.Drawn:
        """Tokens from logits."""
        return self._draws[logits.shape[0]](logits, settings)

    def upload(self, pages: list[int], data: np.ndarray) -> None:
        """Copy `(shards, pages, size)` into pages of the pool."""
        for at in range(0, len(pages), UPLOAD):
            count = min(UPLOAD, len(pages) - at)
            # What is left over goes to page 0, which is nobody's.
            index = np.zeros(UPLOAD, np.int32)
            index[:count] = pages[at : at + count]
            part = data[:, at : at + UPLOAD]
            if count < UPLOAD:
                part = np.concatenate(
                    [part, np.zeros((part.shape[0], UPLOAD - count, part.shape[2]), part.dtype)], axis=1
                )
            self.pool = self._upload(self.pool, index, part)

    def pages(self, rows: int, tokens: int) -> list[int]:
        """Context lengths, in pages, of a step's programs: most of them for the full batch, where most time goes."""
        chunk = -(-tokens // self.place.page_tokens)
        sizes = page_buckets(self.most_pages, fine=(rows, tokens) == (self.rows[-1], 1))
        # A chunk needs the pages that it fills.
        return [size for size in sizes if size >= min(chunk, self.most_pages)]

    def bucket(self, sizes: list[int], need: int) -> int:
        """The smallest size that is enough."""
        return next(size for size in sizes if size >= need)

    def _compile_step(self, rows: int, tokens: int, pages: int) -> Any:
        shapes = Rows(
            np.zeros((rows, tokens), np.int32), np.zeros(rows, np.int32), np.zeros(rows, np.int32),
            np.zeros((rows, pages), np.int32),
        )  # fmt: skip
        route = delta.empty_route(self.place, rows, self.max_rank)
        step = mesh.step(self.config, self.place, self.mesh)
        return jax.jit(step, donate_argnums=1).lower(self.params, self.pool, shapes, route).compile()

    def _compile_draw(self, rows: int) -> Any:
        logits = jax.ShapeDtypeStruct((rows, self.config.vocab_size), jnp.float32, sharding=mesh.everywhere(self.mesh))
        settings = sampling.plain_settings(rows, self.max_length)
        return jax.jit(sampling.draw).lower(logits, settings).compile()

    def _compile_upload(self) -> Any:
        shards = 1 if self.mesh is None else self.mesh.size
        data = np.zeros((shards, UPLOAD, self.place.page_size), self.pool.dtype)
        write = mesh.upload(self.mesh)
        return jax.jit(write, donate_argnums=0).lower(self.pool, np.zeros(UPLOAD, np.int32), data).compile()


@contextlib.contextmanager
def kept_in(folder: str | None) -> Iterator[None]:
    """Compile through a folder of compiled programs, whatever the process does otherwise."""
    if folder is None:
        yield
        return
    wanted = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in wanted}
    try:
        compilation_cache.reset_cache()
        for name, value in wanted.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
