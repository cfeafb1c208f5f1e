"""The command line: `lorax COMMAND`, one small module each.

This file decides what every command has in common: how a command is found, how errors look, and exit codes.

    0 done    2 bad input or a run that went wrong, one line on standard error    130 Ctrl-C

A traceback means a fault in lorax. Only the module of the chosen command is imported, and none of them
imports model code before its arguments have been parsed, so `--help` and typing mistakes answer at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from lorax.errors import LoraxError

# command -> (module with `Args`, one line of help). `Args` is a dataclass that tyro parses, with a method
# `run(words)`.
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("lorax.cli.train", "fine-tune a base model: low-rank, full, head or last blocks"),
    "eval": ("lorax.cli.eval", "exact match and loss on held-out examples"),
    "generate": ("lorax.cli.generate", "continue a prompt, with or without an adapter"),
    "merge": ("lorax.cli.merge", "write base + adapter as a Hugging Face directory"),
    "inspect": ("lorax.cli.inspect", "what is in an adapter or a base model"),
    "analyze": ("lorax.cli.analyze", "what happened to the weights, between two models or adapters"),
    "plan": ("lorax.cli.plan", "will it fit, what will it cost: by arithmetic, or by the chip's own compiler"),
    "serve": ("lorax.cli.serve", "answer requests over HTTP, thousands of adapters over one base"),
    "keys": ("lorax.cli.keys", "API keys of lorax serve: who may ask, and for which adapters"),
    "bench": ("lorax.bench.command", "figures of this machine: the step against PEFT, full fine-tuning and its floor"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the words after `lorax`; those of the process by default.
    """
    from lorax.train.runtime import huge_pages

    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv is None and words[:1] == ["train"]:
            huge_pages()
        return _dispatch(words)
    except LoraxError as error:
        print(f"lorax: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has seen enough. Python would complain when it flushes at exit: give it
        # nowhere to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not _out_of_memory(error):
            raise
        print(f"lorax: {OUT_OF_MEMORY}", file=sys.stderr)
        return 2


OUT_OF_MEMORY = "the machine has too little memory for this; smaller numbers (--batch-size, --seq-len) need less"


def _out_of_memory(error: Exception) -> bool:
    """NumPy's way to say it, or XLA's, whose class is not imported for it."""
    return isinstance(error, MemoryError) or (
        type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in str(error)[:100]
    )


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"lorax {version('lorax-flax')}")
        return 0
    name, *rest = words
    if name not in COMMANDS:
        raise LoraxError(f"no command {name!r}; choose one of {', '.join(COMMANDS)}")
    module, _ = COMMANDS[name]
    import tyro

    args = tyro.cli(importlib.import_module(module).Args, prog=f"lorax {name}", args=rest)
    args.run(rest)
    sys.stdout.flush()
    return 0


def _help() -> str:
    lines = [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lorax COMMAND [options]",
            "",
            *lines,
            "",
            "lorax COMMAND --help tells the options of a command.",
        ]
    )
