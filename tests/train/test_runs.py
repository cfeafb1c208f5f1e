"""`lorax train` and what can be done with its folder, in this process, on the tiny base."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from lorax import cli
from lorax.data import Jsonl, encode
from lorax.models import generate, load
from lorax.train.config import TrainConfig
from lorax.train.runner import run


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LORAX_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def settings(tiny_base, tiny_data):
    train, held_out = tiny_data

    def make(**kwargs):
        usual = {"base": str(tiny_base), "data": str(train), "eval_data": str(held_out), "steps": 4}
        usual |= {"batch_size": 4, "seq_len": 64, "rank": 3, "lr": 3e-3, "save_every": 2}
        return TrainConfig(**(usual | kwargs))

    return make


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """A finished LoRA run's folder."""
    out = tmp_path_factory.mktemp("runs") / "lora"
    run(settings(), out)
    return out


def words(config: TrainConfig, *more) -> list[str]:
    return [
        "train", "--base", config.base, "--data", str(config.data), "--eval-data", str(config.eval_data),
        "--steps", str(config.steps), "--batch-size", "4", "--seq-len", "64", "--rank", "3", "--lr", "3e-3",
        "--save-every", "2", *map(str, more),
    ]  # fmt: skip


def refused(capsys, *arguments) -> str:
    assert cli.main([str(word) for word in arguments]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("lorax: ")
    return errors[-1]


@pytest.mark.parametrize("method", ["full", "head", "last-k"])
def test_whole_weights_are_saved_as_a_model_that_loads(settings, tmp_path, method, tiny_base):
    report = run(settings(method=method, last_k=1), tmp_path / "run")
    assert report["adapter"]["path"].endswith("model")
    trained, base = load(tmp_path / "run" / "model"), load(tiny_base)
    assert trained.config.tie_embeddings == (method != "head")
    ids = jnp.asarray([[5, 77, 9, 130]])
    assert not np.allclose(trained.apply(trained.params, ids), base.apply(base.params, ids), atol=1e-6)
    assert report["eval"]["after"]["loss"] < report["eval"]["before"]["loss"]


def test_exact_match_is_what_greedy_decoding_writes(settings, tmp_path, tiny_data):
    report = run(settings(method="full", steps=80, lr=1e-2, save_every=80), tmp_path / "run")
    model = load(tmp_path / "run" / "model")
    records = list(Jsonl(tiny_data[1]))
    examples = [encode(record, model.tokenizer) for record in records]
    longest = max(len(example.completion_ids) for example in examples)
    written = generate(model, model.params, [list(example.prompt_ids) for example in examples], longest)
    exact = 0
    for ids, example in zip(written, examples, strict=True):
        want = [i for i in example.completion_ids if i != model.tokenizer.eos_id]
        exact += [i for i in ids if i != model.tokenizer.eos_id] == want
    assert exact > 0
    np.testing.assert_allclose(report["eval"]["after"]["accuracy"], exact / len(examples))


def test_a_rate_too_small_for_float32_is_an_error_after_saving(settings, tmp_path, capsys):
    out = tmp_path / "run"
    assert "never moved" in refused(capsys, *words(settings(), "--out", out, "--lr", "1e-46"))
    receipts = json.loads((out / "report.json").read_text())["coverage"]
    assert receipts
    assert not any(receipt["moved"] for receipt in receipts)
    assert (out / "adapter" / "adapter_model.safetensors").exists()


def test_a_base_without_tokenizer_is_refused(settings, tiny_base, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_base, bare)
    (bare / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused(capsys, *words(settings(base=str(bare)), "--out", tmp_path / "run"))
    assert "tokenizer.json" in refused(capsys, "generate", "--base", bare, "--prompt", "x")


def test_a_file_in_the_place_of_the_folder_is_refused(settings, tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    assert "run" in refused(capsys, *words(settings(), "--out", tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "mine"


def test_packing_and_remat_train_too(settings, tmp_path):
    report = run(settings(pack=True, remat=True, batch_size=2), tmp_path / "run")
    assert report["train"]["completion_tokens"] > 4 * 2 * 3  # more than one example to a row
    assert report["train"]["loss"]["last"] < report["train"]["loss"]["first"]


def test_epochs_decide_the_steps(settings, tmp_path):
    report = run(settings(steps=None, epochs=0.5), tmp_path / "run")
    assert report["train"]["steps"] == 5  # half of 41 examples, four to a step
    assert report["run"]["steps"] == 5


def test_a_run_is_not_overwritten(finished, settings, capsys):
    assert "--resume" in refused(capsys, *words(settings(), "--out", finished))


@pytest.mark.parametrize(
    ("more", "names"), [(["--lr", "1e-2"], "lr="), (["--seed", "1"], "seed="), (["--targets", "*q_proj*"], "targets=")]
)
def test_resuming_with_other_settings_names_the_field(finished, capsys, more, names):
    assert names in refused(capsys, "train", "--resume", "--out", finished, *more)


def test_resuming_needs_no_other_words(finished, capsys):
    assert cli.main(["train", "--resume", "--out", str(finished), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((finished / "report.json").read_text())


def test_resuming_on_other_data_is_refused(settings, tmp_path, capsys, tiny_data):
    data = tmp_path / "data.jsonl"
    data.write_text(tiny_data[0].read_text())
    config = settings(data=str(data))
    out = tmp_path / "run"
    run(config, out)
    (out / "report.json").unlink()
    data.write_text(data.read_text().replace('"completion": "', '"completion": "x', 1))
    assert "the data is not what the run began with" in refused(capsys, *words(config, "--out", out, "--resume"))


def test_a_loss_that_is_no_number_names_step_and_checkpoint(settings, tmp_path, capsys):
    out = tmp_path / "run"
    error = refused(capsys, *words(settings(), "--out", out, "--lr", "1e30"))
    assert "step 2" in error or "step 3" in error
    assert "checkpoints/0000000" in error
    assert "--lr" in error
    assert not (out / "report.json").exists()
    assert all(row["loss"] < 1e30 for row in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()))


def test_malformed_data_names_file_and_line_and_leaves_nothing(settings, tmp_path, capsys):
    data = tmp_path / "broken.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n')
    error = refused(capsys, *words(settings(data=str(data)), "--out", tmp_path / "run"))
    assert "broken.jsonl:2" in error
    assert not (tmp_path / "run").exists()
    data.write_text("")
    assert "no examples" in refused(capsys, *words(settings(data=str(data)), "--out", tmp_path / "run"))


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--targets", "layers/attn/w_proj/*"], "w_proj"),
        (["--rank", "1000"], "rank 1000"),
        (["--warmup", "9"], "warmup"),
    ],
)
def test_what_cannot_be_trained_leaves_nothing(settings, tmp_path, capsys, more, says):
    assert says in refused(capsys, *words(settings(), "--out", tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


def test_a_folder_with_other_things_in_it_is_left_alone(settings, tiny_base, tmp_path, capsys):
    before = sorted(path.name for path in tiny_base.iterdir())
    assert "holds no run" in refused(capsys, *words(settings(), "--out", tiny_base))
    assert sorted(path.name for path in tiny_base.iterdir()) == before
    (tmp_path / "file").write_text("x")
    assert "holds no run" in refused(capsys, *words(settings(), "--out", tmp_path / "file"))


@pytest.mark.parametrize(("name", "value"), [("steps", "x"), ("lr", True), ("targets", "q"), ("method", "magic")])
def test_a_record_with_settings_of_another_kind_is_named(finished, tmp_path, capsys, name, value):
    record = json.loads((finished / "run.json").read_text())
    record["config"][name] = value
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert f"its setting {name} is" in refused(capsys, "train", "--resume", "--out", tmp_path)


def test_more_tokens_than_the_model_reads_are_refused(finished, capsys):
    line = refused(capsys, "generate", "--adapter", finished, "--prompt", "abc", "--max-tokens", "100000000000")
    assert "more than the 512 tokens" in line


def test_the_other_commands_read_the_run(finished, settings, tiny_data, tmp_path, capsys):
    report = json.loads((finished / "report.json").read_text())

    def ask(*arguments):
        assert cli.main([str(word) for word in arguments] + ["--json"]) == 0
        return json.loads(capsys.readouterr().out)

    found = ask("eval", "--adapter", finished, "--data", tiny_data[1], "--seq-len", "64")
    np.testing.assert_allclose(found["loss"], report["eval"]["after"]["loss"], rtol=1e-5)
    assert found["items"] == 13

    written = ask("generate", "--adapter", finished, "--prompt", "abc", "--max-tokens", "5")
    assert len(written["ids"]) <= 5

    merged = ask("merge", "--adapter", finished, "--out", tmp_path / "merged")
    assert merged["bytes"] > 0
    alone = ask("eval", "--base", tmp_path / "merged", "--data", tiny_data[1], "--seq-len", "64")
    np.testing.assert_allclose(alone["loss"], found["loss"], rtol=1e-5)

    about = ask("inspect", finished)
    assert about["report"]["trainable"] == report["adapter"]["parameters"]
    base = ask("inspect", report["run"]["config"]["base"])
    assert base["parameters"] == about["parameters"]
    assert base["report"]["trainable"] == 0


def test_people_get_tables(finished, capsys):
    assert cli.main(["inspect", str(finished)]) == 0
    shown = capsys.readouterr().out
    assert "q_proj" in shown
    assert "embed/embedding" in shown
