"""`lorax serve`: one base, many adapters, OpenAI's API."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorax.cli.output import print_json
from lorax.errors import LoraxError

if TYPE_CHECKING:
    from lorax.serve.http import Settings

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True)
class Args:
    """Serve a base model and adapters over it, by OpenAI's API: the adapter is named in `model`.

    An admin key for loading and unloading comes from the variable LORAX_ADMIN_KEY, or from the keys file.

    Example: lorax serve --base smollm2-135m --adapters runs/
    """

    base: str = "smollm2-135m"
    """A Hugging Face directory, a .gguf file, hf:org/name, or smollm2-135m."""
    adapters: tuple[str, ...] = ()
    """Folders of adapters or runs. All that they hold is served; adapters are loaded from nowhere else."""
    only: str | None = None
    """An adapter to merge into the base: it is served alone, without the cost of choosing."""
    name: str | None = None
    """What requests call the base; by default what --base says."""
    host: str = "127.0.0.1"
    """Address to listen on. Beyond this machine needs --keys."""
    port: int = 8000
    """0 takes a free one."""
    keys: str | None = None
    """A file of lorax keys: requests then need one of its keys."""
    allow_host: tuple[str, ...] = ()
    """More names by which the server may be asked for, for a proxy in front of it."""
    state: str | None = None
    """Folder that keeps the set of loaded adapters over a restart; by default one in the cache."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the base's weights and of the arithmetic."""
    quant: Literal["none", "nf4", "fp4", "int8"] = "none"
    """Format of the base's weights."""
    max_batch: int = 32
    """Requests that are decoded together."""
    max_length: int = 1024
    """Tokens of a prompt and its answer."""
    max_rank: int = 64
    """Largest rank of any adapter."""
    max_queue: int = 256
    """Requests that may wait; above, they get 429."""
    pool_mb: int = 1024
    """Device memory for keys, values and adapters together, in MB."""
    pool_adapters: int | None = None
    """Most adapters on the device at once; by default as many as the pool has room for."""
    host_mb: int = 4096
    """Host memory for adapters that are not on the device, in MB; what is above is read from the disk."""
    page_tokens: int = 16
    """Tokens of a page."""
    chunk: int = 128
    """Tokens of a prompt that are read beside one step of decoding."""
    tensor_parallel: int = 1
    """Devices that share every layer."""
    max_body: int = 1 << 20
    """Bytes of a request's body."""
    max_prompt: int | None = None
    """Tokens of a prompt; by default what --max-length leaves."""
    max_tokens: int = 4096
    """Tokens of an answer."""
    max_requests: int = 256
    """HTTP requests answered at once; above, they get 429."""
    max_requests_per_key: int = 128
    """The same for one API key."""
    header_timeout: float = 10.0
    """Seconds for a request's head to arrive."""
    body_timeout: float = 30.0
    """Seconds for its body."""
    send_timeout: float = 30.0
    """Seconds for a client to take what is written to it."""
    drain: float = 30.0
    """Seconds that running requests have when the server is told to stop."""
    json: bool = False
    """Print one JSON object once requests are answered."""

    def run(self, words: Sequence[str]) -> None:
        self._check()
        try:
            from lorax.serve.http import Folders, Forgotten, Keys, Server, Site, listen
        except ModuleNotFoundError as error:
            if error.name not in ("starlette", "uvicorn", "h11", "prometheus_client"):
                raise
            raise LoraxError(f"lorax serve: {error.name} is missing; pip install 'lorax-flax[serve]'") from None
        from lorax.serve.http.logs import set_up
        from lorax.serve.http.server import url

        keys = Keys(self.keys, os.environ.get("LORAX_ADMIN_KEY"))
        settings, state = self._settings(), self._state()
        listener = listen(self.host, self.port)
        set_up()
        engine = self._engine(str(state))
        site = Site(engine, settings, keys, Folders(self.adapters), Forgotten(state / "unloaded.json"))
        server = Server(site, _progress, lambda: self._say(url(listener), settings.base, engine))
        server.serve_until_told(listener)

    def _check(self) -> None:
        for folder in self.adapters:
            if not Path(folder).is_dir():
                raise LoraxError(f"--adapters {folder}: no such folder")
        if not 0 <= self.port < 65536:
            raise LoraxError(f"--port {self.port}: must be from 0 to 65535")
        if self.keys is None and not self._local:
            raise LoraxError(f"--host {self.host}: is open to other machines; that needs --keys (lorax keys add)")
        if self.only is not None:
            if self.adapters:
                raise LoraxError("--only: serves one adapter alone; leave --adapters out")
            self._merged()

    def _merged(self) -> str:
        """The folder of the one adapter."""
        from lorax.cli.source import find

        found = find(self.base, self.only).adapter
        if found is None:
            raise LoraxError(f"--only {self.only}: holds whole weights and no adapter; name it as --base")
        return str(found)

    @property
    def _local(self) -> bool:
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    def _settings(self) -> Settings:
        from lorax.serve.http import Settings

        own = {field.name for field in fields(Settings)} & set(vars(self))
        hosts = (*LOOPBACK, self.host, *self.allow_host) if self._local or self.allow_host else None
        # A base with an adapter merged into it is one model, and goes by the adapter's name.
        name = self.name or (self.base if self.only is None else Path(self.only).resolve().name)
        return Settings(name, hosts=hosts, **{name: getattr(self, name) for name in own - {"base"}})

    def _state(self) -> Path:
        """One folder for each base and set of folders, so that two servers do not mix theirs up."""
        from lorax.models.resolve import cache_dir

        if self.state is not None:
            return Path(self.state)
        what = "\0".join([self.base, *sorted(os.path.realpath(folder) for folder in self.adapters)])
        return cache_dir() / "serve" / hashlib.sha256(what.encode()).hexdigest()[:16]

    def _engine(self, state: str) -> Any:
        from lorax.models.resolve import cache_dir
        from lorax.quant import QuantSpec
        from lorax.serve import Engine, EngineConfig

        own = {field.name for field in fields(EngineConfig)} & set(vars(self)) - {"state", "only"}
        config = EngineConfig(
            **{name: getattr(self, name) for name in own},
            pool_bytes=self.pool_mb << 20,
            host_bytes=self.host_mb << 20,
            only=None if self.only is None else self._merged(),
            state=None if self.only else state,
            compiled=str(cache_dir() / "xla"),
        )
        quant = None if self.quant == "none" else QuantSpec(self.quant)
        return Engine.open(self.base, config, dtype=self.dtype, quantize=quant)

    def _say(self, address: str, base: str, engine: Any) -> None:
        count = len(engine.adapters())
        if self.json:
            print_json({"url": address, "base": base, "adapters": count})
        else:
            print(f"{address} serves {base} and {count} adapters; the page is at /, Ctrl-C stops")
        sys.stdout.flush()


_bar: Any = None


def _progress(done: int, total: int, what: str) -> None:
    """A bar for people, a line of the log for machines."""
    global _bar
    if not sys.stderr.isatty():
        from lorax.serve.http.logs import log

        log("compiling", done=done, total=total, what=what)
        return
    from rich.console import Console
    from rich.progress import Progress

    if _bar is None:
        _bar = Progress(console=Console(stderr=True), transient=True)
        _bar.start()
        _bar.add_task("compiling")
    _bar.update(_bar.task_ids[0], completed=done, total=total, description=f"compiling {what}")
    if done >= total:
        _bar.stop()
        _bar = None
