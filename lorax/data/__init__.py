"""Examples in: text files and demo tasks, tokens, and batches that can be stopped and continued."""

from lorax.data.batches import eval_batches
from lorax.data.chat import encode, encode_all
from lorax.data.demos import DemoTask, Majority, demo, majority
from lorax.data.examples import Example, Examples, Record, data_hash
from lorax.data.jsonl import Jsonl
from lorax.data.stream import TrainStream

__all__ = [
    "DemoTask",
    "Example",
    "Examples",
    "Jsonl",
    "Majority",
    "Record",
    "TrainStream",
    "data_hash",
    "demo",
    "encode",
    "encode_all",
    "eval_batches",
    "majority",
]
