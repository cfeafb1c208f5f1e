"""Variants from the command line: each trains, is saved as PEFT reads it, and is evaluated as the same function."""

import json
from typing import get_args, get_type_hints

import pytest

from lorax import cli
from lorax.train.config import TrainConfig
from lorax.variants.table import INITS, VARIANTS

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


RUNS = {
    # The start moves the base, so what is saved has twice the rank, over the base with the name.
    "dora": (("--variant", "dora", "--init", "pissa", "--dropout", "0.1"), 6),
    # EVA gives some layers more than the rank that was asked for, and at most twice as much.
    "lora-fa": (("--variant", "lora-fa", "--init", "eva", "--lora-plus", "4"), 6),
    "vera": (("--variant", "vera", "--lr", "0.1"), 3),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_variant_trains_and_is_what_was_saved(name, tiny_base, tiny_data, tmp_path, capsys):
    more, most = RUNS[name]
    assert cli.main(words(tiny_base, tiny_data, tmp_path / "run", *more)) == 0
    found = json.loads((tmp_path / "run" / "report.json").read_text())
    assert found["eval"]["after"]["loss"] < found["eval"]["before"]["loss"]
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config.get("use_dora", False) is (name == "dora")
    assert 3 <= max([config["r"], *config["rank_pattern"].values()]) <= most
    capsys.readouterr()
    adapter = str(tmp_path / "run" / "adapter")
    assert cli.main(["eval", "--adapter", adapter, "--data", str(tiny_data[1]), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)["loss"]
    assert again == pytest.approx(found["eval"]["after"]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--method", "full", "--variant", "dora"), "--variant dora: --method full has no low-rank change"),
        (("--method", "head", "--dropout", "0.1"), "--dropout 0.1: --method head has no low-rank change"),
        (("--method", "qlora", "--init", "pissa"), "--init pissa: takes its factors out of the weights"),
        (("--variant", "vera", "--init", "eva"), "--variant vera has its own start"),
        (("--dropout", "1.0"), "dropout is 1.0: must be a probability below 1"),
        (("--lora-plus", "0"), "lora_plus is 0.0: must be above 0"),
        (("--method", "qlora", "--loftq", "1", "--variant", "dora"), "leave --init and --variant out"),
    ],
)
def test_settings_that_nothing_would_heed_are_refused(more, says, tiny_base, tiny_data, tmp_path, capsys):
    assert cli.main(words(tiny_base, tiny_data, tmp_path / "run", *more)) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_command_line_offers_the_rows_of_the_table():
    kinds = get_type_hints(TrainConfig)
    assert set(get_args(kinds["variant"])) == set(VARIANTS)
    assert set(get_args(kinds["init"])) == set(INITS)
    moving = {name for name, row in INITS.items() if row.moves_base}
    assert {name for name in INITS if TrainConfig(init=name).moves_base} == moving
