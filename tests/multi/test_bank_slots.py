"""In and out of a bank of fixed capacity: nothing recompiles, nothing overlaps, nothing is left behind."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bank_toys import adapter, adapters, base, close, mixed, model, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

import lorax
from lorax.errors import LoraxError
from lorax.multi.slots import first_fit


def compilations(function):
    """How many programs XLA compiles while a function runs."""
    count = 0

    def listen(event, seconds, **_):
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        function()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return count


def test_add_replace_remove_without_recompiling():
    params = base()
    made = adapters(params)
    spare = {"new": adapter(params, 8, "all-linear", 5), "other": adapter(params, 9, ("*/o", "*/q"), 7)}
    bank = lorax.attach(params, lorax.stack({k: made[k] for k in ("one", "all", "ends")}, capacity=4, total_rank=20))
    # A function of its own: the cache of programs belongs to the function.
    run = jax.jit(lambda *args: mixed(*args))
    ids, xs = jnp.array([0, 1, 2, 3, -1], jnp.int32), tokens(5)
    want = {
        name: np.asarray(jax.vmap(lambda x, t=t: model(lorax.merge(t), x))(xs)) for name, t in (made | spare).items()
    }
    alone = np.asarray(jax.vmap(lambda x: model(params, x))(xs))

    def check(bank):
        names = lorax.adapter_names(bank)
        out = run(bank, ids, xs)
        for slot, name in enumerate(names):
            close(out[slot], (alone if name is None else want[name])[slot])
        close(out[4], alone[4])

    check(bank)
    # The first change compiles the programs that write; from then on nothing does, whatever the rank and the targets.
    bank = lorax.add_adapter(bank, "new", spare["new"])
    check(bank)
    before = bank

    def changes():
        bank = lorax.remove_adapter(before, "one")
        check(bank)
        bank = lorax.add_adapter(bank, "other", spare["other"])
        assert lorax.adapter_names(bank) == ["other", "all", "ends", "new"]
        check(bank)
        bank = lorax.replace_adapter(bank, "all", made["one"])
        want["all"] = want["one"]
        check(bank)

    assert run._cache_size() == 1
    assert compilations(changes) == 0
    assert run._cache_size() == 1
    want["all"] = np.asarray(jax.vmap(lambda x: model(lorax.merge(made["all"]), x))(xs))
    # What was there is as it was: nothing of the caller's is modified.
    check(before)
    out = (lorax.unstack(before, "new"), spare["new"])
    for got, wanted in zip(*(jax.tree.leaves(lorax.split(tree)[0]) for tree in out), strict=True):
        assert np.array_equal(got, wanted)


def test_removed_rows_are_zeros_and_free():
    params = base()
    bank = lorax.stack(adapters(params), capacity=4)
    emptied = bank
    for name in ("ends", "one", "all", "idle"):
        emptied = lorax.remove_adapter(emptied, name)
    assert lorax.adapter_names(emptied) == [None] * 4
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(lorax.split(emptied)[0]))
    again = lorax.add_adapter(emptied, "ends", adapters(params)["ends"])
    assert lorax.adapter_names(again) == ["ends", None, None, None]


def test_what_does_not_fit_says_why():
    params = base()
    made = adapters(params)
    bank = lorax.stack({"one": made["one"], "all": made["all"]}, capacity=3, total_rank=5, max_rank=4)
    small = adapter(params, 5, "*/q", 1)
    with pytest.raises(LoraxError, match="'one' is in the bank already; replace_adapter"):
        lorax.add_adapter(bank, "one", small)
    with pytest.raises(LoraxError, match="embed: adapter 'x' changes this weight and the bank has none there"):
        lorax.add_adapter(bank, "x", made["ends"])
    with pytest.raises(LoraxError, match="layers/q: rank 5 of adapter 'x' is above the bank's max_rank=4"):
        lorax.add_adapter(bank, "x", adapter(params, 5, "*/q", 5))
    with pytest.raises(LoraxError, match="layers/q: rank 2 finds no room, 1 of 5 rows are free; stack with a larger"):
        lorax.add_adapter(bank, "x", adapter(params, 5, "*/q", 2))
    with pytest.raises(LoraxError, match="no adapter 'x'"):
        lorax.remove_adapter(bank, "x")
    with pytest.raises(LoraxError, match="takes 65 bytes"):
        lorax.add_adapter(bank, "x" * 65, small)
    full = lorax.add_adapter(bank, "x", small)
    with pytest.raises(LoraxError, match="all 3 slots are taken"):
        lorax.add_adapter(full, "y", small)
    # Free rows in two pieces: two of one each, and a rank of two.
    holes = lorax.remove_adapter(lorax.remove_adapter(full, "one"), "x")
    with pytest.raises(LoraxError, match="rank 2 finds no room, 2 of 5 rows are free; compact_bank"):
        lorax.add_adapter(holes, "y", adapter(params, 5, "*/q", 2))
    moved = lorax.add_adapter(lorax.compact_bank(holes), "y", adapter(params, 5, "*/q", 2))
    for got, wanted in zip(*(jax.tree.leaves(lorax.unstack(b, "all")) for b in (moved, bank)), strict=True):
        assert np.array_equal(got, wanted)


class Slots(RuleBasedStateMachine):
    """Adapters come and go on one weight; a dict of arrays says what must be there."""

    ROOM = 12

    def __init__(self):
        super().__init__()
        self.weight = {"w": jnp.ones((13, 12))}
        self.bank = lorax.stack({"first": self.draw("first", 2)[1]}, capacity=4, total_rank=self.ROOM, max_rank=5)
        self.held = {"first": self.draw("first", 2)[0]}
        self.count = 0

    def draw(self, name, rank):
        draw = np.random.default_rng([rank, len(name)]).standard_normal
        a, b = (jnp.asarray(draw(shape), jnp.float32) for shape in ((13, rank), (rank, 12)))
        tree = {"w": lorax.LowRank(None, a, b, jnp.float32(rank), lorax.Axes((), (0,), (1,)))}
        return np.asarray(a @ b), tree

    def attempt(self, change):
        """The reason why a change is refused, the bank being as it was; None if it was made."""
        try:
            self.bank = change()
        except LoraxError as error:
            return str(error)
        return None

    @rule(rank=st.integers(1, 5), align=st.sampled_from([1, 2, 4]))
    def add(self, rank, align):
        self.count += 1
        name = f"adapter {self.count}"
        value, tree = self.draw(name, rank)
        free = self.ROOM - int(self.bank["w"].rank.sum())
        refusal = self.attempt(lambda: lorax.add_adapter(self.bank, name, tree, align))
        if refusal is None:
            self.held[name] = value
        else:
            assert ("finds no room" in refusal) == (len(self.held) < 4)
            assert len(self.held) == 4 or free < rank or align > 1 or "compact_bank" in refusal

    @precondition(lambda self: self.held)
    @rule(data=st.data(), rank=st.integers(1, 5))
    def replace(self, data, rank):
        name = data.draw(st.sampled_from(sorted(self.held)))
        value, tree = self.draw(name, rank)
        refusal = self.attempt(lambda: lorax.replace_adapter(self.bank, name, tree))
        if refusal is None:
            self.held[name] = value
        else:
            assert "finds no room" in refusal

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def remove(self, data):
        name = data.draw(st.sampled_from(sorted(self.held)))
        self.bank = lorax.remove_adapter(self.bank, name)
        del self.held[name]

    @rule()
    def compact(self):
        self.bank = lorax.compact_bank(self.bank)

    @invariant()
    def everyone_is_there(self):
        leaf = self.bank["w"]
        start, rank = np.asarray(leaf.start), np.asarray(leaf.rank)
        owners = np.zeros(self.ROOM, int)
        for s, r in zip(start, rank, strict=True):
            assert 0 <= s <= self.ROOM - r
            owners[s : s + r] += 1
        assert owners.max(initial=0) <= 1
        assert not np.asarray(leaf.A)[owners == 0].any()
        assert sorted(n for n in lorax.adapter_names(self.bank) if n) == sorted(self.held)
        a, b = np.asarray(leaf.A), np.asarray(leaf.B)
        for slot, name in enumerate(lorax.adapter_names(self.bank)):
            if name is not None:
                rows = slice(start[slot], start[slot] + rank[slot])
                close(a[rows].T @ b[rows], self.held[name])
                assert float(leaf.scale[slot]) == rank[slot]


def test_adapters_come_and_go():
    run_state_machine_as_test(Slots, settings=settings(max_examples=20, stateful_step_count=12, deadline=None))


@given(
    ranks=st.lists(st.integers(0, 6), max_size=6),
    gaps=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    size=st.integers(1, 6),
    align=st.sampled_from([1, 2, 8]),
)
@settings(deadline=None)
def test_first_fit(ranks, gaps, size, align):
    taken, at = [], 0
    for rank, gap in zip(ranks, gaps, strict=False):
        taken.append((at + gap, rank))
        at += gap + rank
    total = at + 4
    free = np.ones(total, bool)
    for start, rank in taken:
        free[start : start + rank] = False
    fits = [s for s in range(0, total - size + 1, align) if free[s : s + size].all()]
    assert first_fit(taken, total, size, align) == (fits[0] if fits else None)
