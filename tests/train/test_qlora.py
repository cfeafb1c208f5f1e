"""QLoRA from the command line: train, resume, evaluate, merge three ways, and mistakes in one line."""

import json

import numpy as np
import pytest

from lorax import Quantized, cli
from lorax.models import load
from lorax.tree import named_leaves

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


@pytest.fixture(scope="module")
def trained(tiny_base, tiny_data, tmp_path_factory):
    """Runs by name."""
    folder = tmp_path_factory.mktemp("qlora")
    runs = {
        "nf4": ("--method", "qlora"),
        "fp4": (
            "--method",
            "qlora",
            "--quant",
            "fp4",
            "--no-double-quant",
            "--quant-block",
            "32",
            "--optimizer",
            "adamw8bit",
        ),
        "int8": ("--method", "qlora", "--quant", "int8", "--dtype", "bfloat16"),
        "loftq": ("--method", "qlora", "--loftq", "2"),
        "lora": ("--method", "lora"),
    }
    for name, more in runs.items():
        assert cli.main(words(tiny_base, tiny_data, folder / name, *more)) == 0
    return folder


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


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8", "loftq"])
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

    command = words(tiny_base, tiny_data, tmp_path / "run", "--method", "qlora", "--save-every", "1")
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


def test_merged_into_the_original_it_has_the_original_behind_it(trained, tiny_base, tmp_path, capsys):
    assert said(capsys, "merge", "--adapter", trained / "nf4", "--out", tmp_path / "m", "--json")[0] == 0
    merged, base = (dict(named_leaves(load(path).params)) for path in (tmp_path / "m", tiny_base))
    change = np.asarray(merged["layers/mlp/up_proj/kernel"]) - np.asarray(base["layers/mlp/up_proj/kernel"])
    assert np.linalg.matrix_rank(change[0], tol=1e-4) == 3, "the change, and no error of quantisation"


def test_merged_and_quantised_again_it_says_what_that_costs(trained, tmp_path, capsys):
    code, found = said(
        capsys, "merge", "--adapter", trained / "nf4", "--out", tmp_path / "m", "--into", "requantized", "--json"
    )
    assert code == 0
    cost = found["requantized"]
    assert cost["worst_loss"] == max(cost["losses"].values()) >= cost["mean_loss"] > 0
    assert len(cost["losses"]) == 7
    assert sum(isinstance(leaf, Quantized) for _, leaf in named_leaves(load(tmp_path / "m").params)) == 7


def test_loftq_keeps_its_own_base(trained, tiny_base, tmp_path, capsys):
    run = trained / "loftq"
    assert (run / "base" / "config.json").is_file()
    code, error = said(capsys, "merge", "--adapter", run, "--out", tmp_path / "m")
    assert code == 2
    assert "--into dequantized or requantized" in error
    code, error = said(capsys, "eval", "--adapter", run, "--base", tiny_base, "--data", "x")
    assert code == 2
    assert "leave --base out" in error
    assert said(capsys, "merge", "--adapter", run, "--out", tmp_path / "m", "--into", "dequantized", "--json")[0] == 0


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
