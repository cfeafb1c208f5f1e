"""A strict session: eight fake CPU devices, strict dtype promotion, warnings as errors (pyproject.toml)."""

from __future__ import annotations

import os

# Before JAX is imported: the number of devices is read once.
_FLAG = "--xla_force_host_platform_device_count=8"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import compiling  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")


# The files that take longest, in the order in which workers should begin them: none is left for the end, where the
# others would wait for it; and those compiled as users' programs are stand together.
LONGEST = [
    "test_resume",
    "test_nf4_golden",
    "test_adam8bit",
    "test_blockwise",
    "test_offload",
    "test_costs",
    "test_sharded_step",
    "test_placement",
    "test_quantized",
    "test_bench",
    "test_bench_multi",
    "test_http_process",
    "test_http_refusals",
    "test_rules",
    "test_qlora",
    "test_runs",
    "test_decoder",
    "test_methods",
    "test_parity",
    "test_equations",
    "test_adapt",
]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Before the first fixture of a test: its programs are compiled cheaply, or as users' are."""
    compiling.use(optimised=item.get_closest_marker("optimised") is not None)


@pytest.fixture(scope="session")
def base_model():
    """SmolLM2-135M, loaded once. `make test` has put it into the cache; a test that needs it does not skip."""
    from lorax.models import load

    return load("smollm2-135m")
