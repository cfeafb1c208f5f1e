import hashlib
import importlib.util
import itertools
import math
import random
import subprocess
import sys
from collections import Counter

import pytest

from lorax.data import Record, demo, encode, majority
from lorax.data.demos import TASKS, docstrings, legal, medical
from lorax.data.demos.split import clusters, digest, fair_order, held_out, normalise, repeats
from lorax.errors import LoraxError

NAMES = sorted(TASKS)


@pytest.fixture(scope="module")
def tasks():
    return {name: demo(name) for name in NAMES}


def question(record):
    return record.prompt[-1]["content"]


def runs(text, size=4):
    words = normalise(text).split()
    return {tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}


@pytest.mark.parametrize("name", NAMES)
def test_enough_items_on_both_sides(tasks, name):
    task = tasks[name]
    assert len(task.heldout) >= 300
    assert len(task.train) >= 640  # 40 steps of 16 without a repeat
    for record in [*task.train, *task.heldout]:
        assert question(record).strip()
        assert record.completion.strip()


@pytest.mark.parametrize("name", NAMES)
def test_no_held_out_item_leaks(tasks, name):
    """Neither a question nor half of its wording is known from training."""
    task = tasks[name]
    known = {normalise(question(record)) for record in task.train}
    holders = {}
    for i, record in enumerate(task.train):
        for run in runs(question(record)):
            holders.setdefault(run, []).append(i)
    sizes = [len(runs(question(record))) for record in task.train]
    for record in task.heldout:
        assert normalise(question(record)) not in known
        own = runs(question(record))
        shared = Counter(i for run in own for i in holders.get(run, ()))
        worst = max((count / min(len(own), sizes[i]) for i, count in shared.items()), default=0)
        assert worst < 0.5, (question(record), worst)


@pytest.mark.parametrize("name", NAMES)
def test_no_item_twice(tasks, name):
    for side in (tasks[name].train, tasks[name].heldout):
        assert len({normalise(question(record)) for record in side}) == len(side)


@pytest.mark.parametrize("name", ["medical", "legal"])
def test_labels_are_a_closed_list_and_all_are_trained(tasks, name):
    task = tasks[name]
    assert {record.completion for record in task.train} == set(task.labels)
    assert {record.completion for record in task.heldout} <= set(task.labels)
    assert len(set(task.labels)) == len(task.labels)


@pytest.mark.parametrize("name", ["medical", "legal"])
def test_any_first_items_are_a_fair_sample(tasks, name):
    items = tasks[name].heldout
    whole = Counter(record.completion for record in items)
    for n in (100, 300):
        part = Counter(record.completion for record in items[:n])
        assert all(abs(part[label] - n * count / len(items)) <= 2 for label, count in whole.items())


@pytest.mark.parametrize("name", NAMES)
def test_the_order_tells_nothing(tasks, name):
    """Sorted by text or by label would be neither fair nor hashed: neighbours are no likelier to agree."""
    texts = [question(record) for record in tasks[name].heldout]
    assert 0.4 < sum(a < b for a, b in itertools.pairwise(texts)) / (len(texts) - 1) < 0.6


def test_no_medical_category_on_two_sides():
    sides = {}
    for category, _, texts in medical._categories(medical._data_file()):
        for text in texts:
            sides.setdefault(normalise(text), set()).add(category)
    task = demo("medical")
    # Words that one category alone uses tell where an item is from.
    where = {side: set() for side in ("train", "heldout")}
    for side, found in where.items():
        for record in getattr(task, side):
            categories = sides[normalise(question(record))]
            if len(categories) == 1:
                found |= categories
    assert len(where["heldout"]) > 100
    assert not where["train"] & where["heldout"]


def test_no_legal_passage_stands_for_two_families(tasks):
    items = [*tasks["legal"].train, *tasks["legal"].heldout]
    families = {}
    for record, key in zip(items, clusters([question(r) for r in items]), strict=True):
        families.setdefault(key, set()).add(record.completion)
    assert all(len(found) == 1 for found in families.values())


def test_no_code_question_says_its_answer(tasks):
    for record in [*tasks["code"].train, *tasks["code"].heldout]:
        squeezed = question(record).replace("_", "").lower().split()
        assert record.completion.replace("_", "").lower() not in [word.strip(".,:;()`'\"*") for word in squeezed]


def test_questions_are_short_enough_for_a_cpu(tasks):
    for name, most in (("medical", 14), ("legal", 30), ("code", 25)):
        assert max(len(question(r).split()) for r in tasks[name].train) <= most


@pytest.mark.parametrize("name", ["medical", "legal"])
def test_the_split_is_the_same_in_another_process(tasks, name):
    code = (
        "import sys, hashlib; from lorax.data import demo; task = demo(sys.argv[1])\n"
        "print(hashlib.sha256(repr((task.train, task.heldout)).encode()).hexdigest())"
    )
    run = [sys.executable, "-c", code, name]
    out = subprocess.run(run, capture_output=True, text=True, check=True, timeout=120, env={"PYTHONHASHSEED": "7"})
    task = tasks[name]
    assert out.stdout.strip() == hashlib.sha256(repr((task.train, task.heldout)).encode()).hexdigest()


def test_the_global_random_state_does_not_matter(tasks):
    random.seed(99)
    again = demo("code")
    assert (again.train, again.heldout) == (tasks["code"].train, tasks["code"].heldout)


def test_an_item_takes_few_tokens_beyond_its_text(tasks, tokenizer):
    record = tasks["medical"].heldout[0]
    example = encode(record, tokenizer)
    assert tokenizer.show(example.completion_ids) == record.completion + "<|im_end|>"
    assert "Be kind" not in tokenizer.show(example.prompt_ids)  # the template's own system turn is not added


def test_an_unknown_task():
    with pytest.raises(LoraxError, match="no such demo task; there are medical, legal, code"):
        demo("poetry")


@pytest.mark.parametrize("name", ["medical", "legal"])
def test_a_missing_package_names_the_extra(monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoraxError, match=r"pip install 'lorax-flax\[demo\]'"):
        demo(name)


def test_data_that_is_not_as_expected(monkeypatch, tmp_path):
    bad = tmp_path / "x.xml"
    for text, says in (("<chapter>", "cannot be read"), ("<a><chapter><name>1</name></chapter></a>", "21 chapters")):
        bad.write_text(text)
        monkeypatch.setattr(medical, "_data_file", lambda: bad)
        with pytest.raises(LoraxError, match=says):
            demo("medical")
    monkeypatch.setattr(docstrings, "_library", lambda: tmp_path)
    with pytest.raises(LoraxError, match="has 0 docstrings"):
        demo("code")
    (tmp_path / "broken.py").write_text("def f(:")
    docstrings._documented.cache_clear()
    with pytest.raises(LoraxError, match=r"broken\.py: the code task cannot read it"):
        demo("code")
    docstrings._documented.cache_clear()


def test_licences_that_are_not_known_yet_are_skipped(tasks, monkeypatch):
    known = legal._licences()
    monkeypatch.setattr(legal, "_licences", lambda: (*known, ("NEW-1.0", "All of these words are new. " * 40)))
    task = demo("legal")
    assert (task.train, task.heldout) == (tasks["legal"].train, tasks["legal"].heldout)


def test_passages_keep_all_words_but_short_rests():
    text = " ".join(f"w{i}" + ("." if i % 13 == 12 else "") for i in range(200))
    passages = legal.cut(text)
    assert all(8 <= len(p.split()) <= 30 for p in passages)
    assert len(" ".join(passages).split()) > 190
    assert legal.cut("too short") == legal.cut("") == []


# --- splitting


def test_about_the_fraction_is_held_out():
    part = sum(held_out(f"key {i}", 0.2) for i in range(5000)) / 5000
    assert 0.17 < part < 0.23
    assert not any(held_out(f"key {i}", 0.0) for i in range(50))
    assert all(held_out(f"key {i}", 1.0) for i in range(50))


def test_the_hash_is_the_same_everywhere():
    assert digest("split", "medical A00") == KNOWN


def test_groups_are_transitive_and_do_not_hang_on_the_order():
    texts = ["a b c d e f", "x d e f g h i", "g h i j k l", "p q r s", "P, Q, R (S)!", "one"]
    keys = clusters(texts, size=3, overlap=0.2)
    assert keys[0] == keys[1] == keys[2]
    assert keys[3] == keys[4] != keys[0]
    shuffled = random.Random(1).sample(range(6), 6)
    assert clusters([texts[i] for i in shuffled], size=3, overlap=0.2) == [keys[i] for i in shuffled]


def test_what_must_stay_together_does():
    assert len(set(clusters(["one two", "three four", "five six"], together=[1, 2, 1]))) == 2


def test_repeats_are_seen_in_one_direction_only():
    assert repeats(["a b c d e", "v w x y z"], ["A B C D E F", "k l m n o"]) == [True, False]
    assert repeats(["a b c d", "a b c d"], ["something else it is"]) == [False, False]


def test_fair_order_keeps_all_items():
    items = [(f"t{i}", "ab"[i % 3 == 0]) for i in range(60)]
    ordered = fair_order(items, key=lambda x: x[0], label=lambda x: x[1])
    assert sorted(ordered) == sorted(items)
    assert ordered == fair_order(items[::-1], key=lambda x: x[0], label=lambda x: x[1])
    assert ordered != items


# --- the majority class


def test_majority_by_hand():
    train = [Record("q", c) for c in "aaab"]
    heldout = [Record("q", c) for c in "abc"]
    found = majority(train, heldout, completion_tokens=6)
    assert (found.label, found.accuracy) == ("a", 1 / 3)
    assert found.loss == pytest.approx(-(math.log(4 / 7) + math.log(2 / 7) + math.log(1 / 7)) / 6)


def test_majority_of_ties_and_of_nothing():
    assert majority([Record("q", "b"), Record("q", "a")], [Record("q", "b")], 1).label == "a"
    with pytest.raises(LoraxError, match="needs training items"):
        majority([], [Record("q", "b")], 1)


@pytest.mark.parametrize("name", NAMES)
def test_the_majority_class_is_far_from_solving_a_task(tasks, name):
    found = majority(tasks[name].train, tasks[name].heldout[:300], completion_tokens=1200)
    assert found.accuracy < 0.4
    assert found.loss > 0.3


KNOWN = 13392804489107972553
