"""Who is next: priorities first, then the tenant that has had least, then who came first.

Each tenant has a virtual counter of the tokens that were computed for it; the waiting tenant with the lowest is served
next. One that comes back after a pause begins where the least served of the others is, so that it neither pays for its
pause nor is paid for it. Waiting counts as priority: one for each `patience` seconds, so that nobody waits for ever
behind those with more.

Source: Sheng et al. 2024, "Fairness in Serving Large Language Models" (virtual token counters).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from lorax.serve.sequence import Sequence

# What a token costs: one of an answer is a step of its own.
PROMPT_COST, ANSWER_COST = 1.0, 2.0


class WaitingLine:
    """The sequences that wait, and the tenants' counters.

    Args:
        patience: seconds of waiting that count as one of priority.
    """

    def __init__(self, patience: float):
        self.patience = patience
        self.counters: dict[str, float] = {}
        # One queue for each tenant and priority: in it, who came first is always first.
        self._queues: dict[tuple[str, int], deque[Sequence]] = {}
        self._active: dict[str, int] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Sequence]:
        for queue in self._queues.values():
            yield from queue

    def enter(self, sequence: Sequence) -> None:
        """A new request: its tenant is active from now on until `leave`."""
        tenant = sequence.request.tenant
        if not self._active.get(tenant):
            others = [self.counters[name] for name, count in self._active.items() if count]
            self.counters[tenant] = max(self.counters.get(tenant, 0.0), min(others, default=0.0))
        self._active[tenant] = self._active.get(tenant, 0) + 1
        self._queue(sequence).append(sequence)
        self._size += 1

    def put_back(self, sequence: Sequence) -> None:
        """One that was taken and could not stay: before the others of its queue that came later."""
        queue = self._queue(sequence)
        at = next((i for i, other in enumerate(queue) if other.arrived > sequence.arrived), len(queue))
        queue.insert(at, sequence)
        self._size += 1

    def leave(self, sequence: Sequence) -> None:
        """A request is over. When nobody is left, all begin anew."""
        tenant = sequence.request.tenant
        self._active[tenant] -= 1
        if not self._active[tenant]:
            del self._active[tenant]
            if not self._active:
                self.counters.clear()

    def take(self, now: float) -> Sequence | None:
        """The next one, out of the line."""
        best = min(((self._rank(key, queue[0], now), key) for key, queue in self._queues.items()), default=None)
        return None if best is None else self._pop(best[1], 0)

    def remove(self, sequence: Sequence) -> None:
        """Take a certain one out of the line."""
        key = (sequence.request.tenant, sequence.request.priority)
        self._pop(key, self._queues[key].index(sequence))

    def charge(self, sequence: Sequence, prompt: int = 0, answer: int = 0) -> None:
        """Tokens were computed for a sequence's tenant."""
        self.counters[sequence.request.tenant] += PROMPT_COST * prompt + ANSWER_COST * answer

    def _rank(self, key: tuple[str, int], head: Sequence, now: float) -> tuple[float, float, float]:
        tenant, priority = key
        aged = priority + int((now - head.arrived) / self.patience)
        return -aged, self.counters[tenant], head.arrived

    def _queue(self, sequence: Sequence) -> deque[Sequence]:
        return self._queues.setdefault((sequence.request.tenant, sequence.request.priority), deque())

    def _pop(self, key: tuple[str, int], index: int) -> Sequence:
        queue = self._queues[key]
        sequence = queue[index]
        del queue[index]
        self._size -= 1
        if not queue:
            del self._queues[key]
        return sequence
