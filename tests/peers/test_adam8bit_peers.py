"""8-bit moments against the installed bitsandbytes: its CPU library, its portable rule, and its AdamW8bit."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax.optim import adamw8bit, dequantize_blockwise, quantize_blockwise

pytestmark = [pytest.mark.peers, pytest.mark.optimised, pytest.mark.filterwarnings("ignore")]

_spec = importlib.util.spec_from_file_location(
    "make_adam8bit", Path(__file__).parents[1] / "golden" / "make_adam8bit.py"
)
assert _spec is not None
assert _spec.loader is not None
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)

SIGNED = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def drawn(shape, signed):
    """Fresh numbers over seven decades, with a block of zeros and zeros of both signs."""
    random = np.random.default_rng()
    x = (random.standard_normal(shape) * 10.0 ** random.uniform(-7, 1, shape)).astype(np.float32)
    flat = (x if signed else np.abs(x)).reshape(-1)
    flat[1::97] = 0.0
    flat[2::97] = -0.0
    flat[4096:8192] = 0.0
    return flat.reshape(shape)


@SIGNED
@pytest.mark.parametrize("block", [64, 256, 4096])
@pytest.mark.parametrize("shape", [(9001,), (3, 4111), (41, 512), (2, 5, 1537), (97,)])
def test_table_rounding_to_the_bit(shape, block, signed):
    x = drawn(shape, signed)
    codes, absmax, back = make.peer_codes(x, block, signed)
    q = jax.jit(lambda x: quantize_blockwise(x, block, signed, "table"))(jnp.asarray(x))
    np.testing.assert_array_equal(q.codes, codes)
    np.testing.assert_array_equal(np.ravel(q.absmax), absmax)
    np.testing.assert_array_equal(dequantize_blockwise(q, block, signed), back)


def portable_rule(monkeypatch):
    """bitsandbytes' implementation in plain torch, which on a CPU with its library is registered and not reached."""
    import bitsandbytes._ops as ops
    from bitsandbytes.backends import default

    found = {}

    def record(name, platform):
        def keep(function):
            found[name] = function
            return function

        return keep

    monkeypatch.setattr(ops, "register_kernel", record)
    name = "bitsandbytes.backends.default.again"
    spec = importlib.util.spec_from_file_location(name, Path(default.__file__).parent / "ops.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return found["bitsandbytes::quantize_blockwise"]


@SIGNED
@pytest.mark.parametrize(("shape", "block"), [((36, 256), 64), ((41, 512), 256), ((5, 4096), 4096)])
def test_nearest_rounding_to_the_bit(monkeypatch, shape, block, signed):
    import torch
    from bitsandbytes import functional

    x = drawn(shape, signed)
    codes, absmax = portable_rule(monkeypatch)(torch.from_numpy(x.copy()), functional.create_dynamic_map(signed), block)
    q = jax.jit(lambda x: quantize_blockwise(x, block, signed))(jnp.asarray(x))
    np.testing.assert_array_equal(q.codes, codes.numpy())
    np.testing.assert_array_equal(np.ravel(q.absmax), absmax.numpy())


def test_steps_of_adamw8bit():
    random = np.random.default_rng()
    seed = int(random.integers(1 << 30))
    start, gradients = make.start(seed), make.gradients(seed)
    theirs = make.peer_steps(start, gradients)
    tx = adamw8bit(make.LEARNING_RATE, weight_decay=make.DECAY, rounding="table")
    params = jnp.asarray(start)
    state = tx.init(params)
    for g, want in zip(gradients, theirs["trace"], strict=True):
        moved, state = jax.jit(tx.update)(jnp.asarray(g), state, params)
        params = optax.apply_updates(params, moved)
        # A code on the edge between two entries moves a parameter by a share of the learning rate.
        apart = np.abs(np.asarray(params) - want)
        assert np.quantile(apart, 0.999) <= 3e-6, seed
        assert apart.max() <= 0.1 * make.LEARNING_RATE, seed
    for ours, codes in ((state[0].mu, "state1"), (state[0].nu, "state2")):
        assert np.mean(np.asarray(ours.codes) != theirs[codes]) <= 1e-3, seed


def test_golden_is_what_is_installed():
    with np.load(make.PATH) as golden:
        for name, (_, block, signed) in make.CASES.items():
            codes, absmax, _ = make.peer_codes(make.values(name), block, signed)
            np.testing.assert_array_equal(golden[f"{name}/codes"], codes)
            np.testing.assert_array_equal(golden[f"{name}/absmax"], absmax)
        steps = make.peer_steps(make.start(), make.gradients())
        np.testing.assert_allclose(golden["steps/last"], steps["trace"][-1], atol=1e-6)
