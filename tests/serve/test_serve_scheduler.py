"""Pages, prefix cache and scheduler as state machines: no page twice, none lost, nobody waits for ever."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lorax.serve.fairness import WaitingLine
from lorax.serve.pages import PagePool
from lorax.serve.prefix import PrefixCache
from lorax.serve.request import Request
from lorax.serve.scheduler import FAILED, LOADING, NO_ROOM, READY, Scheduler, Shape
from lorax.serve.sequence import Sequence

QUIET = settings(max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
SIZE = 2


class PoolMachine(RuleBasedStateMachine):
    """A pool against a set."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(9)
        self.held: list[list[int]] = []

    @rule(count=st.integers(0, 10))
    def take(self, count):
        before = self.pool.free
        got = self.pool.take(count)
        if count > before:
            assert got is None
            assert self.pool.free == before
        else:
            assert got is not None
            assert len(got) == count
            self.held.append(got)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give(self, data):
        self.pool.give(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def every_page_is_in_one_place(self):
        owned = [page for pages in self.held for page in pages]
        assert len(set(owned)) == len(owned)
        assert 0 not in owned
        assert self.pool.free + len(owned) == 8


TestPool = PoolMachine.TestCase
TestPool.settings = QUIET


def test_a_page_given_back_twice_is_seen():
    pool = PagePool(4)
    (page,) = pool.take(1)
    pool.give([page])
    with pytest.raises(AssertionError, match="twice"):
        pool.give([page])


@dataclass(eq=False)
class Toy:
    """An adapter of some pages; `waits` plans pass before it has come from the disk."""

    digest: str
    size: int
    waits: int
    pages: list[int] | None = None
    pins: int = 0
    broken: bool = False


class ToyStore:
    """The device tier without weights."""

    def __init__(self, pool, toys):
        self.pool, self.toys = pool, toys

    def ensure(self, adapter, room, now):
        if adapter.pages is not None:
            return READY
        if adapter.broken:
            return FAILED
        if adapter.waits:
            adapter.waits -= 1
            return LOADING
        if not room(adapter.size):
            return NO_ROOM
        adapter.pages = self.pool.take(adapter.size)
        return READY

    def pin(self, adapter, now):
        assert adapter.pages is not None
        adapter.pins += 1

    def unpin(self, adapter):
        assert adapter.pins > 0
        adapter.pins -= 1

    def cost(self, adapter):
        return 0 if adapter.pins else adapter.size

    def idle_pages(self):
        return sum(len(toy.pages) for toy in self.toys if toy.pages is not None and not toy.pins)

    def evict(self, pages):
        freed = 0
        for toy in self.toys:
            if freed < pages and toy.pages is not None and not toy.pins:
                self.pool.give(toy.pages)
                freed += len(toy.pages)
                toy.pages = None
        return freed


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run and are cancelled, over a pool that is too small for them."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(17)
        self.cache = PrefixCache(self.pool, SIZE)
        self.toys = [Toy("a", 3, 0), Toy("b", 5, 2), Toy("c", 1, 1), Toy("d", 2, 0, broken=True)]
        self.store = ToyStore(self.pool, self.toys)
        shapes = [Shape(1, 4), Shape(2, 2)]
        self.scheduler = Scheduler(self.pool, self.cache, self.store, SIZE, 3, shapes, patience=5.0)
        self.now, self.live, self.goal = 0.0, [], {}

    @rule(
        which=st.sampled_from([None, 0, 1, 2, 3]),
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=8),
        new=st.integers(1, 9),
        tenant=st.sampled_from("xy"),
        priority=st.integers(0, 2),
    )
    def submit(self, which, prompt, new, tenant, priority):
        request = Request(tuple(prompt), max_new_tokens=new, tenant=tenant, priority=priority)
        sequence = Sequence(request, None if which is None else self.toys[which], self.now)
        self.scheduler.submit(sequence)
        self.live.append(sequence)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def cancel(self, data):
        sequence = self.live.pop(data.draw(st.integers(0, len(self.live) - 1)))
        self.scheduler.finish(sequence)

    @rule(seconds=st.sampled_from([0.1, 0.6]))
    def step(self, seconds):
        self.now += seconds
        self.run()

    def run(self):
        plan = self.scheduler.plan(self.now)
        for sequence in plan.failed:
            assert sequence.adapter.broken
            self.live.remove(sequence)
        work = [*plan.prefill, *((s, 1) for s in plan.decode)]
        assert len({id(s) for s, _ in work}) == len(work)
        if plan.shape is not None:
            assert len(plan.prefill) <= plan.shape.rows
        for s, count in work:
            assert s in self.scheduler.running
            assert 1 <= count <= s.todo
            assert len(s.pages) * SIZE >= s.computed + count
            assert s.adapter is None or (s.adapter.pages is not None and s.adapter.pins)
        for s, count in work:
            last = count == s.todo
            # What a model would say: a function of the tokens before.
            self.scheduler.advance(s, count, sum(s.tokens) % 2 if last else None)
            if last and s.generated >= s.request.max_new_tokens:
                self.scheduler.finish(s)
                self.live.remove(s)
        return bool(work) or bool(plan.failed)

    @invariant()
    def no_page_is_lost_or_in_two_places(self):
        running = self.scheduler.running
        own = [page for s in running for page in s.pages[len(s.nodes) :]]
        adapters = [page for toy in self.toys for page in toy.pages or ()]
        cached = [node.page for node in self.cache._nodes.values()]
        everything = [*own, *adapters, *cached]
        assert len(set(everything)) == len(everything)
        assert self.pool.free + len(everything) == 16

    @invariant()
    def a_shared_page_was_computed_by_the_same_adapter_from_the_same_tokens(self):
        for s in self.scheduler.running:
            for i, node in enumerate(s.nodes):
                assert node.page == s.pages[i]
                assert node.key[1] == tuple(s.tokens[i * SIZE : (i + 1) * SIZE])
            if s.nodes:
                assert s.nodes[0].key[0] == s.digest

    @invariant()
    def who_is_used_is_counted(self):
        for toy in self.toys:
            assert toy.pins == sum(s.adapter is toy for s in self.scheduler.running)
        used = [node for s in self.scheduler.running for node in s.nodes]
        for node in self.cache._nodes.values():
            assert node.users == used.count(node)
        assert self.cache.idle == sum(not node.users for node in self.cache._nodes.values())

    def teardown(self):
        """Everybody is served in the end."""
        for _ in range(3000):
            if not self.live:
                break
            self.now += 0.6
            self.run()
        assert not self.live
        assert not self.scheduler.running
        assert not self.scheduler.line
        self.no_page_is_lost_or_in_two_places()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = QUIET


def waiting(line, tenant, at, priority=0, tokens=1):
    sequence = Sequence(Request((1,) * tokens, tenant=tenant, priority=priority), None, at)
    line.enter(sequence)
    return sequence


def test_the_tenant_that_had_least_is_next():
    line = WaitingLine(patience=30.0)
    greedy = [waiting(line, "greedy", at) for at in range(6)]
    modest = [waiting(line, "modest", 10 + at) for at in range(2)]
    served = []
    for _ in range(4):
        sequence = line.take(20.0)
        line.charge(sequence, prompt=10)
        served.append(sequence)
    assert served == [greedy[0], modest[0], greedy[1], modest[1]]


def test_a_pause_earns_nothing():
    line = WaitingLine(patience=30.0)
    first = waiting(line, "steady", 0.0)
    line.charge(first, prompt=100)
    late = waiting(line, "late", 1.0)
    assert line.counters["late"] == line.counters["steady"] == 100
    line.take(1.0), line.take(1.0)
    line.leave(first), line.leave(late)
    assert not line.counters


def test_priority_first_and_waiting_is_priority():
    line = WaitingLine(patience=5.0)
    old = waiting(line, "t", 0.0)
    urgent = waiting(line, "t", 9.0, priority=2)
    assert line.take(9.0) is urgent
    line.put_back(urgent)
    assert line.take(15.0) is old


def test_a_preempted_one_keeps_its_place():
    line = WaitingLine(patience=5.0)
    first, second = waiting(line, "t", 0.0), waiting(line, "t", 1.0)
    assert line.take(1.0) is first
    line.put_back(first)
    assert line.take(1.0) is first
    assert line.take(1.0) is second
    assert line.take(1.0) is None


def test_a_prefix_is_an_adapters_own():
    pool = PagePool(9)
    cache = PrefixCache(pool, SIZE)
    tokens = [1, 2, 3, 4, 5]
    nodes = []
    for i in range(2):
        (page,) = pool.take(1)
        nodes.append(cache.insert("digest", nodes, tokens[2 * i : 2 * i + 2], page))
    assert cache.acquire("digest", tokens) == nodes
    assert cache.acquire("", tokens) == cache.acquire("another", tokens) == []
    # One token is always left to compute.
    assert cache.acquire("digest", tokens[:4]) == nodes[:1]
    assert cache.acquire("digest", [1, 2, 9, 4, 5]) == nodes[:1]
    cache.release(nodes)
    cache.release(nodes)
    cache.release(nodes[:1])
    cache.release(nodes[:1])
    assert cache.idle == 2
    assert cache.reclaim(1) == 1
    assert cache.acquire("digest", tokens) == nodes[:1]
    assert cache.reclaim(5) == 0
