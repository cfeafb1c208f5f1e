"""Which code a row of the table stands for: `apply(y, x, a, b, ...)` and `grad(x, dy, b, ...)`."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

from lorax_kernels.multi_lora import onehot, xla


@dataclass(frozen=True)
class Implementation:
    """The two operations of `primitive`, on arrays."""

    apply: Any
    grad: Any


def _loop(in_order: bool) -> Implementation:
    return Implementation(
        functools.partial(xla.apply, in_order=in_order), functools.partial(xla.grad, in_order=in_order)
    )


def _on_chip(module: str) -> Implementation:
    """A module whose compiler is there only where its chip is: imported when it is called."""

    def run(name: str, *operands: Any, options: Any) -> Any:
        return getattr(importlib.import_module(f"lorax_kernels.multi_lora.{module}"), name)(*operands, options=options)

    return Implementation(functools.partial(run, "apply"), functools.partial(run, "grad"))


_NAMED = {
    "pallas": _on_chip("pallas_tpu"),
    "triton": _on_chip("triton_gpu"),
    "xla": _loop(True),
    "xla_sorted": _loop(False),
    "xla_onehot": Implementation(onehot.apply, onehot.grad),
}


def named(name: str) -> Implementation:
    """The implementation of a row of the table."""
    return _NAMED[name]
