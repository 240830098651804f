"""Reward functions: how they are called, what they may return, and what is said of the rest."""

import decimal
import sys
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax.config import ConfigError, RewardConfig
from halos_jax.data.records.fields import RecordError
from halos_jax.rewards.function_scorer import (
    check_records,
    make_function_scorer,
    make_rules,
    read_number,
)
from halos_jax.rewards.labels import RewardError
from halos_jax.types import FINISH_STOP, Prompt, Sample, Turn
from tests.reward_parts import with_parts

MODULE = """\
import sys

import numpy as np

calls = []


def length(prompt, response): return np.float32(len(response))
def level(prompt, response, record): return record["level"] + 10 * len(prompt)
def asks(prompt, response): return prompt[-1] == {"role": "user", "content": "cab"}
def nothing(prompt, response): return None
def scaled(prompt, response, *, by=1.0): return by * len(response)
def crash(prompt, response): return 1 / 0
def wrong_key(prompt, response, record): return record["solution"]
def leave(prompt, response): sys.exit(0)
def stop(prompt, response): raise KeyboardInterrupt
def listed(prompt, response): return [1.0] * 65
def array(prompt, response): return np.ones(1)
def three(prompt, response, answer): return 1.0
def plural(prompts, responses): return [1.0]
def one(prompt): return 1.0


def give(prompt, response, what): return eval(what)


def batch(prompts, completions, answer, **kwargs):
    calls.append({"prompts": prompts, "completions": completions, "answer": answer, **kwargs})
    return [float(text == right) for text, right in zip(completions, answer)]


def turns(completions: list[list[dict[str, str]]], prompts, level=None):
    calls.append({"completions": completions, "prompts": prompts, "level": level})
    return np.array([len(one[0]["content"]) for one in completions], np.float32)


def unmarked(completions, **kwargs): return [len(one[0]["content"]) for one in completions]
def short(completions, **kwargs): return [1.0]
def single(completions, **kwargs): return 1.0
def some(completions, *, least=0, **kwargs):
    return [None if len(one) < least else True for one in completions]
def named(completions, trainer_state): return [1.0 for _ in completions]
def spread(*args, completions): return [1.0 for _ in completions]
def bad(completions, **kwargs): return [1.0 for _ in completions[1:]] + ["good"]
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    """Make MODULE importable as `grader`, in the current folder; return it as a name."""
    (tmp_path / "grader.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("grader", None)
    yield
    sys.modules.pop("grader", None)


def make_samples(answers=("abc", "b"), extra=({"answer": "b", "level": 1}, {"answer": "x"})):
    return [
        Sample(
            prompt=Prompt(f"p{number}", (Turn("user", text),), fields),
            sample_id=sample_id,
            output=answer,
            prompt_ids=(1,),
            response_ids=(5, 6 + sample_id),
            finish_reason=FINISH_STOP,
        )
        for number, (text, fields) in enumerate(zip(("cab", "dacb"), extra, strict=False))
        for sample_id, answer in enumerate(answers)
    ]


def fail(name, *, error=RewardError, samples=None, **options) -> str:
    with pytest.raises(error) as caught:
        make_function_scorer(f"grader:{name}", **options)(samples or make_samples())
    return str(caught.value)


def test_a_function_gets_turns_text_and_record():
    samples = make_samples(extra=({"level": 1}, {"level": 2}))
    rewards = make_function_scorer("grader:length")(samples)
    assert rewards == [3.0, 1.0, 3.0, 1.0] and all(type(one) is float for one in rewards)
    assert make_function_scorer("grader:level")(samples) == [11.0, 11.0, 12.0, 12.0]
    assert make_function_scorer("grader:asks")(samples) == [1.0, 1.0, 0.0, 0.0]
    assert make_function_scorer("grader:nothing")(samples) == [None] * 4
    assert make_function_scorer("grader:scaled", {"by": 2})(samples) == [6.0, 2.0, 6.0, 2.0]


@pytest.mark.parametrize(
    "value, expected",
    [
        (True, 1.0),
        (np.bool_(True), 1.0),
        (np.False_, 0.0),
        (np.float16(0.5), 0.5),
        (np.int64(-3), -3.0),
        (np.array(2.5), 2.5),
        (jnp.float32(1.5), 1.5),
        (jnp.asarray(0.25, jnp.bfloat16), 0.25),
        (Fraction(1, 4), 0.25),
        (decimal.Decimal("0.5"), 0.5),
        (3.4e38, 3.4e38),
        (1e39, None),
        (-1e39, None),
        (10**400, None),
        (float("nan"), None),
        (float("-inf"), None),
        (np.float16("inf"), None),
        (1 + 0j, None),
        (np.complex64(1), None),
        ("1", None),
        (np.str_("1"), None),
        (np.datetime64("2020-01-01"), None),
        (np.ones(1), None),
        ([1.0], None),
        ({"score": 1}, None),
        (b"1", None),
    ],
)
def test_what_is_a_number(value, expected):
    found = read_number(value)
    assert found == expected and (found is None or type(found) is float)


def test_scalars_of_pytorch_are_numbers():
    torch = pytest.importorskip("torch")
    assert read_number(torch.tensor(0.5)) == 0.5 and read_number(torch.tensor(True)) == 1.0
    assert read_number(torch.tensor([0.5])) is None


@pytest.mark.parametrize(
    "what, shown",
    [
        ("float('nan')", "got nan"),
        ("1e39", "got 1e+39"),
        ("1j", "got 1j"),
        ("'good'", "got 'good'"),
        ("{'score': 1}", "got {'score': 1}"),
        ("(1.0, 'x')", "got a tuple of 2 values"),
    ],
)
def test_what_is_no_number_is_refused_with_its_sample(what, shown):
    message = fail("give", arguments={"what": what})
    assert message.startswith(f"reward.function 'grader:give': {shown} for prompt p0, sample 0; ")
    assert "a finite number of at most 3.4e38" in message and "None" in message


def test_between_two_calls_it_may_be_stopped():
    asked = []

    def check():
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt

    arguments = {"target": 3}
    scorer = make_function_scorer("halos_jax.rewards.functions:length", arguments, check=check)
    with pytest.raises(KeyboardInterrupt):
        scorer(make_samples())
    assert len(asked) == 2


def test_a_list_or_an_array_says_how_functions_are_called():
    message = fail("listed")
    assert "got a list of 65 numbers for prompt p0, sample 0" in message
    assert "it is called as f(prompt turns, response text)" in message
    assert "a parameter 'completions', once a batch as in TRL" in message
    assert "got an array of shape (1,)" in fail("array")


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "crash",
            "reward.function 'grader:crash' raised ZeroDivisionError: division by zero at "
            "grader.py:13, for prompt p0, sample 0; return None for 'no reward'",
        ),
        (
            "wrong_key",
            "reward.function 'grader:wrong_key' raised KeyError: 'solution' at grader.py:14, for "
            "prompt p0, sample 0; return None for 'no reward'; the record has answer, level",
        ),
        (
            "leave",
            "reward.function 'grader:leave' called sys.exit(0) at grader.py:15, for prompt p0, "
            "sample 0; return None for 'no reward'",
        ),
        (
            "unmarked",
            "reward.function 'grader:unmarked' raised TypeError: string indices must be integers, "
            "not 'str' at grader.py:37, for a batch of 4 completions; return None for 'no reward'; "
            "its completions are text (reward.completions=text or turns)",
        ),
    ],
)
def test_what_a_function_raises_is_one_message(name, expected):
    assert fail(name) == expected


def test_a_stop_in_a_function_stays_a_stop():
    with pytest.raises(KeyboardInterrupt):
        make_function_scorer("grader:stop")(make_samples())


@pytest.mark.parametrize(
    "name, shown",
    [("three", "(prompt, response, answer)"), ("plural", None), ("one", "(prompt)")],
)
def test_other_signatures_are_refused_before_anything_runs(name, shown):
    if shown is None:  # nothing tells it from one of ours but what it returns
        assert "a list of 1 numbers" in fail(name) and "'completions'" in fail(name)
        return
    with pytest.raises(ConfigError) as caught:
        make_function_scorer(f"grader:{name}")
    message = str(caught.value)
    assert f"whose parameters are {shown}" in message and "a parameter 'completions'" in message


def test_a_batch_gets_lists_and_every_field_by_name():
    samples = make_samples()
    assert make_function_scorer("grader:batch")(samples) == [0.0, 1.0, 0.0, 0.0]
    (call,) = sys.modules["grader"].calls
    assert call == {
        "prompts": ["cab", "cab", "dacb", "dacb"],
        "completions": ["abc", "b", "abc", "b"],
        "completion_ids": [[5, 6], [5, 7], [5, 6], [5, 7]],
        "answer": ["b", "b", "x", "x"],
        "level": [1, 1, None, None],
    }


@pytest.mark.parametrize("form", ["auto", "turns"])
def test_a_batch_gets_turns_where_its_annotation_or_the_config_says_so(form):
    name = "turns" if form == "auto" else "unmarked"
    rewards = make_function_scorer(f"grader:{name}", form=form)(make_samples())
    assert rewards == [3.0, 1.0, 3.0, 1.0] and type(rewards[0]) is float
    if form == "auto":
        (call,) = sys.modules["grader"].calls
        assert call["completions"][1] == [{"role": "assistant", "content": "b"}]
        assert call["prompts"][3] == [{"role": "user", "content": "dacb"}]
        assert call["level"] == [1, 1, None, None] and len(call) == 3


def test_a_batch_takes_arguments_and_may_leave_out_rewards():
    score = make_function_scorer("grader:some", {"least": 2})
    assert score(make_samples()) == [1.0, None, 1.0, None] and score([]) == []


@pytest.mark.parametrize(
    "name, expected",
    [
        ("short", "got a list of 1 numbers for a batch of 4 completions; allowed: a list of as"),
        ("single", "got 1.0 for a batch of 4 completions; allowed: a list of as many numbers"),
        ("bad", "got 'good' for prompt p1, sample 1; allowed: a finite number"),
        ("named", "its parameters trainer_state need fields of the records, which have answer, le"),
    ],
)
def test_a_batch_of_something_else(name, expected):
    assert expected in fail(name)


def test_a_field_with_the_name_of_a_list_of_the_batch():
    samples = make_samples(extra=({"prompts": "x"},))
    assert "the records have the fields prompts, and so has the call" in fail(
        "short", samples=samples
    )


@pytest.mark.parametrize(
    "name, arguments, expected",
    [
        ("spread", {}, "whose parameters args have no name"),
        ("turns", {"least": 1}, r"got {'least': 1}, which 'grader:turns' does not take"),
        ("short", {"completions": 1}, "does not take"),
        ("scaled", {"to": 1}, r"got {'to': 1}, which 'grader:scaled' does not take"),
    ],
)
def test_arguments_that_are_not_taken(name, arguments, expected):
    with pytest.raises(ConfigError) as caught:
        make_function_scorer(f"grader:{name}", arguments)
    assert expected in str(caught.value)


@pytest.mark.parametrize("in_parts", [False, True])
def test_what_the_records_lack_is_found_before_anything_is_sampled(in_parts):
    def make(name):
        single = {"kind": "function", "function": name}
        parts = {"right": single, "own": {"kind": "function", "function": "grader:crash"}}
        return with_parts(RewardConfig(), parts) if in_parts else RewardConfig(**single)

    asked = [
        Prompt("p", (Turn("user", "1+1?"),), {"answer": "2"}),
        Prompt("q", (Turn("user", "2?"),)),
    ]
    ready = "halos_jax.rewards.functions:numeric_answer"
    check_records(make(ready), asked[:1])
    with pytest.raises(RewardError, match=r"prompt q \('2\?'\): field 'answer': got nothing"):
        check_records(make(ready), asked)
    check_records(make("grader:batch"), asked)
    with pytest.raises(RewardError, match=r"parameters answer need .* have no further ones"):
        check_records(make("grader:batch"), asked[1:])
    check_records(RewardConfig(path="model"), asked)
    with pytest.raises(RewardError, match=r"^reward\.rules 'grader:batch': its parameters answer"):
        check_records(RewardConfig(path="model", rules=("grader:batch",)), asked[1:])


def test_records_without_a_reference_answer_can_be_left_out(caplog):
    ready = "halos_jax.rewards.functions:numeric_answer"
    reward = RewardConfig(kind="function", function=ready)
    good = Prompt("p", (Turn("user", "1+1?"),), {"answer": "2"})
    bad = Prompt("q", (Turn("user", "2?"),), place="f line 2")
    with pytest.raises(RewardError, match=r"^f line 2: reward\.function .*: prompt q .*'answer'"):
        check_records(reward, [good, bad])
    assert check_records(reward, [good, bad], skip=True) == [good]
    assert "1 bad records are left out (data.skip_bad), 1 are left; the first: f line 2" in (
        caplog.text
    )
    with pytest.raises(RecordError, match="leaves out all of its 1 records; the first: f line 2"):
        check_records(reward, [bad], skip=True)


def test_rules_are_named_by_their_functions():
    rules = make_rules(RewardConfig(rules=("grader:length", "grader:some")))
    assert list(rules) == ["length", "some"]
    assert rules["length"](make_samples()) == [3.0, 1.0, 3.0, 1.0]
    with pytest.raises(ConfigError, match=r"^reward\.rules: got 'grader:absent'"):
        make_rules(RewardConfig(rules=("grader:absent",)))


def test_before_a_batch_it_may_be_stopped_too():
    def check():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_function_scorer("grader:batch", check=check)(make_samples())
