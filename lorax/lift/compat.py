"""All that differs between the JAX versions we support (0.10.2 and later), and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend import source_info_util
from jax.extend.core import Literal


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr and its constants. JAX 0.10 keeps the pair in a ClosedJaxpr, 0.12 in the Jaxpr itself."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    return inner, getattr(jaxpr, "consts", ())


def scan_operands(params: dict[str, Any], args: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """The operands of a scan as (constants, carry, scanned)."""
    if "num_consts" in params:
        n, m = params["num_consts"], params["num_carry"]
    else:
        consts, carry, _ = params["ft_in"].update(list(range(len(args)))).unpack()
        n, m = len(list(consts)), len(list(carry))
    return list(args[:n]), list(args[n : n + m]), list(args[n + m :])


def context(eqn: Any) -> Any:
    """The context an equation was traced in: named scopes, source location, mesh and configuration."""
    name_stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    return _Both(source_info_util.user_context(eqn.source_info.traceback, name_stack=name_stack), eqn.ctx.manager)


class _Both:
    """Two context managers entered in order. Cheaper than an ExitStack, and this runs once per equation."""

    def __init__(self, first: Any, second: Any):
        self.first, self.second = first, second

    def __enter__(self) -> None:
        self.first.__enter__()
        self.second.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self.second.__exit__(*exc)
        self.first.__exit__(*exc)


def where(eqn: Any) -> str:
    """The user's file and line of an equation, for messages."""
    return source_info_util.summarize(eqn.source_info)


def bind(eqn: Any, args: Sequence[Any]) -> list[Any]:
    """Evaluate an equation as it stands on plain arrays."""
    out = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def subfuns(eqn: Any) -> tuple[Any, ...]:
    """The callables of a custom_jvp or custom_vjp equation: (function, jvp) or (function, fwd, bwd)."""
    return tuple(f.call_wrapped for f in eqn.primitive.get_bind_params(eqn.params)["subfuns"])


def cotangents(returned: Any) -> list[Any]:
    """What the backward callable of a custom_vjp gives: a list of cotangents; from JAX 0.12 on, that and logs."""
    return list(returned[0] if isinstance(returned, tuple) and isinstance(returned[0], list) else returned)


def value_of(atom: Any, env: dict[Any, Any]) -> Any:
    """The value of an operand: a literal's own, or what the walk has stored for the variable."""
    return atom.val if isinstance(atom, Literal) else env[atom]
