"""The closed form: figures that are known, exact counts, and how they move; nothing is compiled."""

import dataclasses
import json
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro

from lorax import cli
from lorax.cli.plan import Args
from lorax.errors import LoraxError
from lorax.models import Model, ModelConfig
from lorax.plan import PRESETS, Job, config_of, estimate, parse_mesh, parse_target
from lorax.plan.advice import advice
from lorax.plan.job import adapted
from lorax.plan.sweep import sweep
from lorax.quantized import Quantized
from lorax.tree import named_leaves

ONE = parse_target("48GB")
ALONE = {"data": 1}

# Parameters of the published models, tied heads once.
PUBLISHED = {
    "llama-3.1-8b": 8030261248,
    "llama-3.1-70b": 70553706496,
    "llama-3.1-405b": 405853388800,
    "llama-3.2-1b": 1235814400,
    "llama-2-7b": 6738415616,
    "llama-65b": 65285660672,
    "mistral-7b": 7248023552,
    "qwen3-0.6b": 596049920,
    "qwen3-8b": 8190735360,
    "smollm2-135m": 134515008,
    "smollm2-1.7b": 1711376384,
}


def job(base="smollm2-135m", method="lora", target=ONE, mesh=None, **options):
    return Job(config_of(base), method, target, mesh or ALONE, **options)


def count(config):
    leaves = jax.tree.leaves(Model.abstract(config).params)
    return sum(int(np.prod(x.shape, dtype=np.int64)) for x in leaves)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name):
    assert count(PRESETS[name]) == PUBLISHED[name]


def test_full_fine_tuning_of_70b_in_16_bit_is_12_bytes_a_parameter():
    found = estimate(job("llama-3.1-70b", "full"))
    whole = found.bytes["base"] + found.bytes["gradients"] + found.bytes["optimizer"]
    assert whole / found.parameters["base"] == pytest.approx(12.0, abs=1e-6)
    assert whole / found.parameters["base"] * 70e9 == pytest.approx(840e9, rel=1e-6)
    assert found.bytes["base"] == 2 * PUBLISHED["llama-3.1-70b"]
    assert found.bytes["base"] == pytest.approx(140e9, rel=0.01)
    assert found.bytes["adapter"] == 0


def test_70b_in_nf4_is_about_35_gb_at_4_127_bits_a_parameter():
    leaves = [x.base for _, x in named_leaves(adapted(job("llama-3.1-70b", "qlora"))) if hasattr(x, "base")]
    packed = [x for x in leaves if isinstance(x, Quantized)]
    size, parameters = sum(x.nbytes for x in packed), sum(int(np.prod(x.shape, dtype=np.int64)) for x in packed)
    assert 8 * size / parameters == pytest.approx(4.127, abs=0.001)
    assert size == pytest.approx(35e9, rel=0.02)


def test_one_weight_of_4096_by_4096_at_rank_16():
    one = ModelConfig("llama", 64, 4096, 64, 1, 32, 32, 128)
    found = estimate(Job(one, "lora", ONE, ALONE, rank=16, targets=("*/q_proj/kernel",)))
    assert found.parameters["trained"] == 131072
    assert round(100 * found.parameters["trained"] / 4096**2, 2) == 0.78


def test_llama_8b_at_rank_1():
    found = estimate(job("llama-3.1-8b", "lora", rank=1, targets=("*/q_proj/kernel", "*/k_proj/kernel")))
    assert found.parameters["trained"] == 32 * (4096 + 4096 + 4096 + 1024)
    assert estimate(job("llama-3.1-8b", "lora", rank=1)).parameters["trained"] == 2621440


def test_qlora_of_65b_fits_into_48_gb():
    found = estimate(job("llama-65b", "qlora", batch=1, seq=512))
    assert 35e9 < found.chip_total < 48e9
    assert estimate(job("llama-65b", "lora", batch=1, seq=512)).chip_total > 130e9


def test_bytes_on_a_chip_are_those_of_its_shards():
    mesh, target = {"data": 2, "model": 4}, parse_target("v5e:2x4")
    tiny = ModelConfig("llama", 512, 1024, 2048, 3, 8, 8, 128)
    for method in ("lora", "qlora", "full", "head"):
        found = estimate(Job(tiny, method, target, mesh, seq=64, batch=4))
        for part in ("adapter", "gradients", "optimizer"):
            whole, chip = found.bytes[part], found.per_chip[part]
            assert whole / 8 <= chip <= whole, (method, part)
            if part == "adapter" and whole:
                # A and B are split on their wide axis alone: in over data or model, never the rank.
                assert whole / 4 <= chip <= whole / 2
        assert found.bytes["base"] / 8 <= found.per_chip["base"] < found.bytes["base"] / 6, method


def test_more_of_anything_costs_more():
    start = job(method="qlora", batch=2, seq=512, target=parse_target("v5e:1x1"))
    first = estimate(start)
    for change in ({"batch": 4}, {"seq": 1024}, {"rank": 64}, {"remat": False}, {"dtype": "float32"}):
        more = estimate(dataclasses.replace(start, **change))
        assert more.chip_total > first.chip_total, change
    assert estimate(dataclasses.replace(start, remat=False)).flops < first.flops
    small = estimate(dataclasses.replace(start, method="full", optimizer="adamw8bit"))
    assert small.bytes["optimizer"] < 0.3 * estimate(dataclasses.replace(start, method="full")).bytes["optimizer"]


def test_lora_computes_two_thirds_of_full_fine_tuning():
    """(2 N^2 + 6 N R) / 3 N^2 of the matrices, without remat and where attention and head are small."""
    wide = ModelConfig("llama", 64, 4096, 4096, 2, 32, 32, 128)
    flops = {
        m: estimate(Job(wide, m, ONE, ALONE, rank=8, seq=16, batch=1, remat=False)).flops for m in ("lora", "full")
    }
    assert flops["lora"] / flops["full"] == pytest.approx((2 * 4096 + 6 * 8) / (3 * 4096), rel=0.01)


def test_variants_are_counted_as_they_are_held():
    """Per matrix of a layer: A and B, what a variant adds beside them, and what of it trains."""
    one = ModelConfig("llama", 64, 128, 96, 3, 2, 2, 64)
    ins_outs = [(128, 128)] * 4 + [(128, 96)] * 2 + [(96, 128)]
    rank, layers = 4, one.num_layers
    factors = layers * sum(rank * (i + o) for i, o in ins_outs)
    outs = layers * sum(o for _, o in ins_outs)
    trained = {
        "lora": factors,
        "dora": factors + outs,
        "lora-fa": layers * sum(rank * o for _, o in ins_outs),
        "vera": outs + layers * rank * len(ins_outs),
    }
    held = dict(trained, **{"lora-fa": factors, "vera": trained["vera"] + factors // layers})
    found = {v: estimate(Job(one, "qlora", ONE, ALONE, rank=rank, variant=v, seq=64, batch=1)) for v in trained}
    for variant, each in found.items():
        assert each.parameters["trained"] == trained[variant], variant
        assert each.bytes["adapter"] == 4 * held[variant], variant
        assert each.bytes["gradients"] == 4 * trained[variant], variant
        # VeRA has no scales, one float32 for each matrix.
        scales = 0 if variant == "vera" else 4 * len(ins_outs)
        assert each.bytes["base"] - scales == found["lora"].bytes["base"] - 4 * len(ins_outs)
    assert found["vera"].flops < found["lora"].flops == found["dora"].flops
    full = estimate(Job(one, "full", ONE, ALONE, seq=64, batch=1))
    assert full.bytes["adapter"] == 0
    assert full.parameters["trained"] == full.parameters["base"]


def test_many_adapters_train_together():
    mesh, target = {"data": 4, "model": 2}, parse_target("v5e:2x4")
    tiny = ModelConfig("llama", 512, 1024, 2048, 3, 8, 8, 128)
    shape = {"rank": 8, "seq": 64, "batch": 8}
    one = estimate(Job(tiny, "lora", target, mesh, **shape))
    many = estimate(Job(tiny, "multi-lora", target, mesh, adapters=6, **shape))
    assert many.parameters["trained"] == 6 * one.parameters["trained"]
    assert many.bytes["base"] == pytest.approx(one.bytes["base"], rel=1e-4)
    # The bank's rows are split over data, so a chip holds a quarter of it at most.
    assert many.per_chip["adapter"] <= many.bytes["adapter"] // 4
    assert many.flops == one.flops
    assert set(many.wire) ^ set(one.wire) == {"bank", "gradients"}
    # What a row of the batch fetches does not grow with the bank.
    more = estimate(Job(tiny, "multi-lora", target, mesh, adapters=600, **shape))
    assert more.wire == many.wire
    with pytest.raises(LoraxError, match="plain low-rank changes"):
        Job(tiny, "multi-lora", target, mesh, variant="dora")


def test_advice_is_checked_and_empty_where_it_fits():
    tight = job("llama-3.1-8b", "full", parse_target("v5e:2x2"), {"data": 4}, seq=512, batch=4)
    found = estimate(tight)
    capacity = tight.target.chip.capacity
    assert found.chip_total > capacity
    said = advice(tight, found.chip_total, capacity)
    assert any("--method lora" in line for line in said)
    assert advice(tight, 1.0, capacity) == []
    (nothing,) = advice(job("llama-3.1-405b", "full", parse_target("v5e:1x1")), 1e13, 1e9)
    assert "smaller base" in nothing


def test_the_sweep_has_a_row_for_each_way():
    rows = sweep(job("smollm2-135m", "lora", batch=2, seq=256), adapters=32)
    names = [row.name for row in rows]
    assert names == ["full", "head", "lora", "qlora", "lora x 32", "qlora x 32", "serve 32, 16 bit", "serve 32, nf4"]
    full, head, lora, qlora, many, packed_many, served, packed = rows
    assert many.trained == 32 * lora.trained == packed_many.trained
    assert many.adapter_file == lora.adapter_file
    assert many.bytes["optimizer"] > 31.9 * lora.bytes["optimizer"]
    assert full.trained > head.trained > lora.trained == qlora.trained
    assert qlora.bytes["base"] < lora.bytes["base"]
    assert lora.adapter_file == 4 * lora.trained
    assert served.bytes["adapter"] == 32 * lora.bytes["adapter"] // 2 == packed.bytes["adapter"]
    c = config_of("smollm2-135m")
    assert served.bytes["activations"] == 2 * c.num_layers * 2 * 256 * c.num_kv_heads * c.head_dim * 2


def test_any_config_json_is_a_base(tmp_path):
    config = PRESETS["qwen3-0.6b"]
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert count(config_of(str(tmp_path))) == count(config) == count(config_of(str(tmp_path / "config.json")))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LoraxError, match="no JSON"):
        config_of(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "chips"),
    [("v5e:4x4", 16), ("v6e:4x8", 32), ("v5p:2x2x4", 16), ("h100:8", 8), ("h100:2x8", 16), ("48GB", 1)],
)
def test_targets(text, chips):
    assert parse_target(text).chips == chips


def test_meshes():
    target = parse_target("v5e:4x4")
    assert parse_mesh("data=2, model=8", target, 4) == {"data": 2, "model": 8}
    assert parse_mesh(None, target, 4) == {"data": 4, "model": 4}
    assert parse_mesh(None, parse_target("48GB"), 4) == {"data": 1, "model": 1}


PLAN = ["plan", "--base", "smollm2-135m"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["plan", "--base", "llama-9"], ["llama-9", "llama-3.1-70b"]),
        (["plan", "--base", "hf:llama"], ["hf:org/name"]),
        ([*PLAN, "--target", "v9:4x4"], ["'v9'", "v5e"]),
        ([*PLAN, "--target", "v5e"], ["v5e:4x4"]),
        ([*PLAN, "--target", "v5e:4x4x4"], ["4x4x4", "topology"]),
        ([*PLAN, "--target", "v5p:4x4"], ["2x2x1"]),
        ([*PLAN, "--target", "v5e:0x4"], ["0x4"]),
        ([*PLAN, "--mesh", "data=4,model=2"], ["8 chips", "16"]),
        ([*PLAN, "--mesh", "rows=16"], ["rows=16", "model"]),
        ([*PLAN, "--mesh", "data=4,data=4"], ["each once"]),
        ([*PLAN, "--mesh", "data"], ["'data'"]),
        ([*PLAN, "--mesh", "data=16", "--batch", "5"], ["16 parts", "5 rows"]),
        ([*PLAN, "--seq", "0"], ["--seq 0"]),
        ([*PLAN, "--rank", "1000"], ["rank 1000"]),
        ([*PLAN, "--targets", "*nothing*"], ["matches no weight"]),
        ([*PLAN, "--target", "48GB", "--compile"], ["48GB", "no chip"]),
    ],
)
def test_mistakes_are_one_line_with_the_way_out(words, parts, capsys):
    assert cli.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("lorax: ")
    assert all(part in line for part in parts), line


def test_a_missing_compiler_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for target in ("v5e:4x4", "h100:8"):
        assert cli.main([*PLAN, "--target", target, "--compile"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "lorax-flax[aot]" in line


def test_json_and_words(capsys):
    words = [*PLAN, "--target", "v5e:2x2", "--batch", "4", "--seq", "512", "--method", "lora"]
    assert cli.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["bytes"]) == {"base", "adapter", "gradients", "optimizer", "activations"}
    assert found["per_chip"]["bytes"] <= found["per_chip"]["capacity"] == parse_target("v5e:1x1").chip.capacity
    assert found["fits"] is True
    assert found["flops"] > 6 * 4 * 512 * 100e6
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "fits" in shown
    assert "all chips" in shown
    assert cli.main([*words, "--sweep", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 8


def test_factors_are_float32_and_nothing_is_made():
    tree = adapted(job("llama-3.1-405b", "qlora", target=parse_target("v5e:16x16")))
    leaves = jax.tree.leaves(tree)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
    assert {x.dtype for x in leaves} >= {jnp.dtype("float32"), jnp.dtype("int32"), jnp.dtype("uint8")}


RESULTS = sorted((Path(__file__).parents[2] / "lorax" / "plan" / "results").glob("*.json"))


def of_result(path):
    """The job of a committed result, and what the compiler said of it."""
    found = json.loads(path.read_text())
    words = shlex.split(found["command"])[2:]
    given = tyro.cli(Args, args=words)
    target = parse_target(given.target)
    names = ("rank", "targets", "variant", "adapters", "seq", "batch", "dtype", "optimizer", "remat")
    options = {name: getattr(given, name) for name in names}
    mesh = parse_mesh(given.mesh, target, given.batch)
    return Job(config_of(given.base), given.method, target, mesh, **options), found["compiled"]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_closed_form_is_near_what_the_compiler_said(path):
    """Compiled results are committed with their command; the arithmetic of today is held against them."""
    one, compiled = of_result(path)
    found = estimate(one)
    held = sum(found.per_chip[part] for part in ("base", "adapter", "optimizer"))
    if compiled["refused"]:
        assert found.chip_total > one.target.chip.capacity
        return
    assert compiled["parts"]["arguments"] == pytest.approx(held, rel=0.05)
    assert found.chip_total == pytest.approx(compiled["bytes"], rel=0.15)


def test_the_results_hold_what_was_asked_for():
    stems = {path.stem for path in RESULTS}
    assert {"llama-3.1-70b-qlora-v5e-16x16", "llama-3.1-70b-qlora-v5e-8x8"} <= stems
    found = json.loads((RESULTS[0].parent / "llama-3.1-70b-qlora-v5e-8x8.json").read_text())["compiled"]
    assert found["bytes"] < 13.3e9
    assert found["kernels"] >= 14
    assert found["collectives"]["all-gather"]["bytes"] > 0


def test_a_mixed_step_of_64_adapters_fits_a_small_slice_and_moves_rows_of_adapters_alone():
    one, compiled = of_result(RESULTS[0].parent / "llama-3.1-8b-multi-lora-v5e-4x4.json")
    assert (one.method, one.adapters, str(one.target)) == ("multi-lora", 64, "v5e:4x4")
    assert not compiled["refused"]
    assert compiled["bytes"] == sum(compiled["parts"].values()) < one.target.chip.capacity
    assert compiled["flops"] > 0
    found = estimate(one)
    # A chip holds a sixteenth of the bank and of its moments.
    assert found.per_chip["adapter"] == found.bytes["adapter"] // 16
    single, alone = of_result(RESULTS[0].parent / "llama-3.1-8b-lora-v5e-4x4.json")
    assert (single.batch, single.seq, single.mesh) == (one.batch, one.seq, one.mesh)
    # Beside what one adapter's step moves: the factors of sixteen rows, not those of sixty-four adapters three times.
    more = compiled["wire"] - alone["wire"]
    assert more == pytest.approx(found.wire["bank"], rel=0.1)
    assert more < 3 * found.bytes["adapter"] / 2
    assert set(compiled["collectives"]) >= {"all-gather", "all-reduce"}
