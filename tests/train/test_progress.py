"""Bars on a terminal, silence elsewhere, messages always."""

import io

import pytest
from rich.console import Console

from lorax.train.loop import Row
from lorax.train.progress import Display

ROW = Row(3, loss=1.2345, grad_norm=1.0, lr=1e-3, tokens=500, completion_tokens=60, seconds=0.25, compiled=False)


def shown(*, terminal: bool, quiet: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120)
    with Display(quiet=quiet, console=console) as display:
        display.begin("train", 10, done=2)
        display.stepped(ROW)
        display.say("a [message] of note")
    return out.getvalue()


def test_a_terminal_shows_loss_speed_and_time_left():
    text = shown(terminal=True)
    assert "loss 1.234" in text
    assert "2,000 tok/s" in text
    assert "3/10" in text
    assert "left" in text


@pytest.mark.parametrize(("terminal", "quiet"), [(False, False), (True, True)])
def test_elsewhere_only_messages(terminal, quiet):
    assert shown(terminal=terminal, quiet=quiet) == "a [message] of note\n"
