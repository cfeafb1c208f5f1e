"""How the session's programs are compiled: cheaply, but where what users' programs compile to is what a test is about.

Compiling thousands of small programs is most of what the tests cost, and most of that is the backend's optimiser. So a
test's programs are compiled without it, unless the test or its file is marked `optimised`: those that read compiled
code, count its operations or its bytes, or ask for the same bits whatever the compiler fuses. Processes that a test
starts are compiled as users' are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax._src import compiler  # one place that every program passes; there is no public one

# The second is gone from newer compilers. None of them changes what a program means.
CHEAP = {"xla_backend_optimization_level": "0", "xla_cpu_use_fusion_emitters": "False"}

_options = compiler.get_compile_options
_cheap: dict[str, str] = {}


def use(optimised: bool) -> None:
    """How what is compiled from here on is compiled. Programs compiled in the other way are forgotten."""
    global _cheap
    wanted = {} if optimised else _known()
    if wanted != _cheap:
        jax.clear_caches()
    _cheap = wanted


_found: dict[str, str] | None = None


def _known() -> dict[str, str]:
    """The options that this compiler has."""
    global _found
    if _found is None:
        _found = {name: value for name, value in CHEAP.items() if _takes({name: value})}
        assert _found, "the compiler knows none of them: tests/compiling.py"
    return _found


def _takes(options: dict[str, str]) -> bool:
    try:
        jax.jit(jnp.sin).lower(jnp.float32(0)).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _get_compile_options(*args, env_options_overrides=None, backend=None, **kwargs):
    ours = _cheap if getattr(backend, "platform", None) == "cpu" else {}
    return _options(*args, env_options_overrides=ours | (env_options_overrides or {}), backend=backend, **kwargs)


compiler.get_compile_options = _get_compile_options
