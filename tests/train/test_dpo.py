"""DPO against its formula in float64, over pairs of answers from files; the reference is the base that is there."""

from __future__ import annotations

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import LoraSpec, LoraxError, cli
from lorax.data import Examples, TrainStream, eval_batches
from lorax.data.demos.task import DemoTask
from lorax.data.examples import Example, Record
from lorax.data.preferences import Preference, encode_pairs, of_task, preferences
from lorax.models import load
from lorax.train import TrainConfig, run
from lorax.train.loss import log_probs
from lorax.train.preference import make_pair_scorer, preference_loss, reference

V, D = 11, 6
rng = np.random.default_rng(0)
BASE = {name: rng.normal(size=s) for name, s in (("embed", (V, D)), ("mix", (D, D)), ("head", (D, V)))}


class Toy:
    """A causal model in four lines: each position reads the mean of the embeddings so far."""

    def hidden(self, params, ids, positions, segment_ids):
        x = jnp.take(params["embed"], ids, axis=0)
        mean = jnp.cumsum(x, axis=1) / jnp.arange(1, ids.shape[1] + 1, dtype=x.dtype)[:, None]
        return jnp.tanh(mean @ params["mix"])

    def head(self, params, rows):
        return rows @ params["head"]


def float64(params, batch, beta):
    """The paper's loss, position by position in NumPy; `params` are dense, before and after."""

    def answers(p):
        out = []
        for ids, targets, weights in zip(batch["ids"], batch["targets"], batch["weights"], strict=True):
            x = p["embed"][ids]
            h = np.tanh(np.cumsum(x, 0) / np.arange(1, len(ids) + 1)[:, None] @ p["mix"])
            logits = h @ p["head"]
            logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            out.append(sum(w * logp[t, y] for t, (y, w) in enumerate(zip(targets, weights, strict=True))))
        return np.array(out)

    now, before = answers(params), answers(BASE)
    total = 0.0
    for i in range(0, len(now), 2):
        if batch["weights"][i].any() and batch["weights"][i + 1].any():
            margin = beta * ((now[i] - before[i]) - (now[i + 1] - before[i + 1]))
            total += -math.log(1 / (1 + math.exp(-margin)))
    return total


def problem():
    examples = [Example((1, 2), (3, 4, 5)), Example((1, 2), (6,)), Example((7,), (8, 9)), Example((7,), (1, 0, 3, 10))]
    (batch,) = eval_batches(examples, batch_size=3, seq_len=16, group=2)
    assert batch["index"].tolist() == [0, 1, 2, 3, -1, -1] or batch["index"].tolist() == [2, 3, 0, 1, -1, -1]
    base = {name: jnp.asarray(value, jnp.float32) for name, value in BASE.items()}
    tree = lorax.adapt(jax.random.key(0), base, LoraSpec(targets=("mix", "head"), rank=2, alpha=3.0))
    trainable, frozen = lorax.split(tree)
    return batch, (jax.tree.map(lambda x: x + 0.3, trainable), frozen)


def dense(trainable, base=BASE):
    out = dict(base)
    for name in ("mix", "head"):
        leaf = trainable[name]
        out[name] = base[name] + 1.5 * np.asarray(leaf.A, np.float64) @ np.asarray(leaf.B, np.float64)
    return out


def test_loss_and_gradient_are_those_of_the_paper():
    batch, (trainable, frozen) = problem()
    loss = preference_loss(Toy(), beta=0.7, chunk=4)
    (value, pairs), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable, frozen, batch, jax.random.key(0))
    assert float(pairs) == 2
    assert float(value) == pytest.approx(float64(dense(trainable), batch, 0.7), rel=1e-5)
    # Central differences of the float64 formula, entry by entry.
    flat, treedef = jax.tree.flatten(trainable)
    got = jax.tree.leaves(grads)
    for k, leaf in enumerate(flat):
        for at in np.ndindex(leaf.shape):
            sides = []
            for step in (1e-5, -1e-5):
                moved = [np.array(x, np.float64) for x in flat]
                moved[k][at] += step
                sides.append(float64(dense(jax.tree.unflatten(treedef, moved)), batch, 0.7))
            assert got[k][at] == pytest.approx((sides[0] - sides[1]) / 2e-5, abs=2e-4)


def test_without_a_change_the_loss_is_log_2_and_dropout_leaves_the_reference_alone():
    batch, _ = problem()
    base = {name: jnp.asarray(value, jnp.float32) for name, value in BASE.items()}
    for dropout in (0.0, 0.5):
        tree = lorax.adapt(jax.random.key(0), base, LoraSpec(targets="mix", rank=2, dropout=dropout))
        total, pairs = preference_loss(Toy(), beta=3.0)(*lorax.split(tree), batch, jax.random.key(1))
        assert float(total / pairs) == pytest.approx(math.log(2), abs=1e-6)
    trainable, frozen = lorax.split(tree)
    moved = jax.tree.map(lambda x: x + 0.3, trainable)
    loss = preference_loss(Toy(), beta=3.0)
    two = [float(loss(moved, frozen, batch, jax.random.key(i))[0]) for i in (1, 2)]
    assert two[0] != two[1]
    assert float(loss(moved, frozen, batch, jax.random.key(1))[0]) == two[0]


def test_the_scorer_counts_pairs_whose_better_answer_gained():
    batch, (trainable, frozen) = problem()
    params = lorax.join(trainable, frozen)
    losses, misses, count = map(np.asarray, make_pair_scorer(Toy(), 0.7)(params, batch))
    assert count.tolist() == [1, 1, 0]
    assert losses.sum() == pytest.approx(float64(dense(trainable), batch, 0.7), rel=1e-5)
    assert [bool(m) for m in misses[:2]] == [bool(x >= math.log(2)) for x in losses[:2]]


def test_the_reference_is_the_base_itself():
    base = {name: jnp.asarray(value, jnp.float32) for name, value in BASE.items()}
    tree = lorax.adapt(jax.random.key(0), base, LoraSpec(targets=("mix",), rank=2, variant="dora"))
    assert all(reference(tree)[name] is base[name] for name in base)
    with pytest.raises(LoraxError, match="head: trains as a whole, so there is no reference"):
        reference(lorax.adapt(jax.random.key(0), base, LoraSpec(targets="mix", rank=1, train_also="head")))


@pytest.mark.optimised
def test_there_is_no_second_copy_of_the_base():
    """Beside the batch, the step is given the base once, and makes no temporary of the trunk's size."""

    class Deep(Toy):
        def hidden(self, params, ids, positions, segment_ids):
            x = jnp.take(params["embed"], ids, axis=0)
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["mix"])[0]

    big = {"embed": jnp.ones((V, 512)), "mix": jnp.ones((8, 512, 512)), "head": jnp.ones((512, V))}
    tree = lorax.adapt(jax.random.key(0), big, LoraSpec(targets="mix", rank=2))
    trainable, frozen = lorax.split(tree)
    batch, _ = problem()
    grad = jax.jit(jax.grad(lambda t, f, b: preference_loss(Deep())(t, f, b, jax.random.key(0))[0]))
    memory = grad.lower(trainable, frozen, batch).compile().memory_analysis()
    held = sum(x.nbytes for x in jax.tree.leaves((trainable, frozen, batch)))
    assert memory.argument_size_in_bytes <= 1.01 * held + 256
    assert memory.temp_size_in_bytes < big["mix"].nbytes


def test_log_probs_are_those_of_the_whole_softmax():
    h, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((3, 5, D), (D, V)))
    targets = jnp.asarray(rng.integers(0, V, (3, 5)), jnp.int32)
    weights = jnp.asarray(rng.random((3, 5)) < 0.5, jnp.float32) * 0.5
    whole = jnp.take_along_axis(jax.nn.log_softmax(h @ w), targets[..., None], -1)[..., 0] * weights
    scale = jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)
    for chunk in (4, 128):
        chunked = lambda h, w, chunk=chunk: log_probs(lambda x: x @ w, h, targets, weights, chunk=chunk)  # noqa: E731
        np.testing.assert_allclose(chunked(h, w), whole, atol=1e-5)
        got = jax.grad(lambda h, w: jnp.sum(chunked(h, w) * scale), (0, 1))(h, w)  # noqa: B023
        want = jax.grad(
            lambda h, w: jnp.sum(
                jnp.take_along_axis(jax.nn.log_softmax(h @ w), targets[..., None], -1)[..., 0] * weights * scale
            ),
            (0, 1),
        )(h, w)
        for one, two in zip(got, want, strict=True):
            np.testing.assert_allclose(one, two, atol=1e-5)


USER, YES, NO = ({"role": "user", "content": "q"}, *({"role": "assistant", "content": c} for c in "yn"))


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "q", "chosen": "y", "rejected": "n"}, "q"),
        ({"prompt": [USER], "chosen": "y", "rejected": "n"}, (USER,)),
        ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, (USER,)),
        ({"prompt": "q", "chosen": [YES], "rejected": [NO]}, (USER,)),
        ({"chosen": [USER, YES], "rejected": [USER, NO], "score": 3}, (USER,)),
    ],
)
def test_forms_of_a_pair(row, prompt, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(row))
    assert preferences(file) == [Preference(prompt, "y", "n", f"{file}:1")]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "q", "chosen": "y"}, 'has no "rejected"'),
        ({"chosen": "y", "rejected": "n"}, 'has no "prompt"'),
        ({"prompt": "q", "chosen": "y", "rejected": "y"}, "nothing to prefer"),
        ({"prompt": "q", "chosen": "y", "rejected": " "}, '"rejected" is empty'),
        ({"chosen": [USER, YES], "rejected": [YES, NO]}, "must follow the same turns"),
        ({"chosen": [USER, YES], "rejected": "n"}, '"rejected" must be a list of turns'),
        ({"chosen": [USER, USER], "rejected": [USER, NO]}, 'by "user"'),
        ([1], "a list where an object belongs"),
    ],
)
def test_what_is_no_pair_is_an_error_with_its_line(row, says, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n" + json.dumps(row))
    with pytest.raises(LoraxError, match=f"pairs.jsonl:2: .*{says}"):
        preferences(file)


def test_groups_stay_together_in_the_stream():
    examples = Examples.of([Example((i,), (i,) * (1 + i % 5)) for i in range(14)])
    stream = TrainStream(examples, 3, 8, seed=1, group=2)
    assert stream.batches_per_epoch == 7 / 3
    place, seen = stream.state(), []
    for _ in range(7):
        ids = next(stream)["ids"]
        assert ids.shape == (6, 8)
        assert (ids[1::2, 0] == ids[::2, 0] + 1).all()
        seen += ids[::2, 0].tolist()
    assert sorted(seen) == sorted([*range(0, 14, 2)] * 3)
    stream.restore(place)
    assert next(stream)["ids"][::2, 0].tolist() == seen[:3]
    with pytest.raises(LoraxError, match="not packed"):
        TrainStream(examples, 3, 8, pack=True, group=2)


def test_a_demo_task_gets_a_wrong_answer_beside_the_right_one(tiny_base):
    task = DemoTask("t", [Record(f"p{i}", "ab"[i % 2], "x") for i in range(6)], [], ["a", "b", "c"], "")
    pairs = of_task(task, task.train)
    assert all(pair.rejected in set("abc") - {pair.chosen} for pair in pairs)
    assert pairs == of_task(task, task.train)
    examples, kept = encode_pairs(pairs, load(tiny_base).tokenizer, seq_len=64)
    assert (len(examples), kept) == (12, pairs)
    assert examples[0].prompt_ids == examples[1].prompt_ids
    said = []
    assert (
        len(
            encode_pairs(
                [*pairs, Preference("p" * 99, "a", "b")], load(tiny_base).tokenizer, seq_len=64, say=said.append
            )[1]
        )
        == 6
    )
    assert said == ["dropped 1 of 7 pairs of which an answer is longer than seq_len=64"]
    with pytest.raises(LoraxError, match="no closed list"):
        of_task(DemoTask("code", [], [], None, ""), [])


@pytest.fixture
def pairs_file(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAX_CACHE", str(tmp_path / "cache"))
    draw = np.random.default_rng(0)
    rows = []
    for _ in range(40):
        word = "".join(draw.choice(list("abcd"), size=draw.integers(3, 9)))
        rows.append({"prompt": word, "chosen": word[0] * 2, "rejected": "z" + word[:2]})
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_a_run_learns_to_prefer_and_resumes(tiny_base, pairs_file, tmp_path, capsys):
    words = ["train", "--loss", "dpo", "--base", tiny_base, "--data", pairs_file, "--out", tmp_path / "run"]
    words += ["--steps", 12, "--batch-size", 4, "--seq-len", 64, "--rank", 3, "--lr", "1e-2", "--beta", "0.5"]
    words = [str(word) for word in words]
    assert cli.main([*words, "--save-every", "6"]) == 0
    shown = capsys.readouterr().out
    assert "preferred" in shown
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    found = report["eval"]
    assert found["before"]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert found["before"]["accuracy"] == 0
    assert found["after"]["loss"] < 0.8 * math.log(2)
    assert found["after"]["accuracy"] == 1
    assert found["after"]["items"] == found["after"]["tokens"] == found["before"]["items"]
    assert found["majority"] == {"label": "either", "accuracy": 0.5, "loss": math.log(2)}
    # The adapter is one like any other.
    model = load(tiny_base)
    params = lorax.load_adapter(tmp_path / "run" / "adapter", model.params)
    record = preferences(pairs_file)[0].records()[0]
    assert record.completion
    assert float(jnp.abs(params["layers"]["attn"]["q_proj"]["kernel"].B).max()) > 0


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"method": "full"}, "--method full leaves no base"),
        ({"train_also": ("norm/scale",)}, "--train-also leaves no base"),
        ({"init": "pissa"}, "--init pissa takes its factors out of the base"),
        ({"method": "qlora", "loftq": 1}, "--loftq 1 starts somewhere else"),
        ({"pack": True}, "--pack puts answers together"),
        ({"head": "classification"}, "--head classification writes no answers"),
        ({"loss": "sft", "beta": 0.2}, "--beta 0.2: is DPO's"),
        ({"beta": 0.0}, "beta is 0.0: must be above 0"),
    ],
)
def test_settings_that_leave_no_reference_are_refused(more, says, tiny_base, pairs_file, tmp_path):
    with pytest.raises(LoraxError, match=says):
        run(TrainConfig(**{"base": str(tiny_base), "data": str(pairs_file), "loss": "dpo", **more}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
