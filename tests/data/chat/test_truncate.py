"""What is dropped first where a conversation is too long."""

import pytest

from halos_jax.config import ConfigError
from halos_jax.data.chat.truncate import drop_oldest, truncate_turns
from halos_jax.data.records.turns import find_context, pack
from halos_jax.types import Turn

TOOLS = [{"name": "f"}]


def make(*turns):
    return tuple(Turn(*turn.split(":")) for turn in turns)


def truncate(turns, length):
    return truncate_turns(
        turns,
        length,
        measure=lambda some: sum(1 + len(turn.content) for turn in some),
        find_starts=lambda text: list(range(len(text))),
    )


def test_oldest_exchanges_go_before_system_turns():
    turns = make("system:s", "user:a", "assistant:b", "tool:c", "user:d", "assistant:e", "user:f")
    one = drop_oldest(turns)
    assert one == make("system:s", "user:d", "assistant:e", "user:f")
    assert drop_oldest(one) == make("system:s", "user:f")
    assert drop_oldest(make("system:s", "user:f")) == make("user:f")
    assert drop_oldest(make("user:f")) == make("user:f")


def test_a_tool_s_answer_keeps_its_question():
    turns = make("user:a", "assistant:b", "user:c", "assistant:d", "tool:e", "tool:f")
    question = make("user:c", "assistant:d", "tool:e", "tool:f")
    assert drop_oldest(turns) == question == drop_oldest(question)


def test_tools_stay_when_the_turn_that_brought_them_goes():
    first = Turn("user", "a", pack({"name": "x", "tools": TOOLS}))
    kept = drop_oldest((first, *make("assistant:b", "user:c")))
    assert kept == (Turn("user", "c", pack({"tools": TOOLS})),)
    assert find_context(kept) == {"tools": TOOLS}
    system = (Turn("system", "s", pack({"tools": TOOLS})), *make("user:c"))
    assert drop_oldest(system) == kept


def test_the_last_turn_is_cut_at_its_beginning_then_those_before_it():
    assert truncate(make("system:s", "user:abcdef"), 100) == make("system:s", "user:abcdef")
    assert truncate(make("system:s", "user:abcdef"), 5) == make("user:cdef")
    tool = make("user:abcd", "assistant:", "tool:efgh")
    assert truncate(tool, 9) == make("user:abcd", "assistant:", "tool:gh")
    assert truncate(tool, 5) == make("user:cd", "assistant:", "tool:")
    with pytest.raises(ConfigError, match="got 2, but a prompt without any content has 3 tokens"):
        truncate(tool, 2)
