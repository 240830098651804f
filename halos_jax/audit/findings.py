"""What a verification has found: one finding for each thing that a check has looked at."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal

# "passed": all that was looked at is as it should be; "differs": some of it is not, and no rule
# allows it; "not checked": nothing can be said, and `why` says the reason.
Outcome = Literal["passed", "differs", "not checked"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of a check.

    Attributes:
      check: the name of the check, such as "rewards".
      what: what was compared with what, in a few words.
      outcome: see `Outcome`.
      checked: how many things were looked at, of `total`; `unit` says what they are.
      why: what differs, or why something was not checked; for "passed" a remark, usually empty.
      place: the run, task or round; the runner fills it in.
    """

    check: str
    what: str
    outcome: Outcome
    checked: int = 0
    total: int = 0
    unit: str = ""
    why: str = ""
    place: str = ""

    @property
    def amount(self) -> str:
        """How much was looked at: "8 of 96 samples", "12 files", or "" for nothing countable."""
        if not self.unit:
            return ""
        count = (
            f"{self.checked}" if self.checked == self.total else f"{self.checked} of {self.total}"
        )
        return f"{count} {self.unit}"


def passed(
    check: str, what: str, checked: int, total: int | None = None, unit: str = "", why: str = ""
) -> Finding:
    """Return the finding that all `checked` things are right; `total` are there."""
    return Finding(check, what, "passed", checked, checked if total is None else total, unit, why)


def differs(
    check: str, what: str, why: str, checked: int = 0, total: int | None = None, unit: str = ""
) -> Finding:
    """Return the finding that something is not as it should be; `why` names it."""
    return Finding(check, what, "differs", checked, checked if total is None else total, unit, why)


def not_checked(check: str, what: str, why: str, total: int = 0, unit: str = "") -> Finding:
    """Return the finding that nothing can be said, and why."""
    return Finding(check, what, "not checked", 0, total, unit, why)


def compare(
    check: str,
    what: str,
    wrong: Sequence[str],
    checked: int,
    total: int | None = None,
    unit: str = "",
) -> Finding:
    """Return "differs" with the lines of what is wrong, or "passed" if there are none."""
    if wrong:
        return differs(check, what, join_lines(wrong), checked, total, unit)
    return passed(check, what, checked, total, unit)


def join_lines(lines: Sequence[str], most: int = 3) -> str:
    """Return the first lines as one text, with the number of those left out."""
    more = f"; and {len(lines) - most} more" if len(lines) > most else ""
    return "; ".join(lines[:most]) + more


def count_outcomes(findings: Iterable[Finding]) -> dict[Outcome, int]:
    """Return how many findings have each outcome."""
    counts = Counter(one.outcome for one in findings)
    outcomes: tuple[Outcome, ...] = ("passed", "differs", "not checked")
    return {outcome: counts[outcome] for outcome in outcomes}


def format_table(findings: Sequence[Finding]) -> str:
    """Return the findings as a table for a terminal, one line each, in their order."""
    rows = [
        (one.place, one.check, one.amount, one.outcome, one.what + (f": {one.why}" * bool(one.why)))
        for one in findings
    ]
    head = ("where", "check", "looked at", "outcome", "what")
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head) - 1)]
    lines = []
    for row in (head, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        told = "; ".join(row[-1].splitlines())  # several errors of a config come in lines
        lines.append("  ".join([*cells, told]).rstrip())
    return "\n".join(lines)


def format_summary(findings: Sequence[Finding]) -> str:
    """Return a line for each check with the number of its outcomes, and what did not pass.

    A finding that did not pass for the same reason in several places is one line.
    """
    checks = list(dict.fromkeys(one.check for one in findings))
    room = max(map(len, checks), default=0)
    lines = []
    for check in checks:
        own = [one for one in findings if one.check == check]
        said = [f"{count} {name}" for name, count in count_outcomes(own).items() if count]
        lines.append(f"{check:{room}}  {', '.join(said)}")
    groups: dict[tuple[str, str, str, str], list[Finding]] = {}
    for one in findings:
        if one.outcome != "passed":
            groups.setdefault((one.check, one.what, one.outcome, one.why), []).append(one)
    left = [_join(ones) for ones in groups.values()]
    return "\n".join([*lines, *(["", format_table(left)] if left else [])])


def _join(findings: Sequence[Finding]) -> Finding:
    """Return findings that are alike but for their places as one."""
    places = join_lines([one.place for one in findings])
    checked, total = (sum(getattr(one, name) for one in findings) for name in ("checked", "total"))
    return dataclasses.replace(findings[0], place=places, checked=checked, total=total)


def to_record(finding: Finding) -> dict[str, Any]:
    """Return a finding as JSON."""
    return dataclasses.asdict(finding)
