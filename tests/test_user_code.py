"""The user's own code: found, or said why not; what it raises is one message with its line."""

import sys

import pytest

from halos_jax.config import ConfigError
from halos_jax.errors import UserError
from halos_jax.user_code import (
    UserCodeError,
    describe_raised,
    explain_errors,
    import_function,
)

MODULE = """\
import json
import sys

LIMIT = 3
wrapped = [len]


def score(prompt, response):
    return 1 / 0


def parse(prompt, response):
    return json.loads(response)


def leave(prompt, response):
    sys.exit(0)


def many_lines(prompt, response):
    raise ValueError("one\\n  two\\n" + 1000 * "x")


async def later(prompt, response):
    return 1.0


def several(prompt, response):
    yield 1.0


class Rewards:
    @staticmethod
    def short(prompt, response):
        return 0.5


class Mute(Exception):
    def __str__(self):
        raise RuntimeError


def mute(prompt, response):
    raise Mute
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder on the Python path, which is the current one too, with my_rewards.py."""
    (tmp_path / "my_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_functions_are_found_by_name(folder):
    assert import_function("my_rewards:score", "reward.function").__name__ == "score"
    assert import_function("my_rewards:Rewards.short", "x")(None, None) == 0.5


@pytest.mark.parametrize(
    "name, expected",
    [
        ("my_rewards:scor", "module 'my_rewards' has no 'scor'); allowed: 'package.module:function'"
         "; did you mean 'score'?"),
        ("my_rewards:zzz", "it has score, parse, leave, many_lines"),
        ("my_rewards:LIMIT", "is no function but a value of type int"),
        ("my_rewards:later", "is an async function"),
        ("my_rewards:several", "is a generator"),
        ("builtins:print_", "module 'builtins' has no 'print_'"),
        ("builtins:max", "whose parameters Python does not know"),
        ("my_rewards", "did you mean 'my_rewards:FUNCTION'?"),
        ("my_rewards.score", "did you mean 'my_rewards:score'?"),
        (":score", "did you mean 'MODULE:score'?"),
        ("my_rewards:", "did you mean 'my_rewards:FUNCTION'?"),
        ("rewards/mine.py:score", "set PYTHONPATH=rewards and --config.reward.function=mine:score"),
        ("mine.py:score", "set PYTHONPATH=. and --config.reward.function=mine:score"),
        ("mine.py", "set PYTHONPATH=. and --config.reward.function=mine:FUNCTION"),
        ("absent_module:score", "there is no module 'absent_module' in "),
        ("absent.module:score", "there is no module 'absent' in "),
        ("my_rewards.inner:score", "there is no module 'my_rewards.inner' in "),
    ],
)  # fmt: skip
def test_a_name_that_is_none_says_what_to_write(folder, name, expected):
    with pytest.raises(ConfigError) as caught:
        import_function(name, "reward.function")
    message = str(caught.value)
    assert message.startswith(f"reward.function: got {name!r}, ") and expected in message


@pytest.mark.parametrize(
    "text, expected",
    [
        ("import os\nimport numpyy\n", "raised ModuleNotFoundError: No module named 'numpyy' at "
         "broken.py:2"),
        ("x = 1\ndef f(:\n", "raised SyntaxError: invalid syntax at broken.py:2"),
        ("import sys\nsys.exit('not here')\n", "called sys.exit('not here') at broken.py:2"),
        ("x = {}\n\n\ny = x['a']\n", "raised KeyError: 'a' at broken.py:4"),
    ],
)  # fmt: skip
def test_an_import_that_fails_names_the_line(folder, text, expected):
    (folder / "broken.py").write_text(text)
    with pytest.raises(ConfigError) as caught:
        import_function("broken:f", "data.map")
    message = str(caught.value)
    assert message.startswith("data.map: got 'broken:f', which cannot be imported (its import ")
    assert expected in message


@pytest.mark.parametrize(
    "name, expected",
    [
        ("score", "raised ZeroDivisionError: division by zero at my_rewards.py:9"),
        ("parse", "raised JSONDecodeError: Expecting value: line 1 column 1 (char 0) at "
         "my_rewards.py:13"),
        ("leave", "called sys.exit(0) at my_rewards.py:17"),
        ("mute", "raised Mute: (its message cannot be shown) at my_rewards.py:44"),
    ],
)  # fmt: skip
def test_what_is_raised_is_one_line_with_the_users_own_line(folder, name, expected):
    function = import_function(f"my_rewards:{name}", "reward.function")
    with (
        pytest.raises(UserCodeError) as caught,
        explain_errors("reward.function 'f'", "prompt a, sample 0", advice="return None"),
    ):
        function([], "no JSON")
    assert str(caught.value) == (
        f"reward.function 'f' {expected}, for prompt a, sample 0; return None"
    )


def test_a_long_message_is_cut_to_one_line(folder):
    function = import_function("my_rewards:many_lines", "x")
    with pytest.raises(UserCodeError) as caught, explain_errors("x"):
        function([], "")
    message = str(caught.value)
    assert message.startswith("x raised ValueError: one two xxx") and "\n" not in message
    assert message.endswith("x... at my_rewards.py:21") and len(message) < 600


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), UserError("mine")])
def test_a_stop_and_what_is_explained_already_pass(raised):
    with pytest.raises(type(raised)) as caught, explain_errors("x"):
        raise raised
    assert caught.value is raised


def test_the_kind_of_the_error_is_the_callers():
    class RewardError(UserError):
        pass

    place = r"^x raised StopIteration at .*test_user_code"
    with pytest.raises(RewardError, match=place), explain_errors("x", error=RewardError):
        raise StopIteration


def test_an_error_without_a_trace_has_no_line():
    assert describe_raised(ValueError("a")) == "raised ValueError: a"
    assert describe_raised(SystemExit()) == "called sys.exit()"
