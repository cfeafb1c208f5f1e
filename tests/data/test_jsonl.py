import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lorax.data import Jsonl, Record
from lorax.data.jsonl import parse_line
from lorax.errors import LoraxError

GOOD = '{"prompt": "a", "completion": "b"}'


def turn(role, content="x"):
    return {"role": role, "content": content}


def write(folder, data):
    path = folder / "train.jsonl"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_both_kinds_of_line(tmp_path):
    talk = [turn("system", "s"), turn("user", "u"), turn("assistant", "é")]
    path = write(tmp_path, GOOD + "\n" + json.dumps({"messages": talk, "id": 7}))
    first, second = Jsonl(path)
    assert first == Record("a", "b", f"{path}:1")
    assert second == Record((talk[0], talk[1]), "é", f"{path}:2")
    assert Jsonl(path)[-1] == second
    assert Jsonl(path)[:1] == [first]


def test_blank_lines_marks_and_windows_line_ends_keep_line_numbers(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf" + f"{GOOD}\r\n\r\n  \n{GOOD}\r\n\n".encode())
    assert [record.source for record in Jsonl(path)] == [f"{path}:1", f"{path}:4"]
    assert len(Jsonl(path)) == 2


def test_only_the_offsets_are_kept(tmp_path):
    many = Jsonl(write(tmp_path, (GOOD + "\n") * 5000))
    assert many[4999].source.endswith(":5000")
    assert not any(isinstance(value, list | dict | str | bytes) for value in vars(many).values())


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"prompt": "\xff", "completion": "b"}', "byte 13 of the line is not UTF-8"),
        ('{"prompt": "a", "completion": "b"', "not JSON at column 34"),
        ("[1, 2]", "a list where an object belongs"),
        ("null", "a null where an object belongs"),
        ('"text"', "a string where an object belongs"),
        ("1" * 5000, "not JSON that can be read"),
        ("[" * 100_000, "not JSON that can be read"),
        ('{"completion": "b"}', 'has no "prompt"'),
        ('{"prompt": "a"}', 'has no "completion"'),
        ('{"prompt": 3, "completion": "b"}', '"prompt" is a number; expected a string'),
        ('{"prompt": true, "completion": "b"}', '"prompt" is a boolean'),
        ('{"prompt": "a", "completion": ["b"]}', '"completion" is a list'),
        ('{"prompt": "a", "completion": " \\n"}', '"completion" is empty'),
        ('{"prompt": "\\ud800", "completion": "b"}', "half of a surrogate pair"),
        ('{"messages": [], "prompt": "a"}', "at once"),
        ('{"messages": []}', "at least one"),
        ('{"messages": {"role": "user"}}', "must be a list"),
        ('{"messages": ["hello"]}', "turn 1 is a string"),
        ('{"messages": [{"role": "user"}]}', 'turn 1 has no "content"'),
        ('{"messages": [{"content": "x"}]}', 'turn 1 has no "role"'),
        (json.dumps({"messages": [turn("human")]}), 'is "human"; expected one of system, user'),
        (json.dumps({"messages": [turn("user"), turn("assistant", 4)]}), '"content" of turn 2 is a number'),
        (json.dumps({"messages": [turn("user"), turn("assistant"), turn("user")]}), "the last turn is by"),
        (json.dumps({"messages": [turn("assistant")]}), "nothing before it"),
        (json.dumps({"messages": [turn("user"), turn("assistant", "")]}), '"content" of turn 2 is empty'),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path, line, says):
    data = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path, f"{GOOD}\n\n".encode() + data + f"\n{GOOD}".encode())
    with pytest.raises(LoraxError) as caught:
        list(Jsonl(path))
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ")
    assert says in message
    assert "\n" not in message
    assert len(message) < 400 + len(str(path))


@pytest.mark.parametrize("data", [b"", b"\n \n\t\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_a_file_without_examples(tmp_path, data):
    with pytest.raises(LoraxError, match="holds no examples"):
        Jsonl(write(tmp_path, data))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(LoraxError, match="No such file"):
        Jsonl(tmp_path / "missing.jsonl")
    with pytest.raises(LoraxError, match="Is a directory"):
        Jsonl(tmp_path)
    with pytest.raises(LoraxError, match="UTF-16"):
        Jsonl(write(tmp_path, GOOD.encode("utf-16")))


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["prompt", "completion", "messages", "role", "content"]), inner, max_size=3)
    ),
    max_leaves=8,
)
lines = st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode())


@given(lines)
@example(b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}')
def test_any_bytes_are_a_record_or_an_error_with_its_place(line):
    try:
        record = parse_line(line, "f:1")
    except LoraxError as error:
        said = str(error)
    else:
        assert record.completion.strip()
        said = f"{record.source}: a record"
    assert said.startswith("f:1: ")


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
pairs = st.lists(st.tuples(texts, texts.filter(str.strip)), min_size=1, max_size=8)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=pairs, ascii_only=st.booleans())
def test_what_is_written_is_read(tmp_path, pairs, ascii_only):
    rows = [json.dumps({"prompt": p, "completion": c}, ensure_ascii=ascii_only) for p, c in pairs]
    path = write(tmp_path, "\n".join(rows))
    assert [(record.prompt, record.completion) for record in Jsonl(path)] == pairs
