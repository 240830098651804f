"""The final number of a text, on cases worked out by hand."""

from fractions import Fraction

import pytest

from halos_jax.rewards.numbers import find_answer, list_numbers, read_reference_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$1,234.50", "1234.5"),
        ("-3", "-3"),
        ("\u22123", "-3"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("(-4)", "-4"),
        ("x = -5", "-5"),
        ("between 3-5", "5"),
        ("5 - 3", "3"),
        ("1/2", "1/2"),
        ("1 1/2 cups", "3/2"),
        ("-.5", "-1/2"),
        ("50%", "50"),
        ("5kg", "5"),
        ("3.5e3 m", "3500"),
        ("10,000,000.", "10000000"),
        ("we have 1,23", "23"),  # no thousands' comma
        ("H2O", None),
        ("v1.2.3", None),
        ("1/0", None),
        ("no number", None),
        ("", None),
        ("9" * 5000, None),  # more than Python reads
        ("The answer is 7.", "7"),
        ("The answer is 7, not 8. That took 3 steps", "7"),
        ("Answer: **7** (and not 8)", "7"),
        ("The final answer is: $7 for 2", "7"),
        ("The answer is 3 + 4 = 7. Check 9", "7"),
        ("The answer is half of 14, 7. Check 9", "7"),
        ("The answer is 1.\nNo, the answer is 2. Right, 5 of 5.", "2"),
        ("So 3 * 4 = 12 apples", "12"),
        ("- 42", "42"),  # an item of a list
        ("12 - 5 = 7\n#### 7\nDone in 3 steps", "7"),
        ("#### -1,000 dollars", "-1000"),
        ("#### $5\n#### 6", "6"),
        ("#### Step 1\nAdd.\n#### 2. Result\nThe answer is 9", "9"),
        (r"so \boxed{7}, not 8", "7"),
        (r"\boxed{\frac{1}{2}} #### 3", "1/2"),
        (r"\boxed{-\dfrac{3}{4}}", "-3/4"),
        (r"\boxed{\text{12 km}}", "12"),
        (r"\boxed{1{,}234}", "1234"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{x} and 7", None),  # it says itself what the answer is
        (r"\boxed{7", "7"),
        (r"it costs \$3.50", "3.5"),
    ],
)
def test_the_final_number(text, expected):
    assert find_answer(text) == (None if expected is None else Fraction(expected))


def test_all_numbers_in_order():
    assert list_numbers("$5 - $3 = $2, 1/2 of 4") == [5, 3, 2, Fraction(1, 2), 4]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (42, 42),
        (-0.5, Fraction(-1, 2)),
        ("42", 42),
        ("2 + 3 = 5, and 5 * 2 = 10\n#### 10", 10),
        ("3 apples", 3),
        (r"first 1, then \boxed{2}", 2),
        ("5 or 6", None),
        ("none", None),
        (True, None),
        (float("nan"), None),
        (float("inf"), None),
        ([42], None),
        (None, None),
    ],
)
def test_a_reference_must_be_clear(value, expected):
    assert read_reference_answer(value) == expected


def test_long_texts_take_no_time():
    text = (
        "1," * 20_000 + "#### " * 2_000 + "answer is " * 2_000 + "\\boxed{" * 2_000 + "1 " * 20_000
    )
    assert find_answer(text) == 1
    assert find_answer("7\\frac{" + " " * 3_000) == 7  # minutes, where a pattern strips spaces


def test_spaces_inside_of_a_fraction():
    assert list_numbers(r"\frac{ 1 }{ 2 } \dfrac { 3 } 4") == [Fraction(1, 2), Fraction(3, 4)]
