"""Heads over features computed once, labels and numbers; what the backward pass leaves out; weights by pattern."""

from __future__ import annotations

import itertools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import LoraxError, cli
from lorax.data import Example, Examples, Jsonl, TrainStream, encode
from lorax.models import Model, ModelConfig, load, with_labels
from lorax.plan.hlo import _computations, _reached
from lorax.train import TrainConfig, adapted, init_state, language_model_loss, make_optimizer, make_step, run
from lorax.train import features as feature_files
from lorax.train.features import FeatureStream, cached
from lorax.train.methods import head_trains, only_head
from lorax.train.regression import squared_error


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


LABELS = ("few", "many", "none")


def written(path, count, seed, number=False):
    """Words whose label depends on how many letters are "a"."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        word = "".join(rng.choice(list("abcd"), size=rng.integers(3, 9)))
        n = word.count("a")
        label = n / 4 if number else LABELS[2] if n == 0 else LABELS[0] if n < 3 else LABELS[1]
        rows.append({"prompt": word, "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    return {
        "classes": (written(folder / "c.jsonl", 60, 0), written(folder / "ch.jsonl", 21, 1)),
        "numbers": (written(folder / "n.jsonl", 60, 0, True), written(folder / "nh.jsonl", 21, 1, True)),
    }


@pytest.fixture(scope="module")
def settings(tiny_base, data):
    def make(kind, **kwargs):
        train, held_out = data[kind]
        usual = {"base": str(tiny_base), "data": train, "eval_data": held_out, "steps": 40, "batch_size": 6}
        usual |= {"seq_len": 64, "rank": 3, "lr": 0.03, "save_every": 40, "method": "head"}
        return TrainConfig(**(usual | kwargs))

    return make


def test_a_head_over_cached_features_trains_as_over_the_trunk(tiny_base, tiny_data, tmp_path, monkeypatch):
    config = TrainConfig(
        base=str(tiny_base), data=str(tiny_data[0]), eval_data=str(tiny_data[1]), steps=6, batch_size=4, seq_len=64,
        method="head", lr=3e-3, accumulate=2,
    )  # fmt: skip
    report = run(config, tmp_path / "cached")
    with monkeypatch.context() as patch:
        patch.setattr("lorax.train.methods.only_head", lambda _: False)
        plain = run(config, tmp_path / "plain")
    one, two = (load(tmp_path / name / "model").params["lm_head"]["kernel"] for name in ("cached", "plain"))
    start = load(tiny_base).params["embed"]["embedding"].T
    assert np.abs(two - start).max() > 5e-3
    np.testing.assert_allclose(one, two, atol=2e-5)
    for when in ("before", "after"):
        assert report["eval"][when]["loss"] == pytest.approx(plain["eval"][when]["loss"], rel=1e-4)
        assert report["eval"][when]["items"] == plain["eval"][when]["items"] == 13
        assert report["eval"][when]["tokens"] == plain["eval"][when]["tokens"]
    # Another rate over the same base and data computes no features.
    monkeypatch.setattr(feature_files, "_compute", lambda *_: pytest.fail("computed again"))
    assert run(TrainConfig(**{**vars(config), "lr": 1e-3}), tmp_path / "again")["train"]["steps"] == 6


def test_features_are_those_of_the_counted_positions(tmp_path):
    model = Model.init(ModelConfig("llama", 31, 12, 20, 2, 2, 1, 4), jax.random.key(0))
    examples = Examples.of(
        [Example((3, 4, 5), (6, 7)), Example((8,), (9, 1, 2), (1.0, 0.0, 0.5)), Example((2,) * 9, (4,))]
    )
    sizes = {"batch_size": 2, "seq_len": 16}
    found = cached(model, {"train": examples}, {"base": "x"}, tmp_path, **sizes)["train"]
    assert found.values.shape == (2 + 2 + 1, 12)
    ids = jnp.asarray([examples[1].ids[:-1]])
    want = model.hidden(model.params, ids)[0]
    np.testing.assert_allclose(found.values[2:4], want[jnp.array([0, 2])], atol=1e-5)
    batch = found.batch([[1], [2, 0], []], 4)
    np.testing.assert_array_equal(batch["targets"], [[9, 2, 0, 0], [4, 6, 7, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(batch["weights"], [[1, 0.5, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(batch["features"][1, 1:3], found.values[:2])
    assert not batch["features"][2].any()
    packed = FeatureStream(TrainStream(examples, 1, 16, pack=True), found)
    assert next(packed)["features"].shape == (1, 16, 12)
    for i in range(feature_files.KEPT + 3):
        cached(model, {"train": examples}, {"base": str(i)}, tmp_path, **sizes)
    assert len(list(tmp_path.iterdir())) == feature_files.KEPT


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def head_problem(outputs):
    rng = np.random.default_rng(5)
    model = Model.init(ModelConfig("llama", 31, 12, 20, 2, 2, 1, 4), jax.random.key(0))
    model = with_labels(model, [f"l{i}" for i in range(outputs)], jax.random.key(1), regression=outputs == 1)
    params = lorax.adapt(jax.random.key(0), model.params, lorax.LoraSpec(targets=(), train_also="score/*"))
    x = rng.normal(size=(5, 2, 12))
    weights = np.array([[1, 0], [1, 1], [0.5, 0], [0, 0], [1, 1]])
    return model, lorax.split(params), x, weights, np.asarray(model.params["score"]["kernel"], np.float64)


def test_labels_against_logistic_regression_in_float64():
    model, (trainable, frozen), x, weights, kernel = head_problem(3)
    targets = np.random.default_rng(6).integers(0, 3, (5, 2))
    batch = {"features": jnp.asarray(x, jnp.float32), "targets": jnp.asarray(targets, jnp.int32)}
    batch["weights"] = jnp.asarray(weights, jnp.float32)
    loss = language_model_loss(model, head_trains=True)
    (value, count), grad = jax.value_and_grad(loss, has_aux=True)(trainable, frozen, batch, jax.random.key(0))
    p = softmax(x @ kernel)
    hot = np.eye(3)[targets]
    assert float(count) == weights.sum()
    assert float(value) == pytest.approx(-(np.log((p * hot).sum(-1)) * weights).sum(), rel=1e-5)
    want = np.einsum("btd,btk->dk", x * weights[..., None], p - hot)
    np.testing.assert_allclose(grad["score"]["kernel"].value, want, atol=1e-5)


def test_numbers_against_least_squares_in_float64():
    model, (trainable, frozen), x, weights, kernel = head_problem(1)
    numbers = np.random.default_rng(6).normal(size=(5, 2)).astype(np.float32)
    batch = {"features": jnp.asarray(x, jnp.float32), "targets": jnp.asarray(numbers.view(np.int32))}
    batch["weights"] = jnp.asarray(weights, jnp.float32)
    value_of = lambda t: squared_error(model)(t, frozen, batch, jax.random.key(0))  # noqa: E731
    (value, count), grad = jax.value_and_grad(value_of, has_aux=True)(trainable)
    off = (x @ kernel)[..., 0] - numbers
    assert float(count) == weights.sum()
    assert float(value) == pytest.approx((weights * off**2).sum(), rel=1e-5)
    want = 2 * np.einsum("btd,bt->d", x, weights * off)
    np.testing.assert_allclose(grad["score"]["kernel"].value[:, 0], want, atol=1e-5)


@pytest.fixture(scope="module")
def classified(settings, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "classes"
    return out, run(settings("classes", head="classification"), out)


def ask(capsys, *words):
    assert cli.main([str(word) for word in words] + ["--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *words):
    assert cli.main([str(word) for word in words]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_new_head_learns_labels_and_is_an_existing_one_afterwards(classified, settings, data, tmp_path, capsys):
    out, report = classified
    found = report["eval"]
    assert found["before"]["loss"] == pytest.approx(math.log(3), rel=0.3)
    assert found["after"]["loss"] < 0.9 * found["before"]["loss"]
    assert found["after"]["items"] == found["after"]["tokens"] == 21
    assert 0 < found["majority"]["accuracy"] < 1
    assert report["adapter"]["parameters"] == 16 * 3
    model = load(out / "model")
    assert model.config.labels == LABELS
    again = ask(capsys, "eval", "--adapter", out, "--data", data["classes"][1], "--seq-len", 64)
    assert again["loss"] == pytest.approx(found["after"]["loss"], rel=1e-4)
    assert again["accuracy"] == found["after"]["accuracy"]
    more = run(settings("classes", base=str(out / "model"), head="classification", steps=2), tmp_path / "more")
    assert more["eval"]["before"]["loss"] == pytest.approx(found["after"]["loss"], rel=1e-4)


def test_the_last_token_of_the_prompt_is_what_is_read(classified, data):
    """Each held-out text, by itself: the score of the most likely label is at its last token."""
    out, report = classified
    model = load(out / "model")
    hits = 0
    records = list(Jsonl(data["classes"][1]))
    for record in records:
        ids = encode(record, model.tokenizer).prompt_ids
        scores = model.apply(model.params, jnp.asarray([ids]))[0, -1]
        hits += LABELS[int(jnp.argmax(scores))] == record.completion
    assert hits / len(records) == pytest.approx(report["eval"]["after"]["accuracy"])


def test_numbers_are_predicted_better_than_by_their_mean(settings, data, tmp_path, capsys):
    report = run(settings("numbers", head="regression", method="full", lr=3e-3, steps=150), tmp_path / "run")
    found = report["eval"]
    assert found["after"]["accuracy"] is None
    assert found["after"]["loss"] < 0.9 * found["majority"]["loss"]
    train, held_out = (np.array([float(r.completion) for r in Jsonl(path)]) for path in data["numbers"])
    assert found["majority"]["loss"] == pytest.approx(float(np.mean((held_out - train.mean()) ** 2)), rel=1e-4)
    assert cli.main(["eval", "--adapter", str(tmp_path / "run"), "--data", data["numbers"][1]]) == 0
    assert "mean squared error" in capsys.readouterr().out


def test_factors_train_beside_a_head_over_labels(settings, data, tmp_path, capsys):
    config = settings("classes", head="classification", method="lora", lr=0.01)
    found = run(config, tmp_path / "run")["eval"]
    assert found["after"]["loss"] < found["before"]["loss"]
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (adapter["task_type"], adapter["modules_to_save"]) == ("SEQ_CLS", ["score"])
    words = ("--data", data["classes"][1], "--seq-len", 64)
    again = ask(capsys, "eval", "--adapter", tmp_path / "run", *words)
    assert again["loss"] == pytest.approx(found["after"]["loss"], rel=1e-4)
    ask(capsys, "merge", "--adapter", tmp_path / "run", "--out", tmp_path / "merged")
    alone = ask(capsys, "eval", "--base", tmp_path / "merged", *words)
    assert alone["loss"] == pytest.approx(found["after"]["loss"], rel=1e-3)
    assert "is a classifier" in refused(capsys, "generate", "--adapter", tmp_path / "run", "--prompt", "x")


def test_heads_that_do_not_fit_are_refused(classified, settings, data, tmp_path, capsys):
    out, _ = classified
    with pytest.raises(LoraxError, match="its head is for classification; train it with --head classification"):
        run(settings("classes", base=str(out / "model")), tmp_path / "run")
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "a", "label": "zebra"}\n' * 4)
    with pytest.raises(LoraxError, match=r"other.jsonl:1: 'zebra' is none of the head's 3 labels \(few, many, none"):
        run(settings("classes", base=str(out / "model"), head="classification", data=str(other)), tmp_path / "run")
    with pytest.raises(LoraxError, match="two labels at least"):
        run(settings("classes", head="classification", data=str(other), eval_data=str(other)), tmp_path / "run")
    with pytest.raises(LoraxError, match="no finite number"):
        run(settings("classes", head="regression"), tmp_path / "run")
    with pytest.raises(LoraxError, match="are no closed list of labels"):
        run(settings("numbers", head="classification", data=str(_many(tmp_path))), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def _many(folder):
    path = folder / "many.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a", "label": f"{i}"}) + "\n" for i in range(30)))
    return path


def test_weights_by_pattern_from_the_command_line(tiny_base, tiny_data, tmp_path, capsys):
    words = [
        "train",
        "--base",
        tiny_base,
        "--data",
        tiny_data[0],
        "--eval-data",
        tiny_data[1],
        "--out",
        tmp_path / "run",
    ]
    words += ["--steps", 3, "--batch-size", 4, "--seq-len", 64, "--rank", 3, "--alpha", 6, "--lr", "3e-3"]
    words += ["--train-also", "*norm/scale", "embed/*", "--rank-pattern", "*/v_proj/*=1", "*/mlp/*=5"]
    found = ask(capsys, *words, "--alpha-pattern", "*/q_proj/*=9")
    moved = {row["target"] for row in found["coverage"] if row["moved"]}
    assert {"embed/embedding/value", "norm/scale/value", "layers/attn_norm/scale/value"} <= moved
    rows = {row["path"]: row for row in ask(capsys, "inspect", tmp_path / "run")["report"]["weights"]}
    assert rows["layers/attn/v_proj/kernel"]["rank"] == 1
    assert rows["layers/mlp/up_proj/kernel"]["rank"] == 5
    assert rows["layers/attn/q_proj/kernel"]["rank"] == 3
    assert rows["layers/attn/q_proj/kernel"]["scale"] == 3.0
    assert rows["layers/attn/o_proj/kernel"]["scale"] == 2.0
    assert rows["embed/embedding"]["kind"] == "full"
    again = ask(capsys, "eval", "--adapter", tmp_path / "run", "--data", tiny_data[1], "--seq-len", 64)
    assert again["loss"] == pytest.approx(found["eval"]["after"]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--rank-pattern", "*/q_proj/*=0"), "--rank-pattern */q_proj/*=0: must be GLOB=VALUE"),
        (("--alpha-pattern", "nonsense"), "--alpha-pattern nonsense: must be GLOB=VALUE"),
        (("--method", "full", "--train-also", "*/bias"), "everything trains already"),
        (("--method", "head", "--rank-pattern", "*=2"), "--method head has no low-rank change"),
        (("--train-also", "*/norm/*", "--dtype", "bfloat16"), "--train-also trains weights of that dtype"),
        (("--train-also", "*/nonsense"), "*/nonsense"),
    ],
)
def test_patterns_that_cannot_be_are_refused(tiny_base, tiny_data, tmp_path, capsys, more, says):
    words = ("train", "--base", tiny_base, "--data", tiny_data[0], "--out", tmp_path / "run", "--seq-len", 64)
    assert says in refused(capsys, *words, *more)
    assert not (tmp_path / "run").exists()


SMALL = ModelConfig("llama", 64, 32, 48, num_layers=5, num_heads=2, num_kv_heads=1, head_dim=16, tie_embeddings=True)
_DOT = re.compile(
    r"%?([\w.\-]+) = \w+\[([\d,]*)\]\S* dot\(%?([\w.\-]+), %?[\w.\-]+\).*lhs_contracting_dims=\{([\d,]*)\}"
)
_DEFINED = re.compile(r"%?([\w.\-]+) = \w+\[([\d,]*)\]")


def product_flops(text):
    """Operations of the matrix products in a compiled program, loops counted as often as they turn."""
    bodies, entry = _computations(text)
    total = 0
    for name, times in _reached(bodies, entry).items():
        sizes = {m[1]: [int(n) for n in m[2].split(",") if n] for m in map(_DEFINED.search, bodies[name]) if m}
        for dot in filter(None, map(_DOT.search, bodies[name])):
            inner = math.prod(sizes[dot[3]][int(axis)] for axis in dot[4].split(","))
            total += times * 2 * math.prod(int(n) for n in dot[2].split(",") if n) * inner
    return total


def step_flops(method, **kwargs):
    model = Model.init(SMALL, jax.random.key(0))
    config = TrainConfig(task="medical", method=method, **kwargs)
    model, params = adapted(model, config)
    trainable, frozen = lorax.split(params)
    tx, _ = make_optimizer(config, 3)
    step = make_step(language_model_loss(model, head_trains=head_trains(trainable, model.config)), tx)
    ids = jnp.ones((1, 4, 32), jnp.int32)
    batch = {"ids": ids, "targets": ids, "positions": ids, "segment_ids": ids, "weights": jnp.ones((1, 4, 32))}
    if method == "head" and only_head(trainable):
        batch = {name: batch[name] for name in ("targets", "weights")} | {"features": jnp.ones((1, 4, 32, 32))}
    return product_flops(step.lower(init_state(trainable, tx, 0), frozen, batch).compile().as_text())


@pytest.mark.optimised
def test_what_lies_below_the_first_trained_block_has_no_backward_pass():
    tokens, block, head = 4 * 32, 32 * (32 + 16 + 16 + 32 + 3 * 48), 32 * 64
    forward = 2 * tokens * (5 * block + head)
    attention = 5 * 4 * (2 * 2 * 32 * 32 * 16 * 2)
    two, four = (step_flops("last-k", last_k=k) for k in (2, 4))
    per_block = (four - two) / 2
    # Without any trained block: every layer forward, the head there and back, and nothing else.
    assert two - 2 * per_block == pytest.approx(forward + attention + 2 * tokens * head, rel=0.02)
    # A block's backward pass: both gradients of its products, and what it computes again.
    assert 4 * tokens * block < per_block < 6 * tokens * block
    # A head over features: its own three products, whatever the depth.
    assert step_flops("head") == 2 * 2 * tokens * head


def test_only_the_head_is_the_head_alone():
    model = Model.init(SMALL, jax.random.key(0))
    for config, alone in (
        (TrainConfig(task="medical", method="head"), True),
        (TrainConfig(task="medical", method="head", train_also=("norm/scale",)), False),
        (TrainConfig(task="medical", method="full"), False),
        (TrainConfig(task="medical", method="last-k", train_also=("norm/scale",)), False),
    ):
        _, params = adapted(model, config)
        assert only_head(lorax.split(params)[0]) is alone
    merged = lorax.merge(params)
    assert all(
        itertools.starmap(np.array_equal, zip(jax.tree.leaves(merged), jax.tree.leaves(model.params), strict=True))
    )
