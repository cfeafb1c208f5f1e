"""What a training example is: first as text (`Record`), then as tokens (`Example`, and many in `Examples`)."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from jaxtyping import Float, Int

from lorax.errors import LoraxError

Message = Mapping[str, str]


@dataclass(frozen=True)
class Record:
    """An example as text: something said, and what should follow.

    Attributes:
        prompt: plain text, or the turns before the last answer, each `{"role": ..., "content": ...}`.
        completion: the answer to learn, never empty.
        source: where it was read, such as `train.jsonl:17`; errors name it. Not part of the content.
    """

    prompt: str | tuple[Message, ...]
    completion: str
    source: str = ""


@dataclass(frozen=True)
class Example:
    """An example as tokens. The model reads `prompt_ids + completion_ids` and learns the second part.

    `weights` says how much each completion token counts in the loss; None is one for all. A conversation of
    several turns has its first prompt in `prompt_ids`; all that follows is in `completion_ids`, where the
    other side's turns weigh 0 and every assistant turn, with its end-of-turn token, weighs 1.

    Raises:
        LoraxError: a part is empty (nothing to read from, or nothing to learn), the weights do not fit the
            completion or are negative, or all are zero.

    Example:
        >>> Example((5, 6), (7, 2)).ids
        (5, 6, 7, 2)
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise LoraxError("an example has an empty prompt: the first completion token has nothing before it")
        if not self.completion_ids:
            raise LoraxError("an example has an empty completion: there is nothing to learn")
        if self.weights is None:
            return
        if len(self.weights) != len(self.completion_ids):
            raise LoraxError(
                f"an example has {len(self.weights)} weights for {len(self.completion_ids)} completion tokens"
            )
        if min(self.weights) < 0 or max(self.weights) == 0:
            raise LoraxError("an example's weights must not be negative, nor all zero")

    @property
    def ids(self) -> tuple[int, ...]:
        """All tokens."""
        return self.prompt_ids + self.completion_ids

    @property
    def token_weights(self) -> tuple[float, ...]:
        """One weight per token of `ids`: 0 on the prompt."""
        return (0.0,) * len(self.prompt_ids) + (self.weights or (1.0,) * len(self.completion_ids))


class Examples(Sequence[Example]):
    """Many examples in four flat arrays: eight bytes a token, where tuples of Python ints take five times as much.

    Attributes:
        ids: (tokens,) int32, all examples one after another.
        weights: (tokens,) float32, 0 on prompts.
        starts: (n + 1,) int64; example i is `ids[starts[i]:starts[i + 1]]`.
        prompts: (n,) int64, tokens in each prompt.

    Example:
        >>> many = Examples.of([Example((5, 6), (7, 2)), Example((5,), (9, 9, 2))])
        >>> len(many), many.lengths.tolist(), many[1].completion_ids
        (2, [3, 3], (9, 9, 2))
    """

    def __init__(
        self,
        ids: Int[np.ndarray, " tokens"],
        weights: Float[np.ndarray, " tokens"],
        starts: Int[np.ndarray, " n_plus_1"],
        prompts: Int[np.ndarray, " n"],
    ) -> None:
        self.ids, self.weights, self.starts, self.prompts = ids, weights, starts, prompts

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Examples:
        """Gather examples; the iterable is read once."""
        if isinstance(examples, Examples):
            return examples
        ids, weights, starts, prompts = array("i"), array("f"), array("q", [0]), array("q")
        for example in examples:
            ids.extend(example.ids)
            weights.extend(example.token_weights)
            starts.append(len(ids))
            prompts.append(len(example.prompt_ids))
        return cls(
            np.array(ids, np.int32),
            np.array(weights, np.float32),
            np.array(starts, np.int64),
            np.array(prompts, np.int64),
        )

    @property
    def lengths(self) -> Int[np.ndarray, " n"]:
        """Positions that each example takes in a row: one less than its tokens, as the last is only a target."""
        return np.diff(self.starts) - 1

    def tokens(self, index: int) -> tuple[Int[np.ndarray, " t"], Float[np.ndarray, " t"]]:
        """The tokens of one example and their weights, without a copy."""
        span = slice(self.starts[index], self.starts[index + 1])
        return self.ids[span], self.weights[span]

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return Examples.of(self[i] for i in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index %= len(self)
        ids, weights = self.tokens(index)
        prompt = int(self.prompts[index])
        weight = None if (weights[prompt:] == 1).all() else tuple(weights[prompt:].tolist())
        return Example(tuple(ids[:prompt].tolist()), tuple(ids[prompt:].tolist()), weight)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))


def data_hash(examples: Iterable[Example]) -> str:
    """SHA-256 of tokens, weights and order, in hex: equal if and only if training would read the same.

    Example:
        >>> data_hash([Example((1,), (2,))])[:8] == data_hash([Example((1, 2), (3,))])[:8]
        False
    """
    many = Examples.of(examples)
    digest = hashlib.sha256(b"lorax examples 1")
    for part, dtype in ((many.starts, "<i8"), (many.prompts, "<i8"), (many.ids, "<i4"), (many.weights, "<f4")):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(part, dtype).data)
    return digest.hexdigest()
