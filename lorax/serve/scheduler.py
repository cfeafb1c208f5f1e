"""What the next step computes: who joins, whose prompt is read on, who gets a token, and who has to give way.

Before every step: requests that wait are admitted while there is a row, room for their prompt, and their adapter is on
the device; then each running sequence is given the page that its next tokens need. Where no page is to be had, pages
of the prefix cache go first, then adapters that nobody uses, then the sequence that was admitted last, whose pages are
given back and whose tokens are computed again later. Nothing fails for want of room.

This file knows no array and no clock: time is an argument, and what the device holds is `Adapters`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from lorax.serve.fairness import WaitingLine
from lorax.serve.pages import PagePool
from lorax.serve.prefix import PrefixCache
from lorax.serve.sequence import Sequence

# Seconds that one waits for room while others pass; then nobody passes it any more.
GRACE = 0.5
# Pages left for those that run when another is admitted.
RESERVE = 4
# What a step costs besides its tokens, in tokens: the weights are read.
STEP_COST = 24
READY, LOADING, NO_ROOM, FAILED = "ready", "loading", "no room", "failed"


class Adapters(Protocol):
    """What the scheduler asks of the adapters' store."""

    def ensure(self, adapter: Any, room: Callable[[int], bool], now: float) -> str:
        """Bring an adapter to the device; `room(pages)` makes room. READY, LOADING (ask again), NO_ROOM or FAILED."""
        ...

    def pin(self, adapter: Any, now: float) -> None:
        """A running sequence uses it."""
        ...

    def unpin(self, adapter: Any) -> None:
        """One less does."""
        ...

    def cost(self, adapter: Any) -> int:
        """Pages that are gone for others once a sequence runs with it: none if one does already."""
        ...

    def evict(self, pages: int) -> int:
        """Free up to so many pages of adapters that nobody uses; how many were."""
        ...

    def idle_pages(self) -> int:
        """Pages of adapters that nobody uses."""
        ...


class Shape(NamedTuple):
    """Prompts that are read in one program: how many, and how many tokens of each."""

    rows: int
    tokens: int


@dataclass(frozen=True)
class Plan:
    """prefill: sequences and how many of their tokens to read. decode: sequences that get a token."""

    prefill: list[tuple[Sequence, int]]
    shape: Shape | None
    decode: list[Sequence]
    failed: list[Sequence]

    def __bool__(self) -> bool:
        return bool(self.prefill or self.decode)


class Scheduler:
    """Waiting and running sequences over one pool of pages.

    Args:
        pool, cache, adapters: who has which page.
        page_tokens: tokens of a page.
        max_batch: sequences that run together.
        shapes: of prefill programs.
        patience: see `WaitingLine`.
    """

    def __init__(
        self,
        pool: PagePool,
        cache: PrefixCache,
        adapters: Adapters,
        page_tokens: int,
        max_batch: int,
        shapes: list[Shape],
        patience: float,
    ):
        self.pool, self.cache, self.adapters = pool, cache, adapters
        self.page_tokens, self.max_batch, self.shapes = page_tokens, max_batch, shapes
        self.line = WaitingLine(patience)
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._admissions = 0
        self._short = False

    def submit(self, sequence: Sequence) -> None:
        """A new sequence waits."""
        self.line.enter(sequence)

    def plan(self, now: float) -> Plan:
        """Admit whom there is room for, and say what the next step computes. Every sequence in it has its pages."""
        # Whoever could not read on has the next pages that become free.
        failed = [] if self._short else self._admit(now)
        self._short = False
        decode = [s for s in self.running if s.todo == 1]
        reading = [s for s in self.running if s.todo > 1]
        kept = [s for s in decode if s.order is not None and self._grow(s, 1)]
        # Growing one may have put another back, before or after it in the list.
        kept = [s for s in kept if s.order is not None]
        shape, prefill = self._prefill([s for s in reading if s.order is not None], bool(kept))
        kept = [s for s in kept if s.order is not None]
        return Plan(prefill, shape, kept, failed)

    def advance(self, sequence: Sequence, count: int, token: int | None) -> None:
        """A step computed `count` tokens of a running sequence, and then perhaps drew the next one."""
        sequence.computed += count
        self._publish(sequence)
        if token is not None:
            sequence.tokens.append(token)
            self.line.charge(sequence, answer=1)

    def finish(self, sequence: Sequence) -> None:
        """A sequence is over, wherever it was."""
        if sequence.order is not None:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.line.remove(sequence)
        self.line.leave(sequence)

    # Admission.

    def _admit(self, now: float) -> list[Sequence]:
        aside: list[Sequence] = []
        failed: list[Sequence] = []
        while len(self.running) < self.max_batch and len(aside) < self.max_batch:
            sequence = self.line.take(now)
            if sequence is None:
                break
            answer = self._try(sequence, now)
            if answer == READY:
                self._start(sequence, now)
                continue
            if answer == FAILED:
                self.line.put_back(sequence)
                self.finish(sequence)
                failed.append(sequence)
                continue
            aside.append(sequence)
            if answer == NO_ROOM:
                sequence.blocked = now if sequence.blocked is None else sequence.blocked
                if now - sequence.blocked >= GRACE:
                    break
        for sequence in aside:
            self.line.put_back(sequence)
        return failed

    def _try(self, sequence: Sequence, now: float) -> str:
        wanted = -(-(len(sequence.tokens) + 1) // self.page_tokens)
        nodes = self.cache.acquire(sequence.digest, sequence.tokens)
        need = wanted - len(nodes) + min(RESERVE, len(self.running))
        if sequence.adapter is not None:
            need += self.adapters.cost(sequence.adapter)
        answer = NO_ROOM if need > self._obtainable() else READY
        if answer == READY and sequence.adapter is not None:
            answer = self.adapters.ensure(sequence.adapter, self._room, now)
            if answer == LOADING and sequence.last_wait is None:
                sequence.last_wait = now
        if answer != READY:
            self.cache.release(nodes)
            return answer
        self._pin(sequence, now)
        sequence.nodes, sequence.pages = nodes, [node.page for node in nodes]
        return READY

    def _start(self, sequence: Sequence, now: float) -> None:
        sequence.computed = len(sequence.nodes) * self.page_tokens
        if sequence.scheduled is None:
            sequence.cached = sequence.computed
            self.cache.hits += len(sequence.nodes)
            self.cache.lookups += (len(sequence.tokens) - 1) // self.page_tokens
            sequence.scheduled = now
            self.line.charge(sequence, prompt=len(sequence.tokens) - sequence.computed)
        if sequence.last_wait is not None:
            sequence.adapter_wait += now - sequence.last_wait
        sequence.last_wait = sequence.blocked = None
        self._admissions += 1
        sequence.order = self._admissions
        self.running.append(sequence)

    # Pages.

    def _obtainable(self) -> int:
        return self.pool.free + self.cache.idle + self.adapters.idle_pages()

    def _room(self, count: int) -> bool:
        """Whether so many pages are free, after what nobody uses was dropped for them."""
        if self.pool.free < count:
            self.cache.reclaim(count - self.pool.free)
        if self.pool.free < count:
            self.adapters.evict(count - self.pool.free)
        return self.pool.free >= count

    def _grow(self, sequence: Sequence, count: int, give_way: bool = True) -> bool:
        """Pages for the next `count` tokens; others give way. False: it gave way itself, or nobody was to."""
        missing = -(-(sequence.computed + count) // self.page_tokens) - len(sequence.pages)
        if missing <= 0:
            return True
        while not self._room(missing):
            if not give_way:
                return False
            victim = self._victim()
            self._preempt(victim)
            if victim is sequence:
                return False
        taken = self.pool.take(missing)
        assert taken is not None
        sequence.pages += taken
        return True

    def _victim(self) -> Sequence:
        """The least important, and of those the last that came in."""
        return min(self.running, key=lambda s: (s.request.priority, -(s.order or 0)))

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.preempted += 1
        self.preemptions += 1
        self.line.put_back(sequence)

    def _release(self, sequence: Sequence) -> None:
        own = sequence.pages[len(sequence.nodes) :]
        self.cache.release(sequence.nodes)
        self.pool.give(own)
        sequence.pages, sequence.nodes, sequence.computed, sequence.order = [], [], 0, None
        self._unpin(sequence)

    def _publish(self, sequence: Sequence) -> None:
        """Pages that are full now, into the prefix cache."""
        if not self.cache.enabled:
            return
        size = self.page_tokens
        for i in range(len(sequence.nodes), sequence.computed // size):
            tokens, page = sequence.tokens[i * size : (i + 1) * size], sequence.pages[i]
            node = self.cache.insert(sequence.digest, sequence.nodes, tokens, page)
            sequence.nodes.append(node)
            if node.page != page:
                # Somebody else computed the same in the meantime.
                self.pool.give([page])
                sequence.pages[i] = node.page

    def _pin(self, sequence: Sequence, now: float) -> None:
        if sequence.adapter is not None:
            self.adapters.pin(sequence.adapter, now)

    def _unpin(self, sequence: Sequence) -> None:
        if sequence.adapter is not None:
            self.adapters.unpin(sequence.adapter)

    # Prefill.

    def _prefill(self, reading: list[Sequence], others: bool) -> tuple[Shape | None, list[tuple[Sequence, int]]]:
        """Whose prompts are read on, in the program that computes least for nothing."""
        if not reading:
            return None, []

        def gain(shape: Shape) -> float:
            useful = sum(min(s.todo, shape.tokens) for s in reading[: shape.rows])
            return useful / (shape.rows * shape.tokens + STEP_COST)

        shape = max(self.shapes, key=gain)
        out: list[tuple[Sequence, int]] = []
        for sequence in reading[: shape.rows]:
            # Those that wait for their turn hold pages too: where nothing else runs, one of them gives way.
            if sequence.order is None:
                continue
            count = min(sequence.todo, shape.tokens)
            if self._grow(sequence, count, give_way=not (others or out)):
                out.append((sequence, count))
            else:
                self._short = True
        out = [(s, count) for s, count in out if s.order is not None]
        return (shape, out) if out else (None, [])
