"""`lorax generate`: what of its options reaches the model."""

import json
import shutil

import pytest

from lorax import cli
from lorax.models import generate, load

BACKWARDS = "{% for m in messages|reverse %}{{ m['role'] }}: {{ m['content'] }}{{ ';' }}{% endfor %}"
DROPS_SYSTEM = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"


def ask(capsys, *words):
    assert cli.main(["generate", "--json", "--max-tokens", "7", *map(str, words)]) == 0
    return json.loads(capsys.readouterr().out)["ids"]


def refused(capsys, *words):
    assert cli.main(["generate", *map(str, words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def with_template(base, folder, template):
    """The base with another chat template, or none."""
    shutil.copytree(base, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    more = {} if template is None else {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | more))
    return folder


def test_a_system_message_is_part_of_the_conversation(tiny_base, tmp_path, capsys):
    # The last token decides what a model this small writes, so this template has the system message there.
    base = with_template(tiny_base, tmp_path / "base", BACKWARDS)
    model = load(base)
    by_hand = {None: "user: abc;", "Brief!": "user: abc;system: Brief!;"}
    wanted = {}
    for system, text in by_hand.items():
        (wanted[system],) = generate(model, model.params, [model.tokenizer.encode(text)], 7, temperature=0.3)
    assert wanted[None] != wanted["Brief!"], "the model can tell the two apart"
    words = ("--base", base, "--prompt", "abc", "--temperature", 0.3)
    assert ask(capsys, *words, "--system", "Brief!") == wanted["Brief!"]
    assert ask(capsys, *words, "--chat") == wanted[None]


@pytest.mark.parametrize(("words", "option"), [(["--system", "s"], "--system"), (["--chat"], "--chat")])
def test_without_a_chat_template_it_is_one_line_with_the_way_out(tiny_base, tmp_path, capsys, words, option):
    bare = with_template(tiny_base, tmp_path / "bare", None)
    line = refused(capsys, "--base", bare, "--prompt", "x", *words)
    assert line.startswith(f"lorax: {option}: {bare} has no chat template")


def test_a_template_that_drops_system_messages_is_no_silence(tiny_base, tmp_path, capsys):
    deaf = with_template(tiny_base, tmp_path / "deaf", DROPS_SYSTEM)
    assert "leaves system messages out" in refused(capsys, "--base", deaf, "--prompt", "x", "--system", "s1")
