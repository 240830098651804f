"""What a judge has said: a score or a verdict where its answer leaves no doubt, else nothing."""

import re
from typing import Literal

Verdict = Literal["A", "B", "tie"]

_VALUE = r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)"
# What may stand around a number or a verdict, as emphasis, LaTeX or JSON.
_OPEN, _CLOSE = r"""[\s*_`"'$\[({<]*""", r"""[*_`"'$\])}>]*"""
# Not the first half of "7-8", "7 to 8", "7,5" or "7e1"; "7/10" and "7 out of 10" are 7 of 10.
_ALONE = r"(?![\d,]*\d|\s*(?:-|–|to\b)\s*\d|\.\d|[eE]\d|\s*%)"
_OUT_OF = rf"(?:\s*(?:/|out\s+of)\s*({_VALUE}))?"
_NUMBER = rf"{_OPEN}({_VALUE}){_ALONE}{_OUT_OF}{_CLOSE}"
_FINAL_SCORE = re.compile(rf"final\s+score{_CLOSE}\s*[:=]", re.IGNORECASE)
_AFTER_LABEL = re.compile(_NUMBER, re.IGNORECASE)
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
    """Return the score that an answer gives, or None where it gives none that is clear.

    It is the number after the last "Final Score:". Without that label it is the number that is the
    whole answer, or the one at the end of a line such as "Rating from 0 to 10: 7", where all such
    lines agree. A number outside of [lowest, highest] is none, nor is one "out of" anything but
    `highest`.
    """
    labels = list(_FINAL_SCORE.finditer(text))
    if labels:
        found = [_AFTER_LABEL.match(text, labels[-1].end())]
    elif whole := _WHOLE.fullmatch(text):
        found = [whole]
    else:
        found = [_RATING_LINE.fullmatch(line) for line in text.splitlines()]
    # "4/5" where 10 is the highest is a score on another scale.
    numbers = {(float(one[1]), float(one[2] or highest)) for one in found if one}
    if len(numbers) != 1:
        return None
    ((number, scale),) = numbers
    return number if lowest <= number <= highest == scale else None


_VERDICTS: dict[str, Verdict] = {"a": "A", "b": "B", "tie": "tie"}


def parse_verdict(text: str) -> Verdict | None:
    """Return the verdict after the last "Final Verdict:", or the one that is the whole answer."""
    labels = list(_FINAL_VERDICT.finditer(text))
    if labels:
        line = text[labels[-1].end() :].strip().partition("\n")[0]
    else:
        line = text.strip()
    found = _VERDICT.fullmatch(line.rstrip(" ."))
    if not found:
        return None
    return _VERDICTS[found[1].lower()]
