"""QLoRA from the command line: train, resume, evaluate, merge three ways, and mistakes in one line."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from lorax import LoraxError, Quantized, QuantSpec, cli, lift, load_adapter, requantize
from lorax.models import load
from lorax.tree import named_leaves
from lorax.weights import LowRank

STEPS = 4


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def words(base, data, out, *more):
    train, held_out = data
    given = ("--base", base, "--data", train, "--eval-data", held_out, "--out", out, "--steps", STEPS)
    return [str(w) for w in ("train", *given, "--rank", 3, "--batch-size", 4, "--seq-len", 64, "--json", *more)]


WITHOUT_DOUBLE = ("--no-double-quant", "--quant-block", "32")
RUNS = {
    "nf4": ("--method", "qlora", "--loftq", "1"),
    "fp4": ("--method", "qlora", "--quant", "fp4", *WITHOUT_DOUBLE, "--optimizer", "adamw8bit"),
    "int8": ("--method", "qlora", "--quant", "int8", "--dtype", "bfloat16"),
    "loftq": ("--method", "qlora", "--loftq", "2"),
    "zero": ("--method", "qlora", "--paged"),
    "lora": ("--method", "lora"),
}


class Runs:
    """Folders of runs by name, `runs / "nf4"`; each is made when it is first asked for."""

    def __init__(self, folder, base, data):
        self.folder, self.base, self.data = folder, base, data

    def __truediv__(self, name):
        out = self.folder / name
        if not out.exists():
            assert cli.main(words(self.base, self.data, out, *RUNS[name])) == 0
        return out


@pytest.fixture(scope="module")
def trained(tiny_base, tiny_data, tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("qlora"), tiny_base, tiny_data)


def report(run):
    return json.loads((run / "report.json").read_text())


def said(capsys, *command):
    capsys.readouterr()
    code = cli.main([str(word) for word in command])
    out = capsys.readouterr()
    return code, json.loads(out.out) if code == 0 else out.err


def loss(capsys, data, **where):
    options = [word for name, value in where.items() for word in (f"--{name}", value)]
    code, found = said(capsys, "eval", *options, "--data", data[1], "--json")
    assert code == 0
    return found["loss"]


@pytest.mark.parametrize(("name", "bits"), [("nf4", (4.1, 4.5)), ("fp4", (5.0, 5.01)), ("int8", (8.5, 10.5))])
def test_the_base_weighs_what_its_format_says(trained, name, bits):
    base = report(trained / name)["base"]
    assert bits[0] <= base["bits_per_quantised_parameter"] <= bits[1]
    assert base["quantised_parameters"] == 3 * (16 * 16 * 2 + 16 * 8 * 2 + 16 * 24 * 3)
    assert base["bytes"] < report(trained / "lora")["base"]["bytes"]


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8", "loftq", "zero"])
def test_it_learns_and_is_evaluated_over_the_same_base(trained, tiny_data, capsys, name):
    found = report(trained / name)
    assert found["eval"]["after"]["loss"] < found["eval"]["before"]["loss"]
    again = loss(capsys, tiny_data, adapter=trained / name)
    assert again == pytest.approx(found["eval"]["after"]["loss"], rel=1e-6)


def test_a_resumed_run_ends_in_the_same_bits(trained, tiny_base, tiny_data, tmp_path, monkeypatch):
    from lorax.train import runner

    real = runner._Run._after

    def stopped(self, state, row):
        real(self, state, row)
        if row.step == 2:
            raise KeyboardInterrupt

    command = words(tiny_base, tiny_data, tmp_path / "run", *RUNS["nf4"], "--save-every", "1")
    monkeypatch.setattr(runner._Run, "_after", stopped)
    assert cli.main(command) == 130
    monkeypatch.undo()
    assert cli.main([*command, "--resume"]) == 0
    mine, whole = (
        (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        for folder in (tmp_path / "run", trained / "nf4")
    )
    assert mine == whole


def test_merged_into_what_training_saw_it_computes_the_same(trained, tiny_data, tmp_path, capsys):
    code, found = said(
        capsys, "merge", "--adapter", trained / "nf4", "--out", tmp_path / "m", "--into", "dequantized", "--json"
    )
    assert code == 0
    assert found["into"] == "dequantized"
    assert loss(capsys, tiny_data, base=tmp_path / "m") == pytest.approx(
        loss(capsys, tiny_data, adapter=trained / "nf4"), rel=1e-5
    )
    assert not any(isinstance(leaf, Quantized) for _, leaf in named_leaves(load(tmp_path / "m").params))


def test_merged_and_quantised_again_it_says_what_that_costs(trained, tiny_base, tmp_path, capsys):
    code, found = said(
        capsys, "merge", "--adapter", trained / "nf4", "--out", tmp_path / "m", "--into", "requantized", "--json"
    )
    assert code == 0
    cost = found["requantized"]
    assert cost["worst_loss"] == max(cost["losses"].values()) >= cost["mean_loss"] > 0
    assert len(cost["losses"]) == 7
    # What it says, computed from the files alone; and the file holds the weights that were said.
    params = load_adapter(trained / "nf4" / "adapter", load(tiny_base, quantize=QuantSpec()).params)
    merged = load(tmp_path / "m")
    for (path, old), (_, new) in zip(named_leaves(params), named_leaves(merged.params), strict=True):
        assert isinstance(new, Quantized) == isinstance(old, LowRank)
        if isinstance(new, Quantized):
            wide = [np.asarray(x, np.float64) for x in (old.base.dense(), old.dense(), new.dense())]
            off = np.linalg.norm(wide[2] - wide[1]) / np.linalg.norm(wide[1] - wide[0])
            assert cost["losses"][path] == pytest.approx(off, rel=1e-3)
    ids = jnp.array([[3, 9, 5, 0, 11]])
    want = lift(merged.apply)(requantize(params)[0], ids)
    np.testing.assert_array_equal(lift(merged.apply)(merged.params, ids), want)


def test_the_start_is_nearer_to_the_original_than_factors_of_zero(trained):
    before = {name: report(trained / name)["eval"]["before"]["loss"] for name in ("lora", "zero", "nf4")}
    assert before["zero"] != before["lora"]
    assert before["nf4"] not in (before["zero"], before["lora"])
    settings = {name: json.loads((trained / name / "run.json").read_text())["config"]["loftq"] for name in before}
    assert settings == {"lora": 0, "zero": 0, "nf4": 1}
    config = {name: json.loads((trained / name / "adapter" / "adapter_config.json").read_text()) for name in before}
    assert config["nf4"]["loftq_config"] == {"loftq_bits": 4, "loftq_iter": 1}
    assert config["nf4"]["init_lora_weights"] is True
    assert not (trained / "nf4" / "base").exists()
    assert "loftq_config" not in config["zero"]


def test_a_fitted_adapter_loads_over_its_own_kind_of_base_alone(trained, tiny_base, tiny_data, tmp_path, capsys):
    adapter = trained / "nf4" / "adapter"
    plain = load(tiny_base)
    with pytest.raises(LoraxError, match=r"was quantised as nf4/64/double.* and is float32 here; quantise the base"):
        load_adapter(adapter, plain.params)
    with pytest.raises(LoraxError, match=r"was quantised as nf4/64/double.* and is nf4/64 here"):
        load_adapter(adapter, load(tiny_base, quantize=QuantSpec(double_quant=False)).params)
    load_adapter(adapter, load(tiny_base, quantize=QuantSpec()).params)
    # Without its run the folder itself says how its base is quantised.
    alone = tmp_path / "alone"
    shutil.copytree(adapter, alone)
    after = report(trained / "nf4")["eval"]["after"]["loss"]
    assert loss(capsys, tiny_data, adapter=alone) == pytest.approx(after, rel=1e-6)
    # The other one fits its own base, which plain quantising does not give.
    with pytest.raises(LoraxError, match="is for another base"):
        load_adapter(trained / "loftq" / "adapter", load(tiny_base, quantize=QuantSpec()).params)


def test_loftq_with_more_turns_keeps_its_own_base(trained, tiny_base, capsys):
    run = trained / "loftq"
    assert (run / "base" / "config.json").is_file()
    code, error = said(capsys, "eval", "--adapter", run, "--base", tiny_base, "--data", "x")
    assert code == 2
    assert "leave --base out" in error


@pytest.mark.parametrize("name", ["nf4", "loftq", "zero"])
def test_merged_into_the_original_it_is_the_original_and_what_training_changed(
    trained, tiny_base, tmp_path, capsys, name
):
    assert said(capsys, "merge", "--adapter", trained / name, "--out", tmp_path / "m", "--json")[0] == 0
    merged, base = (dict(named_leaves(load(path).params)) for path in (tmp_path / "m", tiny_base))
    at = "layers/mlp/up_proj/kernel"
    own = load(trained / name / "base") if name == "loftq" else load(tiny_base, quantize=QuantSpec())
    leaf = dict(named_leaves(load_adapter(trained / name / "adapter", own.params)))[at]
    wide = lambda x: np.asarray(x, np.float64)  # noqa: E731
    want = wide(base[at]) + float(leaf.scale) * wide(leaf.A) @ wide(leaf.B)
    if name != "zero":
        # Where LoftQ started: the best correction of what quantising lost, by numpy.
        u, values, v = np.linalg.svd(wide(base[at]) - wide(leaf.base.dense()))
        want -= u[:, :, :3] * values[:, None, :3] @ v[:, :3]
    np.testing.assert_allclose(merged[at], want, rtol=0, atol=2e-5)
    assert np.abs(want - wide(base[at])).max() > 1e-3


def test_an_own_base_without_its_run_has_no_original(trained, tmp_path, capsys):
    shutil.copytree(trained / "loftq" / "adapter", tmp_path / "alone")
    code, error = said(capsys, "merge", "--adapter", tmp_path / "alone", "--out", tmp_path / "m")
    assert code == 2
    assert "--into dequantized or requantized" in error


@pytest.mark.parametrize(
    ("name", "into", "says"),
    [
        ("lora", "dequantized", "base that is not quantised"),
        ("lora", "requantized", "base that is not quantised"),
        ("int8", "requantized", "hold nf4 and fp4, not int8"),
    ],
)
def test_merges_that_make_no_sense_are_one_line(trained, tmp_path, capsys, name, into, says):
    code, error = said(capsys, "merge", "--adapter", trained / name, "--out", tmp_path / "m", "--into", into)
    assert code == 2
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "m").exists()


def test_a_base_file_in_4_bits_trains_and_has_no_other_original(trained, tiny_data, tmp_path, capsys):
    packed = tmp_path / "packed"
    said(capsys, "merge", "--adapter", trained / "nf4", "--out", packed, "--into", "requantized", "--json")
    code, error = said(capsys, *words(packed, tiny_data, tmp_path / "fit", "--method", "qlora", "--loftq", "1"))
    assert code == 2
    assert "holds its weights in 4 bits" in error
    assert cli.main(words(packed, tiny_data, tmp_path / "zero", "--method", "qlora", "--steps", "1")) == 0
    assert json.loads((tmp_path / "zero/run.json").read_text())["config"]["loftq"] == 0
    assert cli.main(words(packed, tiny_data, tmp_path / "run", "--method", "lora")) == 0
    code, error = said(capsys, "merge", "--adapter", tmp_path / "run", "--out", tmp_path / "m")
    assert code == 2
    assert "a file in 4 bits" in error
    for method in ("full", "last-k"):
        code, error = said(capsys, *words(packed, tiny_data, tmp_path / method, "--method", method))
        assert code == 2
        assert "cannot train as a whole" in error


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--method", "lora", "--loftq", "2"), "--loftq 2"),
        (("--method", "qlora", "--loftq", "1", "--quant", "int8"), "use --quant nf4 or fp4"),
        (("--method", "full", "--dtype", "bfloat16"), "--dtype bfloat16"),
    ],
)
def test_settings_that_contradict_each_other(tiny_base, tiny_data, tmp_path, capsys, more, says):
    code, error = said(capsys, *words(tiny_base, tiny_data, tmp_path / "run", *more))
    assert code == 2
    assert says in error


def test_inspect_counts_parameters(trained, capsys):
    code, found = said(capsys, "inspect", trained / "nf4", "--json")
    assert code == 0
    rows = {row["path"]: row for row in found["weights"]}
    assert rows["layers/mlp/up_proj/kernel"]["dtype"] == "nf4"
    assert rows["layers/mlp/up_proj/kernel"]["parameters"] == 3 * 16 * 24
