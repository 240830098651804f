"""The table of signs, and the page that shows it."""

from pathlib import Path

from halos_jax.signs.table import FRESH, HELD_OUT, PROOF, REPLAYED, SIGNS, STALE

PAGE = Path(__file__).parents[2] / "halos_jax" / "signs" / "README.md"


def _mark(sign):
    return "" if sign.has_interval else " (no interval)"


def test_the_page_shows_the_table():
    rows = [
        f"| `{name}`{_mark(sign)} | {sign.unit} | {sign.meaning} |" for name, sign in SIGNS.items()
    ]
    shown = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert shown == rows


def test_a_sign_is_of_the_start_of_a_round_or_of_its_end():
    parts = (PROOF, FRESH, STALE, REPLAYED, HELD_OUT)
    assert len(SIGNS) == sum(map(len, parts))
