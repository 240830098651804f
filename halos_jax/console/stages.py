"""The line of a stage that is done: what it did, how fast, and how long the run will still take."""

from collections.abc import Mapping


def describe_stage(
    seconds: float, did: Mapping[str, int], *, compiled: float = 0.0, left: float | None = None
) -> str:
    """Return what a stage did in some seconds.

    Args:
      did: noun -> count; the first is what its rate counts. "tokens" are counted a second alone.
      compiled: the seconds of compiling in it.
      left: the seconds that the run will still take; None: not known.
    """
    counts = [show_count(count, noun) for noun, count in did.items() if noun != "tokens"]
    parts = [f"{', '.join(counts)} in {_show_time(seconds)}"]
    for noun in dict.fromkeys((*list(did)[:1], "tokens")):
        if did.get(noun) and seconds:
            parts.append(f"{_show_rate(did[noun] / seconds)} {noun}/s")
    if compiled >= 0.1:
        parts.append(f"{_show_time(compiled)} of it compiling")
    if left is not None:
        parts.append(f"about {show_seconds(left)} left of the run")
    return "; ".join(parts)


def show_count(number: int, nouns: str) -> str:
    """Return a number of things, which are named in the plural.

    >>> show_count(1, "optimizer steps"), show_count(1200, "pairs")
    ('1 optimizer step', '1,200 pairs')
    """
    return f"{number:,} {nouns.removesuffix('s') if number == 1 else nouns}"


def show_seconds(seconds: float) -> str:
    """Return a time for people: "42 s", "3 min 20 s", "5 h 10 min".

    >>> show_seconds(200.0), show_seconds(18_630.0)
    ('3 min 20 s', '5 h 10 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _show_time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else show_seconds(seconds)


def _show_rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
