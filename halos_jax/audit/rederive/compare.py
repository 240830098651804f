"""Values that were computed again, compared with those that a run has recorded."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from halos_jax.audit.findings import Finding, differs, passed
from halos_jax.audit.rederive.same import explain_programs


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far a number that was computed again may be from the recorded one.

    Attributes:
      relative: as a share of the recorded number.
      absolute: beside that share.
    """

    relative: float = 0.0
    absolute: float = 0.0

    def allows(self, recorded: float, found: float) -> bool:
        """Tell whether `found` is close enough to `recorded`; a NaN is close to a NaN alone."""
        if math.isnan(recorded) or math.isnan(found):
            return math.isnan(recorded) and math.isnan(found)
        return abs(recorded - found) <= self.absolute + self.relative * abs(recorded)


EXACT = Tolerance()
_SHARES = ("accurac", "win_rate", "tied_share", "clipfrac")  # in names of metrics
_BY_AGE = ("kl_stale_age/", "kl_sampled_stale_age/")  # of what is replayed: how its names begin


@dataclasses.dataclass(frozen=True)
class Difference:
    """The comparison of two JSON values.

    Attributes:
      first: where they first differ by more than is allowed, and how; "" if they nowhere do.
      largest: the largest difference of two numbers at the same place.
    """

    first: str = ""
    largest: float = 0.0


def compare_values(recorded: Any, found: Any, tolerance: Tolerance = EXACT) -> Difference:
    """Compare two JSON values; numbers may differ by `tolerance`, all else must be equal."""
    return _compare(recorded, found, tolerance, "")


def drop_shares(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics without the shares of comparisons: rounding may turn one over near a tie."""
    return {
        name: value
        for name, value in metrics.items()
        if not any(share in name for share in _SHARES)
    }


def drop_sums(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics without sums over an answer that are there per token, too, or by age.

    The rounding of all its tokens adds up in them.
    """
    sums = {name.replace("_per_token", "") for name in metrics if "_per_token" in name}
    return {
        name: value
        for name, value in metrics.items()
        if name not in sums and not name.startswith(_BY_AGE)
    }


def compare_rows(
    recorded: Sequence[Mapping[str, Any]],
    found: Sequence[Mapping[str, Any]],
    tolerance: Tolerance = EXACT,
) -> Difference:
    """Compare two files of records, line by line; as `compare_values`."""
    if len(recorded) != len(found):
        return Difference(f"{len(recorded)} records, expected {len(found)}")
    largest, first = 0.0, ""
    for number, (one, other) in enumerate(zip(recorded, found, strict=True), 1):
        difference = _compare(one, other, tolerance, f"line {number}")
        largest = max(largest, difference.largest)
        first = first or difference.first
    return Difference(first, largest)


def _compare(recorded: Any, found: Any, tolerance: Tolerance, where: str) -> Difference:
    if _is_number(recorded) and _is_number(found):
        gap = abs(float(recorded) - float(found))
        largest = gap if math.isfinite(gap) else 0.0
        if tolerance.allows(float(recorded), float(found)):
            return Difference("", largest)
        return Difference(_describe(where, recorded, found), largest)
    if isinstance(recorded, Mapping) and isinstance(found, Mapping):
        names = [*recorded, *(name for name in found if name not in recorded)]
        parts = [
            _compare(recorded.get(name), found.get(name), tolerance, _join(where, name))
            for name in names
        ]
    elif isinstance(recorded, list) and isinstance(found, list) and len(recorded) == len(found):
        parts = [
            _compare(one, other, tolerance, f"{where}[{index}]")
            for index, (one, other) in enumerate(zip(recorded, found, strict=True))
        ]
    else:
        return Difference("" if recorded == found else _describe(where, recorded, found))
    first = next((part.first for part in parts if part.first), "")
    return Difference(first, max((part.largest for part in parts), default=0.0))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _join(where: str, name: str) -> str:
    return f"{where} {name}" if where else name


def _describe(where: str, recorded: Any, found: Any) -> str:
    return f"{where}: {_shorten(recorded)} is recorded, {_shorten(found)} is what it follows to be"


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclasses.dataclass(frozen=True)
class Amount:
    """How much was looked at: `checked` of `total` things; `unit` says what they are."""

    checked: int
    total: int
    unit: str


def judge(
    check: str, what: str, exact: Difference, close: Difference, *, is_same: bool, amount: Amount
) -> Finding:
    """Return the finding of a comparison that was made exactly and with a tolerance.

    Args:
      exact, close: the comparison without, and with, the tolerance of other execution settings.
      is_same: whether the settings are known to be those of the run: then no tolerance is due,
        unless programs had to be compiled again on a device where that may matter.
    """
    counts = amount.checked, amount.total, amount.unit
    if not exact.first:
        return passed(check, what, *counts)
    reason = explain_programs() if is_same else ""
    if is_same and not reason:
        return differs(check, what, f"{exact.first}; {_show(exact)}", *counts)
    if close.first:
        return differs(check, what, f"{close.first}; {_show(exact)}", *counts)
    return passed(check, what, *counts, why=say_within(_show(exact), reason))


def say_within(difference: str, reason: str = "") -> str:
    """Return the remark on a difference that is allowed; `reason`: why, if it is not known yet."""
    return f"not to the last bit, but within; {difference}" + f"; {reason}" * bool(reason)


def _show(difference: Difference) -> str:
    return f"the largest difference is {difference.largest:.3g}"
