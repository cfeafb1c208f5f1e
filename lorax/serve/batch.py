"""Sequences as the arrays of a step. NumPy on the host; what does not change from step to step is made once."""

from __future__ import annotations

from typing import Any

import numpy as np

from lorax.serve import delta, sampling
from lorax.serve.paged import Rows
from lorax.serve.programs import Programs
from lorax.serve.sequence import Sequence


class Batches:
    """Makes a step's arrays.

    Args:
        programs: their shapes.
    """

    def __init__(self, programs: Programs):
        self._programs = programs
        self._routes: dict[int, tuple[Any, delta.Route]] = {}
        self._settings: dict[int, tuple[Any, sampling.Settings]] = {}

    def rows(self, work: list[tuple[Sequence, int]], rows: int, tokens: int) -> Rows:
        """The tokens that are next, and the pages they belong to."""
        size = self._programs.place.page_tokens
        need = max(-(-(s.computed + count) // size) for s, count in work)
        pages = self._programs.bucket(self._programs.pages(rows, tokens), need)
        out = Rows(
            np.zeros((rows, tokens), np.int32), np.zeros(rows, np.int32), np.zeros(rows, np.int32),
            np.zeros((rows, pages), np.int32),
        )  # fmt: skip
        for r, (s, count) in enumerate(work):
            out.ids[r, :count] = s.tokens[s.computed : s.computed + count]
            out.start[r], out.count[r] = s.computed, count
            held = s.pages[:pages]
            out.table[r, : len(held)] = held
        return out

    def route(self, work: list[tuple[Sequence, int]], rows: int) -> delta.Route:
        """Which adapter each row has; kept while the rows have the same ones."""
        who = [s.adapter for s, _ in work]
        # An adapter that was away lies in other pages now.
        key = [(adapter, 0 if adapter is None else adapter.loads) for adapter in who]
        kept = self._routes.get(rows)
        if kept is not None and kept[0] == key:
            return kept[1]
        programs = self._programs
        route = delta.empty_route(programs.place, rows, programs.max_rank)
        for r, adapter in enumerate(who):
            if adapter is not None:
                route.rank[:, r] = adapter.entry.ranks
                route.scale[:, r] = adapter.scales
                route.table[:, r] = adapter.table
        delta.fill_route(route, rows, programs.max_rank)
        self._routes[rows] = (key, route)
        return route

    def settings(self, work: list[tuple[Sequence, int]], rows: int) -> sampling.Settings:
        """How each row samples; what changes from step to step is brought up to date."""
        key = [s for s, _ in work]
        kept = self._settings.get(rows)
        if kept is None or kept[0] != key:
            out = sampling.plain_settings(rows, self._programs.max_length)
            for r, (s, _) in enumerate(work):
                _describe(out, r, s)
            out.want_logprobs[...] = any(s.request.sampling.logprobs is not None for s, _ in work)
            self._settings[rows] = kept = (key, out)
        out = kept[1]
        for r, (s, _) in enumerate(work):
            out.position[r] = len(s.tokens)
            if s.request.sampling.penalised:
                out.seen[r, : len(s.tokens)] = s.tokens
        return out


def _describe(out: sampling.Settings, r: int, s: Sequence) -> None:
    how = s.request.sampling
    out.temperature[r], out.top_k[r], out.top_p[r], out.min_p[r] = how.temperature, how.top_k, how.top_p, how.min_p
    out.repetition[r], out.presence[r] = how.repetition_penalty, how.presence_penalty
    out.frequency[r] = how.frequency_penalty
    out.key[r] = (s.seed >> 32) & 0xFFFFFFFF, s.seed & 0xFFFFFFFF
    out.prompt[r] = len(s.request.prompt)
