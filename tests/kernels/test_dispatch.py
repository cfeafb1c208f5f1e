"""Which implementation serves a case: what the table says, what can be forced, and what a broken install says once."""

from __future__ import annotations

import warnings

import jax.numpy as jnp
import numpy as np
import pytest

from lorax_kernels import Shapes, dispatch, explain, force, nf4, nf4_matmul, target

CASE = Shapes(m=2048, k=4096, n=4096, dtype="bfloat16", rank=16)


def test_every_row_is_chosen_or_says_why_not():
    for op in ("nf4_matmul", "nf4_matmul_t", "nf4_dequantise"):
        for platform, chip in (("cpu", ""), ("tpu", "v5e"), ("tpu", "v6e"), ("cuda", "sm_90")):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)
                choice = explain(op, CASE, platform, chip)
            names = {backend.name for backend in dispatch.backends(op)}
            assert {choice.chosen, *choice.refused} == names
            assert choice.chosen not in choice.refused
            assert all(choice.refused.values())
            assert choice.chosen in str(choice)


def test_a_cpu_takes_plain_jax_and_a_tpu_takes_pallas():
    assert explain("nf4_matmul", CASE, "cpu").chosen == "xla"
    assert explain("nf4_matmul", CASE, "tpu", "v5e").chosen == "pallas"
    with target("tpu", "v6e"):
        choice = explain("nf4_matmul", CASE)
    assert (choice.platform, choice.chip, choice.chosen) == ("tpu", "v6e", "pallas")


def test_one_is_forced_for_one_operation_or_for_all(monkeypatch):
    with force("xla"):
        assert explain("nf4_matmul", CASE, "tpu", "v5e").chosen == "xla"
        assert explain("nf4_matmul", CASE, "tpu", "v5e").refused["pallas"] == "xla is forced"
    with force("xla", "nf4_matmul_t"):
        assert explain("nf4_matmul", CASE, "tpu", "v5e").chosen == "pallas"
        assert explain("nf4_matmul_t", CASE, "tpu", "v5e").chosen == "xla"
    monkeypatch.setenv("LORAX_KERNELS", "nf4_matmul=xla")
    assert explain("nf4_matmul", CASE, "tpu", "v5e").chosen == "xla"
    assert explain("nf4_matmul_t", CASE, "tpu", "v5e").chosen == "pallas"
    monkeypatch.setenv("LORAX_KERNELS", "xla")
    assert explain("nf4_matmul_t", CASE, "tpu", "v5e").chosen == "xla"


def test_what_is_forced_and_cannot_serve_is_an_error(monkeypatch):
    with force("pallas"), pytest.raises(ValueError, match=r"pallas is forced and cannot serve .*is for tpu"):
        explain("nf4_matmul", CASE, "cpu")
    q = nf4.quantize(jnp.ones((64, 128)))
    with force("pallas"), pytest.raises(ValueError, match="pallas is forced"):
        nf4_matmul.matmul(jnp.ones((3, 128)), q)
    with pytest.raises(ValueError, match=r"'cuda' is no backend; choose one of .*xla"), force("cuda"):
        pass
    monkeypatch.setenv("LORAX_KERNELS", "fast")
    with pytest.raises(ValueError, match="'fast' is no backend"):
        explain("nf4_matmul", CASE, "cpu")
    monkeypatch.setenv("LORAX_KERNELS", "nf4_matmull=xla")
    with pytest.raises(ValueError, match="'nf4_matmull' is no operation"):
        explain("nf4_matmul", CASE, "cpu")
    with pytest.raises(ValueError, match="'mul' is no operation"), force("xla", "mul"):
        pass


def test_an_unknown_operation_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'matmul' is no operation.*nf4_matmul"):
        explain("matmul", CASE, "cpu")


def test_a_broken_install_is_said_once(monkeypatch):
    broken = dispatch.Backend("broken", ("cpu",), ("nf4_matmul",), lambda *_: None, lambda: "libsomething is missing")
    monkeypatch.setattr(dispatch, "_TABLE", [broken, *dispatch._TABLE])
    monkeypatch.setattr(dispatch, "_TOLD", set())
    with pytest.warns(RuntimeWarning, match="the broken kernels are not used: libsomething is missing") as said:
        choices = [explain("nf4_matmul", CASE, "cpu") for _ in range(3)]
    assert len(said) == 1
    assert [choice.chosen for choice in choices] == ["xla"] * 3
    assert choices[2].refused["broken"] == "libsomething is missing"


def test_the_operation_itself_is_the_dequantised_product():
    rng = np.random.default_rng(0)
    q = nf4.quantize(jnp.asarray(rng.normal(size=(96, 128)), jnp.float32))
    x = jnp.asarray(rng.normal(size=(5, 128)), jnp.float32)
    want = np.asarray(x, np.float64) @ np.asarray(nf4.dequantize(q), np.float64).T
    np.testing.assert_allclose(nf4_matmul.matmul(x, q), want, rtol=0, atol=1e-5 * np.abs(want).max())
