"""A strict session: eight fake CPU devices, strict dtype promotion, warnings as errors (pyproject.toml)."""

from __future__ import annotations

import os

# Before JAX is imported: the number of devices is read once.
_FLAG = "--xla_force_host_platform_device_count=8"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="session")
def base_model():
    """SmolLM2-135M, loaded once. `make test` has put it into the cache; a test that needs it does not skip."""
    from lorax.models import load

    return load("smollm2-135m")
