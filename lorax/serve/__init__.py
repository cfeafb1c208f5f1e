"""Thousands of adapters over one base: pages, mixed batches, continuous batching.

engine      what callers see; worker: its thread; handle, request, text: what goes in and comes out
scheduler   who runs and whose prompt is read on; fairness, sequence
pages       who has which page; prefix: pages to be used again; store, registry, pack: adapters and where they are
step        the model on pages; geometry, paged, delta: how they lie, attention, adapters; sampling, mesh
programs    shapes, compiled before serving; batch: the arrays of a step
"""

from lorax.serve.config import EngineConfig
from lorax.serve.engine import Engine
from lorax.serve.errors import AdapterError, BadRequest, Busy, Draining, ServeError, UnknownAdapter
from lorax.serve.handle import Handle
from lorax.serve.request import Event, Request, Sampling, TokenLogprob, Usage
from lorax.serve.stats import AdapterStats, Stats
from lorax.serve.store import AdapterInfo

__all__ = [
    "AdapterError",
    "AdapterInfo",
    "AdapterStats",
    "BadRequest",
    "Busy",
    "Draining",
    "Engine",
    "EngineConfig",
    "Event",
    "Handle",
    "Request",
    "Sampling",
    "ServeError",
    "Stats",
    "TokenLogprob",
    "UnknownAdapter",
    "Usage",
]
