"""What the config adds to records: each edit by its values, and one message for what cannot be."""

import sys

import numpy as np
import pytest

from halos_jax.config import ConfigError, DataConfig
from halos_jax.data.records.edits import (
    add_system,
    change_record,
    fill_template,
    make_edits,
    merge_turns,
)
from halos_jax.data.records.fields import NO_EDITS, Edits, Fields, RecordError
from halos_jax.data.records.turns import find_context, pack
from halos_jax.types import Turn


def fields_of(record, **edits):
    return Fields(record, "f", 3, Edits(**edits))


def make(*turns):
    return tuple(Turn(*turn.split(":")) for turn in turns)


@pytest.fixture
def module(tmp_path, monkeypatch):
    def write(code):
        (tmp_path / "my_data.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        sys.modules.pop("my_data", None)

    yield write
    sys.modules.pop("my_data", None)


def test_the_config_is_read():
    assert make_edits(DataConfig()) == NO_EDITS
    data = DataConfig(
        fields="prompt=q",
        prompt_template="Say {q}",
        system_prompt="s",
        merge_turns=True,
        skip_bad=True,
        ignore_fields="id, meta",
    )
    assert make_edits(data) == Edits(
        {"prompt": "q"}, None, (("Say ", "q"),), "s", True, True, frozenset({"id", "meta"})
    )
    with pytest.raises(ConfigError, match=r"data\.map: got 'no_such:f'"):
        make_edits(DataConfig(map="no_such:f"))


def test_a_function_changes_records_or_leaves_them_out(module):
    module(
        "import numpy as np\n"
        "def change(record):\n"
        "    if record['n'] == 2:\n"
        "        return None\n"
        "    n = np.int64(record['n'])\n"
        "    return {'prompt': record['q'] + '!', 'n': n, 'l': (1, np.ones(2))}\n"
    )
    edits = make_edits(DataConfig(map="my_data:change"))
    record = {"q": "a", "n": 1}
    changed = change_record(Fields(record, "f", 1, edits))
    assert changed.record == {"prompt": "a!", "n": 1, "l": [1, [1.0, 1.0]]}
    assert type(changed.record["n"]) is int and record == {"q": "a", "n": 1}
    assert (changed.file, changed.line) == ("f", 1)
    assert change_record(Fields({"q": "a", "n": 2}, "f", 2, edits)) is None
    assert change_record(fields_of({"a": 1})).record == {"a": 1}
    with pytest.raises(
        RecordError,
        match=r"^f line 4: data\.map 'my_data:change' raised KeyError: 'n' at .*my_data\.py:3; it",
    ):
        change_record(Fields({"q": "a"}, "f", 4, edits))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (3, "got a value of type int, allowed: a record"),
        ({"a": float("nan")}, "what data.map returned: field 'a': got nan, allowed: a finite"),
        ({"a": {"b": b"x"}}, "field 'a.b': got 'bytes'"),
        ({1: 2}, "got 1, allowed: names that are text"),
        ({"a": np.array([np.inf])}, r"field 'a\[0\]': got inf"),
    ],
)
def test_what_a_function_returns_is_checked(result, message):
    with pytest.raises(RecordError, match=f"^f line 3: .*{message}"):
        change_record(fields_of({}, change=lambda record: result))


def test_a_template_is_filled_from_the_fields():
    template = (("Solve ", "question"), (" in ", "meta.level"), (" steps", ""))
    fields = fields_of({"question": "1+1", "meta": {"level": 2}, "x": 1}, template=template)
    assert fill_template(fields) == "Solve 1+1 in 2 steps"
    assert fields.unread() == {"x"}
    with pytest.raises(RecordError, match=r"line 3: field 'question': got nothing, allowed: text"):
        fill_template(fields_of({}, template=template))
    with pytest.raises(RecordError, match=r"field 'question': got \['a'\]"):
        fill_template(fields_of({"question": ["a"]}, template=template))


def test_a_system_prompt_stands_first_where_there_is_none():
    user = make("user:q")
    assert add_system(fields_of({}, system="s"), user) == make("system:s", "user:q")
    assert add_system(fields_of({"system": "own"}, system="s"), user)[0].content == "own"
    assert add_system(fields_of({"system_prompt": "own"}), user)[0].content == "own"
    assert add_system(fields_of({"system": ""}, system="s"), user)[0].content == "s"
    assert add_system(fields_of({"system": "own"}, ignored={"system"}), user) == user
    spoken = make("system:own", "user:q")
    assert add_system(fields_of({"system": "own"}, system="s"), spoken) == spoken
    with pytest.raises(
        RecordError, match="field 'system': got 'other', allowed: one system prompt"
    ):
        add_system(fields_of({"system": "other"}), spoken)
    with pytest.raises(RecordError, match="field 'system_prompt': got 'b', allowed: one system"):
        add_system(fields_of({"system": "a", "system_prompt": "b"}), user)
    with pytest.raises(RecordError, match="field 'system': got 3, allowed: a string"):
        add_system(fields_of({"system": 3}), user)


def test_turns_are_joined_where_asked_for():
    turns = make("system:s", "user:a", "user:b", "assistant:c", "assistant:d", "system:t", "user:e")
    assert merge_turns(fields_of({}), turns) == turns
    assert merge_turns(fields_of({}, merge=True), turns) == (
        Turn("user", "s\n\na\n\nb"),
        Turn("assistant", "c\n\nd"),
        Turn("user", "t\n\ne"),
    )
    with pytest.raises(RecordError, match="f line 3: got a system turn that no turn of the user"):
        merge_turns(fields_of({}, merge=True), make("user:a", "system:s"))


def test_what_cannot_be_joined_stays():
    call = Turn("assistant", "", pack({"tool_calls": [{"function": {"name": "f"}}]}))
    unlearned = Turn("assistant", "b", learned=False)
    turns = (*make("user:a"), call, *make("tool:1", "tool:2"), unlearned, *make("assistant:c"))
    assert merge_turns(fields_of({}, merge=True), turns) == turns
    tools = Turn("system", "s", pack({"tools": [{"name": "f"}]}))
    joined = merge_turns(fields_of({}, merge=True), (tools, *make("user:a")))
    assert [turn.content for turn in joined] == ["s\n\na"]
    assert find_context(joined) == {"tools": [{"name": "f"}]}


def test_a_record_inside_of_itself_and_a_class_of_arrays_are_named():
    circle: dict = {}
    circle["inner"] = circle
    for result, message in ((circle, "that contain themselves"), ({"x": np.float32}, "'x'")):
        with pytest.raises(RecordError, match=f"^f line 3: what data.map returned: .*{message}"):
            change_record(fields_of({"prompt": "q"}, change=lambda _, found=result: found))
