"""The score or the verdict in a judge's answer, if the answer leaves no doubt; else None."""

import re
from typing import Literal

Verdict = Literal["A", "B", "tie"]

_VALUE = r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)"
# Characters around a number or a verdict: emphasis, LaTeX, JSON.
_OPEN, _CLOSE = r"""[\s*_`"'$\[({<]*""", r"""[*_`"'$\])}>]*"""
# "7-8", "7 to 8", "7,5" and "7e1" are no 7; "7/10" and "7 out of 10" are 7 of 10.
_ALONE = r"(?![\d,]*\d|\s*(?:-|–|to\b)\s*\d|\.\d|[eE]\d|\s*%)"
_OUT_OF = rf"(?:\s*(?:/|out\s+of)\s*({_VALUE}))?"
_NUMBER = rf"{_OPEN}({_VALUE}){_ALONE}{_OUT_OF}{_CLOSE}"
_FINAL_SCORE = re.compile(rf"final\s+score{_CLOSE}\s*[:=]", re.IGNORECASE)
_AFTER_WORDS = re.compile(_NUMBER, re.IGNORECASE)
_WHOLE = re.compile(rf"\s*{_NUMBER}\s*\.?\s*", re.IGNORECASE)
_RATING_LINE = re.compile(
    rf".*\b(?:score|rating|rate|grade|mark)s?\b.*[:=]{_NUMBER}\s*[.,;]?\s*{_CLOSE}\s*",
    re.IGNORECASE,
)
_FINAL_VERDICT = re.compile(rf"final\s+verdict{_CLOSE}\s*[:=]", re.IGNORECASE)
_VERDICT = re.compile(
    rf"{_OPEN}(?:(?:answer|response|assistant)[\s_]+)?(A|B|tie)\b(?!['’]){_CLOSE}", re.IGNORECASE
)


def parse_score(text: str, *, lowest: float, highest: float) -> float | None:
    """Return the score in an answer, or None if no score is clear.

    It is the number after the last "Final Score:". An answer without these words gives a score if
    it is nothing but a number, or if it has lines such as "Rating from 0 to 10: 7" that all agree.
    A number outside [lowest, highest] is no score, nor is one "out of" anything but `highest`.
    """
    marks = list(_FINAL_SCORE.finditer(text))
    if marks:
        found = [_AFTER_WORDS.match(text, marks[-1].end())]
    elif whole := _WHOLE.fullmatch(text):
        found = [whole]
    else:
        found = [_RATING_LINE.fullmatch(line) for line in text.splitlines()]
    # If `highest` is 10, "4/5" is a score on another scale.
    numbers = {(float(one[1]), float(one[2] or highest)) for one in found if one}
    if len(numbers) != 1:
        return None
    ((number, scale),) = numbers
    return number if lowest <= number <= highest == scale else None


_VERDICTS: dict[str, Verdict] = {"a": "A", "b": "B", "tie": "tie"}


def parse_verdict(text: str) -> Verdict | None:
    """Return the verdict after the last "Final Verdict:", or one that is the whole answer."""
    marks = list(_FINAL_VERDICT.finditer(text))
    if marks:
        line = text[marks[-1].end() :].strip().partition("\n")[0]
    else:
        line = text.strip()
    found = _VERDICT.fullmatch(line.rstrip(" ."))
    if not found:
        return None
    return _VERDICTS[found[1].lower()]
