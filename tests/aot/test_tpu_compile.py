"""Cases compiled by libtpu for v5e and v6e, a few for v5p, and a whole training step: no TPU is needed.

A large program takes the compiler half a minute, so each chip gets every fourth case here.
`python -m lorax_kernels.static.tpu` compiles them all.
"""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from step_support import CONFIG, compiled

from lorax_kernels.cases import CASES, DECODE_ROWS, RANK, TRAIN_ROWS
from lorax_kernels.nf4_matmul import layout_tpu, pallas_tpu
from lorax_kernels.static.tpu import moved

pytestmark = [pytest.mark.aot, pytest.mark.filterwarnings("ignore")]

SOME = [(chip, case) for place, chip in enumerate(("v5e", "v6e")) for case in CASES[2 * place :: 4]]
PODS = {"v5e": "v5e:2x2", "v6e": "v6e:2x2", "v5p": "v5p:2x2x1"}


def device(chip):
    return topologies.get_topology_desc(platform="tpu", topology_name=PODS[chip]).devices[0]


def lowered(chip, m, k, n, dequantise=True):
    """Forward and backward with the low-rank term, and dequantise, as one program."""
    put = SingleDeviceSharding(device(chip))
    shape = lambda dtype, *s: jax.ShapeDtypeStruct(s, dtype, sharding=put)  # noqa: E731
    kp, np_ = layout_tpu.padded(k, n)
    half = jnp.bfloat16

    def run(x, dy, words, scales, a, b):
        out = [pallas_tpu.matmul(x, words, scales, n=n, lora=(a, b, 2.0), chip=chip)]
        out.append(pallas_tpu.matmul_t(dy, words, scales, k=k, lora=(a, b, 2.0), chip=chip))
        if dequantise:
            out.append(pallas_tpu.dequantize(words, scales, k, n, half, chip=chip))
        return out

    args = (shape(half, m, k), shape(half, m, n), shape(jnp.int32, kp // 8, np_), shape(jnp.float32, kp // 512, 8, np_))
    return jax.jit(run).lower(*args, shape(half, k, RANK), shape(half, RANK, n))


@pytest.mark.parametrize(("chip", "case"), SOME, ids=lambda x: x if isinstance(x, str) else f"{x.k}x{x.n}")
def test_training_shapes_compile(case, chip):
    text = lowered(chip, TRAIN_ROWS, case.k, case.n).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 3


@pytest.mark.parametrize("chip", ["v5e", "v6e", "v5p"])
@pytest.mark.parametrize(("k", "n"), [(4096, 4096), (14336, 4096), (576, 192), (192, 70), (64, 1)])
def test_decode_shapes_compile(k, n, chip):
    text = lowered(chip, DECODE_ROWS, k, n, dequantise=False).compile().as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_the_whole_training_step(chip):
    text = compiled(device(chip), "tpu", chip)
    # Seven products a layer, forward and backward.
    assert text.count('custom_call_target="tpu_custom_call"') >= 14
    d, f = CONFIG.hidden_size, CONFIG.intermediate_size
    assert not re.search(rf"(f32|bf16)\[({d},{f}|{f},{d})\]", text), "W was built"


@pytest.mark.parametrize("rows", [DECODE_ROWS, TRAIN_ROWS])
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_bytes_moved_with_the_low_rank_term_are_near_the_least(chip, transposed, rows):
    """Counted from the index maps, against whole tiles, which is how a TPU keeps arrays. The scales of a single block
    come with those of seven more."""
    for case in CASES:
        _, over_tiles = moved(chip, rows, case.k, case.n, transposed, RANK)
        assert over_tiles <= (1.2 if case.k == 64 else 1.1), (case, over_tiles)
