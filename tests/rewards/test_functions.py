"""The ready reward functions, on cases worked out by hand."""

import pytest

from halos_jax.config import ConfigError
from halos_jax.rewards import functions
from halos_jax.rewards.function_scorer import make_function_scorer
from halos_jax.rewards.functions import ReferenceAnswerError
from halos_jax.rewards.labels import RewardError
from halos_jax.types import FINISH_STOP, Prompt, Sample, Turn

NAMES = "halos_jax.rewards.functions"


@pytest.mark.parametrize(
    ("response", "answer", "options", "expected"),
    [
        (" Paris\n", "Paris", {}, 1),
        ("paris", "Paris", {}, 0),
        ("paris", "Paris", {"ignore_case": True}, 1),
        ("Paris.", "Paris", {}, 0),
        ("Rome", ["Paris", "Rome "], {}, 1),
        ("So, answer: x. Answer: Rome", "Rome", {"after": "Answer:"}, 1),
        ("Rome", "Rome", {"after": "Answer:"}, 0),
    ],
)
def test_exact_answer(response, answer, options, expected):
    assert functions.exact_answer([], response, {"answer": answer}, **options) == expected


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("She pays 3 * $411.50 = $1,234.50", "#### 1234.5", 1),
        ("The answer is 7.", "7", 1),
        ("The answer is 7.", 7, 1),
        ("The answer is 8, not 7.", "7", 0),
        ("It is half: 1/2", 0.5, 1),
        (r"\boxed{\frac{1}{2}}", "1/2", 1),
        ("-3", "-3", 1),
        ("3", "-3", 0),
        ("42 apples\n#### 42", "2 * 21 = 42\n#### 42", 1),
        ("0.3333333", "1/3", 1),
        ("0.333", "1/3", 0),
        ("1000000.4", "1000000", 1),  # relative to the reference
        ("no idea", "7", 0),
    ],
)
def test_numeric_answer(response, answer, expected):
    assert functions.numeric_answer([], response, {"answer": answer}) == expected


def test_numbers_beyond_a_float():
    huge = {"answer": "1" + "0" * 400}
    assert functions.numeric_answer([], "1" + "0" * 400, huge) == 1
    assert functions.numeric_answer([], "5", huge) == 0


def test_where_the_reference_stands():
    record = {"meta": {"gold": "5"}, "solution": "6"}
    assert functions.numeric_answer([], "5", record, field="meta.gold") == 1
    assert functions.exact_answer([], "6", record, field="solution") == 1
    with pytest.raises(ReferenceAnswerError, match=r"'answer': got nothing, .* 'meta', 'solution'"):
        functions.numeric_answer([], "5", record)
    with pytest.raises(ReferenceAnswerError, match=r"got '5 or 6', allowed: a number, or text"):
        functions.numeric_answer([], "5", {"answer": "5 or 6"})
    with pytest.raises(ReferenceAnswerError, match=r"got \[5\], allowed: a string or a list"):
        functions.exact_answer([], "5", {"answer": 5})


def test_a_bad_reference_names_its_record():
    prompt = Prompt("p7", (Turn("user", "how many?"),), {"answer": "some"})
    samples = [Sample(prompt, 2, "5", (1,), (2,), FINISH_STOP)]
    with pytest.raises(RewardError, match=r"prompt p7, sample 2: field 'answer': got 'some'"):
        make_function_scorer(f"{NAMES}:numeric_answer")(samples)


@pytest.mark.parametrize(
    ("response", "options", "expected"),
    [
        ("abcde", {"target": 10}, -0.5),
        ("abcde", {"target": 4}, -0.25),
        ("abcde", {"limit": 5}, 0),
        ("abcdef", {"limit": 4}, -0.5),
        ("abcdef", {"limit": 4, "target": 3}, -1.5),
        ("one two  three\n", {"target": 4, "unit": "words"}, -0.25),
        ("", {"target": 4}, -1),
    ],
)
def test_length(response, options, expected):
    assert functions.length([], response, **options) == expected


@pytest.mark.parametrize(
    ("response", "options", "expected"),
    [
        ("well, yes", {"pattern": "yes"}, 1),
        ("well, Yes", {"pattern": "yes"}, 0),
        ("well,\nYes", {"pattern": "(?i)yes$"}, 1),
        ("well, yes", {"pattern": "yes", "whole": True}, 0),
        ("12", {"pattern": r"\d+", "whole": True}, 1),
    ],
)
def test_regular_expression(response, options, expected):
    assert functions.regular_expression([], response, **options) == expected


@pytest.mark.parametrize(
    ("response", "options", "expected"),
    [
        ('{"a": [1, null]}', {}, 1),
        ("3", {}, 1),
        ("{'a': 1}", {}, 0),
        ('{"a": NaN}', {}, 0),
        ('{"a": 1,}', {}, 0),
        ('{"a": 1} and more', {}, 0),
        ("", {}, 0),
        ("[" * 100_000, {}, 0),
        ('```json\n{"a": 1}\n```', {}, 1),
        ('```\n{"a": 1}\n```', {"fenced": False}, 0),
        ('Here:\n```\n{"a": 1}\n```', {}, 0),
        ('{"a": 1}', {"keys": ("a",)}, 1),
        ('{"a": 1}', {"keys": ("a", "b")}, 0),
        ('["a"]', {"keys": ("a",)}, 0),
        ('{"a": 1}', {"keys": {"a": "integer"}}, 1),
        ('{"a": 1.0}', {"keys": {"a": "integer"}}, 1),  # as JSON Schema has it
        ('{"a": 1.5}', {"keys": {"a": "integer"}}, 0),
        ('{"a": true}', {"keys": {"a": "number"}}, 0),
        ('{"a": true}', {"keys": {"a": "boolean"}}, 1),
        ('{"a": null, "b": {}}', {"keys": {"a": "null", "b": "object"}}, 1),
        ('{"a": "x"}', {"keys": {"a": "any"}}, 1),
    ],
)
def test_valid_json(response, options, expected):
    assert functions.valid_json([], response, **options) == expected


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("length", {}, r"reward\.arguments\.target: got 0, and so is limit"),
        ("length", {"target": -1}, r"reward\.arguments\.target: got -1, allowed: an integer of 0"),
        ("length", {"target": 1, "unit": "lines"}, r"unit: got 'lines', allowed: 'characters'"),
        ("length", {"goal": 1}, r"reward\.arguments: got {'goal': 1}, which .* does not take"),
        ("regular_expression", {}, r"missing a required .*: 'pattern'"),
        ("regular_expression", {"pattern": "("}, r"pattern: got '\(', allowed: a regular expr"),
        ("valid_json", {"keys": {"a": "int"}}, r"keys\.a: got 'int', allowed: string, integer,"),
        ("valid_json", {"keys": 3}, r"keys: got 3, allowed: a list of strings, or a mapping"),
        ("numeric_answer", {"tolerance": "x"}, r"tolerance: got 'x', allowed: a number of 0"),
    ],
)
def test_bad_arguments_are_found_at_the_start(name, arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_function_scorer(f"{NAMES}:{name}", arguments)
