"""`lorax plan --compile`: a small step over a pod's mesh, through the command line and the real compilers."""

import json

import pytest

from lorax import cli
from lorax.models import ModelConfig

pytestmark = [pytest.mark.aot, pytest.mark.filterwarnings("ignore")]

# No weight has the shape of another, of the head, or of activations.
TINY = ModelConfig("llama", 2560, 1024, 3072, 3, 8, 8, 128)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    (folder / "config.json").write_text(json.dumps(TINY.to_hf()))
    return str(folder)


def plan(capsys, *words):
    code = cli.main(["plan", "--json", "--compile", *words])
    out, err = capsys.readouterr()
    return code, (json.loads(out) if code == 0 else err)


def test_a_qlora_step_on_a_slice(base, capsys, tmp_path):
    hlo = tmp_path / "step.hlo"
    words = ("--base", base, "--target", "v5e:2x2", "--mesh", "data=2,model=2", "--batch", "4", "--seq", "256")
    code, found = plan(capsys, *words, "--hlo", str(hlo))
    assert code == 0, found
    real = found["compiled"]
    assert not real["refused"]
    assert found["fits"]
    assert found["per_chip"]["bytes"] == real["bytes"] == sum(real["parts"].values())
    # Arguments are the shards that the closed form counts; gradients and activations are temporaries.
    held = sum(found["per_chip"][part] for part in ("base", "adapter", "optimizer"))
    assert real["parts"]["arguments"] == pytest.approx(held, rel=0.05)
    # Seven products a layer, forward and backward, are Pallas kernels on every chip of the mesh.
    assert real["kernels"] >= 14
    assert real["collectives"]["all-gather"]["bytes"] > 0
    text = hlo.read_text()
    d, f = TINY.hidden_size, TINY.intermediate_size
    whole = [f"bf16[{a},{b}]" for a, b in ((d, f), (f, d), (d, f // 2), (f // 2, d))]
    gathered = [line for line in text.splitlines() if " all-gather(" in line]
    assert any(f"s32[{d // 8},{f // 2}]" in line or f"s32[1,{d // 8},{f // 2}]" in line for line in gathered)
    assert not any(shape in line.split("all-gather(")[0] for line in gathered for shape in whole), "W as values"


def test_a_mixed_step_over_a_bank(base, capsys, tmp_path):
    """Ten adapters of rank 8 train together; the bank's rows are split over `data` and no device sees all of them."""
    hlo = tmp_path / "mixed.hlo"
    words = ("--base", base, "--method", "multi-lora", "--adapters", "10", "--rank", "8", "--target", "v5e:2x2")
    shape = ("--mesh", "data=2,model=2", "--batch", "4", "--seq", "256")
    code, found = plan(capsys, *words, *shape, "--hlo", str(hlo))
    assert code == 0, found
    real = found["compiled"]
    assert not real["refused"]
    held = sum(found["per_chip"][part] for part in ("base", "adapter", "optimizer"))
    assert real["parts"]["arguments"] == pytest.approx(held, rel=0.05)
    gathered = [line.split("all-gather(")[0] for line in hlo.read_text().splitlines() if " all-gather(" in line]
    rows = 10 * 8
    whole = [f"[{rows},{n}]" for n in (TINY.hidden_size, TINY.intermediate_size, TINY.intermediate_size // 2, 512)]
    assert not any(shape in line for line in gathered for shape in whole), "the bank is gathered"


def test_a_lora_step_on_eight_gpus(base, capsys):
    words = ("--base", base, "--method", "lora", "--target", "h100:8", "--mesh", "data=4,model=2", "--seq", "64")
    code, found = plan(capsys, *words, "--batch", "8")
    assert code == 0, found
    assert found["compiled"]["bytes"] > 0
    assert found["compiled"]["collectives"]


def test_a_refusal_is_an_answer(capsys):
    """Full fine-tuning of 1B on one v5e: the compiler's own figure, and what would fit."""
    words = ("--base", "llama-3.2-1b", "--method", "full", "--target", "v5e:1x1", "--batch", "16", "--seq", "4096")
    code, found = plan(capsys, *words)
    assert code == 0, found
    assert found["compiled"]["refused"]
    assert not found["fits"]
    assert found["per_chip"]["bytes"] > found["per_chip"]["capacity"] > 15e9
    assert found["advice"]


def test_a_topology_that_no_compiler_knows_is_one_line(base, capsys):
    code, said = plan(capsys, "--base", base, "--target", "v5e:3x5", "--batch", "15")
    assert code == 2
    assert said.count("\n") == 1
    assert "v5e:3x5" in said
