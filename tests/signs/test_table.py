"""The table of signs, and the page that shows it."""

from pathlib import Path

from halos_jax.signs.table import FRESH, SIGNS, is_stale

PAGE = Path(__file__).parents[2] / "halos_jax" / "signs" / "README.md"


def _mark(sign):
    return "" if sign.has_interval else " (no interval)"


def test_the_page_shows_the_table():
    rows = [
        f"| `{name}`{_mark(sign)} | {sign.unit} | {sign.meaning} |" for name, sign in SIGNS.items()
    ]
    shown = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert shown == rows


def test_a_sign_is_of_the_end_of_a_round_or_of_its_start():
    assert is_stale("kl_stale") and is_stale("kl_stale/low") and is_stale("stale_ratio_max")
    assert not any(map(is_stale, FRESH)) and not is_stale("reward_eval")
