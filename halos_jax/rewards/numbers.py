"""The number that a text gives as its answer, as an exact fraction."""

import re
from fractions import Fraction

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{{1,3}}(?![\w.]))?"
# A sign belongs to the number if nothing before it could be the left side of a sum or difference.
_SIGN = r"(?:(?<![\w.)\]}])(?<![\d)\]}]\s)[-+])?"
_NUMBER = re.compile(
    rf"(?<![A-Za-z\d.])(?P<sign>{_SIGN})(?:[$€£¥]\s?)?(?P<inner>(?<=[$€£¥])-)?"
    rf"(?:(?P<whole>\d+)\s+(?=\d+/\d))?(?P<top>{_DECIMAL})(?:\s?/\s?(?P<bottom>{_DECIMAL}))?"
)
_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]+)\}|(\d))\s*(?:\{([^{}]+)\}|(\d))")
_ANSWER = re.compile(r"\banswer\b\W{0,8}?(?:\bis\b|[:=])", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|\n")
_OPERATOR = re.compile(r"\s*(?:[-+/=^×·÷]|\*(?!\*)|\\times|\\cdot|\\div)")
_HEADING = re.compile(r"[.):]\s*[A-Za-z]")


def find_answer(text: str) -> Fraction | None:
    r"""Return the number that `text` gives as its answer, or None if it has no number.

    That is the number in the last `\boxed{}`, else after the last "####", else after the last
    "answer is" or "answer:", else the last one of all.
    """
    marked = _find_marked(text)
    if marked is not None:
        return _last_number(marked)
    found = None
    for found in _ANSWER.finditer(text):  # noqa: B007 (the last one is wanted)
        pass
    if found is not None:
        stated = _find_stated(text[found.end() :])
        if stated is not None:
            return stated
    return _last_number(text)


def read_reference_answer(value: object) -> Fraction | None:
    """Return the number in a reference answer, or None if it has none or more than one.

    It is a number, or text with one number after a marker or one number in all.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if not isinstance(value, str):
        return Fraction(repr(value)) if abs(value) < float("inf") else None
    marked = _find_marked(value)
    numbers = list_numbers(value if marked is None else marked)
    return numbers[0] if len(numbers) == 1 else None


def list_numbers(text: str) -> list[Fraction]:
    r"""Return all numbers in `text`, in order.

    $1,234.50 is 1234.5, 1 1/2 and \frac{3}{2} are 3/2, 50% is 50; digits inside a word such as H2O
    are not a number, nor is a division by zero.
    """
    numbers = (_read_number(match) for match in _NUMBER.finditer(_clean(text)))
    return [number for number in numbers if number is not None]


def _last_number(text: str) -> Fraction | None:
    numbers = list_numbers(text)
    return numbers[-1] if numbers else None


def _find_marked(text: str) -> str | None:
    """Return the contents of the last `\\boxed{}`, else the line after the last "####"."""
    _, boxed, rest = text.rpartition("\\boxed{")
    if boxed:
        depth = 1
        for index, character in enumerate(rest):
            depth += (character == "{") - (character == "}")
            if not depth:
                return rest[:index]
    for line in reversed(text.split("####")[1:]):
        line = _clean(line.strip().partition("\n")[0])
        number = _NUMBER.search(line)
        # "####" also begins a Markdown heading: "#### Step 2", "#### 3. Result".
        if number and not (
            re.search(r"\w", line[: number.start()]) or _HEADING.match(line, number.end())
        ):
            return line
    return None


def _find_stated(rest: str) -> Fraction | None:
    """Return the number of a sentence that begins after "the answer is"."""
    rest = _clean(rest).lstrip()
    end = _SENTENCE_END.search(rest)
    sentence = rest[: end.start()] if end else rest
    first = _NUMBER.search(sentence)
    if first is None:
        return None
    # "7 apples, not 8" states the first number, "3 + 4 = 7" and "half of 14, 7" the last.
    stated = not re.search(r"\w", sentence[: first.start()])
    direct = stated and not _OPERATOR.match(sentence, first.end())
    return _read_number(first) if direct else _last_number(sentence)


def _clean(text: str) -> str:
    text = text.replace("\u2212", "-").replace("{,}", ",").replace("\\,", "").replace("\\$", "$")
    # Strip here: a pattern that does it takes cubic time on "\frac{" and a thousand spaces.
    return _FRACTION.sub(lambda m: f"{(m[1] or m[2]).strip()}/{(m[3] or m[4]).strip()}", text)


def _read_number(match: re.Match[str]) -> Fraction | None:
    try:
        whole, top, bottom = (
            Fraction((match[name] or default).replace(",", ""))
            for name, default in (("whole", "0"), ("top", "1"), ("bottom", "1"))
        )
        value = whole + top / bottom
    except (ValueError, ZeroDivisionError):  # Python reads integers of 4300 digits at most
        return None
    return -value if "-" in match["sign"] + (match["inner"] or "") else value
