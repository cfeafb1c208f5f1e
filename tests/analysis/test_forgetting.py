"""Forgetting: losses before and after over the same tokens, and the command that writes them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from lorax import LoraSpec, LoraxError
from lorax.analysis.forgetting import GENERAL, Side, forgetting, sets
from lorax.data import Examples
from lorax.data.general import SHORTEST, general_text, passages
from lorax.models import Model, ModelConfig, with_labels
from lorax.train.dataset import HeldOut


class Bytes:
    """A tokenizer of bytes."""

    def encode(self, text):
        return [byte % 61 for byte in text.encode()]


MODEL = Model.init(ModelConfig("llama", 61, 12, 20, 2, 2, 1, 4), jax.random.key(0))


def test_general_text_is_the_same_everywhere_and_repeats_nothing():
    found = passages()
    assert len(found) == len(set(found)) > 500
    assert min(map(len, found)) >= SHORTEST
    assert found == passages()
    examples = general_text(Bytes(), 5, 40)
    assert [len(example.ids) for example in examples] == [41] * 5
    assert all(len(example.prompt_ids) == 1 for example in examples)


def test_losses_are_means_over_the_tokens_before_and_after():
    examples = general_text(Bytes(), 3, 24)
    tree = lorax.adapt(jax.random.key(0), MODEL.params, LoraSpec(targets="*attn/*kernel", rank=2))
    trainable, frozen = lorax.split(tree)
    tree = lorax.join(jax.tree.map(lambda x: x + 0.2, trainable), frozen)
    over = {
        GENERAL: HeldOut(GENERAL, examples, [], 2, 24),
        "t": HeldOut("t", Examples.of(list(examples)[:1]), [], 2, 24),
    }
    seen = []
    rows = forgetting(Side(MODEL, MODEL.params), Side(MODEL, tree), over, own="t", tick=seen.append)
    assert [(row.name, row.items, row.tokens, row.own) for row in rows] == [(GENERAL, 3, 72, False), ("t", 1, 24, True)]
    assert sum(seen) == 2 * 4
    for params, name in ((MODEL.params, "before"), (lorax.merge(tree), "after")):
        losses = []
        for example in examples:
            logits = MODEL.apply(params, jnp.asarray([example.ids[:-1]]))[0]
            losses += (
                -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.array(example.ids[1:])[:, None], 1)
            ).tolist()
        assert getattr(rows[0], name) == pytest.approx(np.mean(losses), rel=1e-4)
    assert rows[0].change == rows[0].after - rows[0].before != 0
    assert rows[0].accuracy_after is None
    same = forgetting(Side(MODEL, MODEL.params), Side(MODEL, MODEL.params), over)
    assert [row.change for row in same] == [0.0, 0.0]


def test_a_classifier_has_no_loss_on_text():
    other = with_labels(MODEL, ("a", "b"), jax.random.key(0))
    with pytest.raises(LoraxError, match="a classifier writes none"):
        forgetting(Side(MODEL, MODEL.params), Side(other, other.params), {})


def test_a_task_whose_data_is_missing_is_said():
    said = []
    found = sets(Bytes(), ("nonsense",), items=2, seq_len=16, say=said.append)
    assert set(found) == {GENERAL}
    assert said == ["not measured on nonsense: nonsense: no such demo task; there are medical, legal, code"]
