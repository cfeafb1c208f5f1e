import json
import subprocess

import pytest

from lorax.errors import LoraxError
from lorax.train.record import MetricsLog, environment, git_state, read_json


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_resuming_keeps_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 8):
        log.add({"step": step, "loss": 1 / step})
    log.close()
    again = MetricsLog(path, upto=5)
    assert [row["step"] for row in again.rows] == [1, 2, 3, 4, 5]
    again.add({"step": 6, "loss": 0.5})
    again.sync()
    again.close()
    assert steps_in(path) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("tail", ['{"step": 3, "lo', "\x00\x00\x00", '{"loss": 1}', "[]", '{"step": "3"}'])
def test_a_row_cut_short_by_a_kill_is_dropped(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n' + tail)
    MetricsLog(path, upto=9).close()
    assert steps_in(path) == [1, 2]


def test_a_fresh_log_forgets_an_old_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    MetricsLog(path).close()
    assert path.read_text() == ""


def test_the_environment_names_versions_and_device():
    found = environment()
    assert found["versions"]["jax"]
    assert found["device"]["platform"] == "cpu"
    json.dumps(found)


def test_git_state_tells_commit_and_changes(tmp_path):
    assert git_state(tmp_path) is None

    def git(*words):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-q", "-m", "first")
    clean = git_state(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["dirty"] is False
    (tmp_path / "file").write_text("two")
    assert git_state(tmp_path) == {**clean, "dirty": True}


@pytest.mark.parametrize(("text", "says"), [("{", "cannot be read"), ("[1]", "list"), (None, "no such file")])
def test_a_record_that_cannot_be_read_names_the_file(tmp_path, text, says):
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(LoraxError, match=rf"run\.json.*{says}"):
        read_json(path)


@pytest.mark.parametrize("written", [0, 9])
def test_a_full_disk_names_the_way_out_and_keeps_whole_rows(tmp_path, written):
    class Full:
        """A file on a disk with room for a few more bytes."""

        def __init__(self, file):
            self.file = file

        def write(self, line):
            return self.file.write(line[:written])

        def close(self):
            self.file.close()

    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.add({"step": 1})
    log._file = Full(log._file)
    with pytest.raises(LoraxError, match=r"metrics\.jsonl.*--resume"):
        log.add({"step": 2})
    log.close()
    MetricsLog(path, upto=2).close()
    assert steps_in(path) == [1]
