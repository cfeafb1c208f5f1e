"""Thousands of adapters over one base: pages, mixed batches, continuous batching."""

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
