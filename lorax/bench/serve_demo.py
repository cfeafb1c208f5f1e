"""`make serve-demo`: three adapters over one small model, asked all at once through the server.

1. train   legal, medical and code, a few steps each; adapters of an earlier demo are taken as they are
2. serve   `lorax serve` over their folder, as anybody would start it
3. ask     held-out questions of the three tasks, mixed, each with its own adapter in `model`
4. time    the same questions for the base alone, and for the three adapters
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from lorax.errors import LoraxError

TASKS = ("legal", "medical", "code")


@dataclass(frozen=True)
class Args:
    """Train, serve and ask the three demo adapters."""

    base: str = "smollm2-135m"
    """The base model."""
    out: str = "runs/serve-demo"
    """Folder of the three runs."""
    steps: int = 16
    """Steps of a run."""
    questions: int = 8
    """Questions to each adapter, all at once."""
    tokens: int = 32
    """Tokens of an answer while throughput is measured."""
    rounds: int = 3
    """Times that throughput is measured; the median stands."""


def main(words: Sequence[str] | None = None) -> int:
    """Run the demo; 2 with one line on standard error if something is in the way."""
    import tyro

    try:
        show(tyro.cli(Args, prog="python -m lorax.bench.serve_demo", args=words))
    except LoraxError as error:
        print(f"lorax: {error}", file=sys.stderr)
        return 2
    return 0


def show(args: Args) -> None:
    """All four steps."""
    for task in TASKS:
        train(args, task)
    with server(args) as url:
        asked = questions(args.questions)
        print(f"\n{len(asked)} questions at once, in one batch, to {url}:\n")
        answers = ask_all(url, args.base, asked, "adapter", max_tokens=16)
        lines = [("served by", "question", "answer", "what was right")]
        lines += [(a["model"], question[-1]["content"], a["text"], right) for (_, question, right), a in answers]
        for line in lines:
            print("  ".join(_cell(text, width) for text, width in zip(line, (10, 54, 24, 24), strict=True)).rstrip())
        print()
        for task in TASKS:
            mine = [(right, a["text"]) for (name, _, right), a in answers if name == task]
            print(f"{task}: {sum(r.strip() == t.strip() for r, t in mine)} of {len(mine)} right")
        speeds = throughput(url, args, asked)
    ratio = speeds["adapter"] / speeds["base"]
    print(f"\n{len(asked)} requests in flight, {args.tokens} tokens each:")
    print(f"  the base alone       {speeds['base']:7.1f} tokens/s")
    print(f"  three adapters mixed {speeds['adapter']:7.1f} tokens/s   {ratio:.2f} of it")


def train(args: Args, task: str) -> None:
    """One of the three runs, unless it is there."""
    run = Path(args.out) / task
    if (run / "adapter" / "adapter_config.json").is_file():
        print(f"{run}: is there already", flush=True)
        return
    command = [sys.executable, "-m", "lorax", "train", "--base", args.base, "--task", task, "--method", "lora"]
    command += ["--steps", str(args.steps), "--batch-size", "8", "--rank", "8", "--lr", "2e-3", "--eval-items", "16"]
    if subprocess.run([*command, "--out", str(run)], check=False).returncode:
        raise LoraxError(f"{run}: the run did not end well; see above, and remove the folder to begin again")


@contextlib.contextmanager
def server(args: Args) -> Iterator[str]:
    """`lorax serve` over the runs: its address, once it answers."""
    command = [sys.executable, "-m", "lorax", "serve", "--base", args.base, "--adapters", args.out, "--json"]
    print("\n" + " ".join(["lorax", *command[3:]]), flush=True)
    log = Path(args.out) / "server.log"
    with (
        log.open("w") as file,
        subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, stderr=file, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            said = _object(process.stdout)
            if not said:
                raise LoraxError(f"the server did not start; {log} says why")
            yield json.loads(said)["url"]
        finally:
            process.terminate()
            process.stdout.close()


def _object(lines: Any) -> str:
    """A JSON object that ends with a brace in a line of its own."""
    said = ""
    for line in lines:
        said += line
        if line.rstrip() == "}":
            break
    return said


def questions(each: int) -> list[tuple[str, Any, str]]:
    """(task, conversation, answer) of held-out items, the tasks in turn."""
    from lorax.data.demos import demo

    items = {task: demo(task).heldout[:each] for task in TASKS}
    return [(task, list(items[task][i].prompt), items[task][i].completion) for i in range(each) for task in TASKS]


def ask_all(url: str, base: str, asked: Sequence[Any], who: str, **more: Any) -> list[tuple[Any, dict[str, Any]]]:
    """Every question at the same time, to its task's adapter or to the base."""
    with ThreadPoolExecutor(len(asked)) as pool:
        names = [base if who == "base" else task for task, _, _ in asked]
        answers = pool.map(lambda pair: ask(url, pair[0], pair[1][1], **more), zip(names, asked, strict=True))
        return list(zip(asked, answers, strict=True))


def ask(url: str, model: str, messages: Any, **more: Any) -> dict[str, Any]:
    """One chat completion: who answered, the text, and how many tokens it is."""
    body = json.dumps({"model": model, "messages": messages, "temperature": 0, **more}).encode()
    call = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(call, timeout=600) as reply:
        found = json.loads(reply.read())
    text = found["choices"][0]["message"]["content"]
    return {"model": found["model"], "text": text, "tokens": found["usage"]["completion_tokens"]}


def throughput(url: str, args: Args, asked: Sequence[Any]) -> dict[str, float]:
    """Tokens a second of all questions together, the base and the adapters in turns; a first turn is not counted."""
    speeds: dict[str, list[float]] = {"base": [], "adapter": []}
    for _ in range(args.rounds + 1):
        for who, found in speeds.items():
            begin = time.perf_counter()
            answers = ask_all(url, args.base, asked, who, max_tokens=args.tokens, ignore_eos=True)
            found.append(sum(answer["tokens"] for _, answer in answers) / (time.perf_counter() - begin))
    return {who: median(found[1:]) for who, found in speeds.items()}


def _cell(text: str, width: int) -> str:
    """A text in one line of a width."""
    line = " ".join(text.split())
    return line.ljust(width) if len(line) <= width else line[: width - 1] + "…"


if __name__ == "__main__":
    sys.exit(main())
