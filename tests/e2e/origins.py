"""What the manifests of a run say of its samples: which policy drew them."""

import itertools
import json
import re
from pathlib import Path

from halos_jax.workdir.intact import MANIFEST

_DIGITS = "[0-9a-f]{32}"


def assert_drawn_by_the_policy(
    workdir: Path, *, base: bool = False, averaged: bool = False
) -> None:
    """Assert that each round sampled from the policy before it, as re-scoring found, too.

    Args:
      base: whether an adapter is trained, whose base has a fingerprint of its own.
      averaged: whether it is an average of the policies that is evaluated.
    """
    paths = sorted((workdir / "rounds").glob(f"*/{MANIFEST}"))
    rounds = [json.loads(path.read_text()) for path in paths]
    assert len(rounds) > 1
    for before, now in itertools.pairwise(rounds):
        drawn = now["sampled_by"]["samples.jsonl"]
        assert re.fullmatch(f"{_DIGITS}[+]{_DIGITS}" if base else _DIGITS, drawn)
        assert drawn == before["trained"] != now["trained"]
        assert now["metrics"]["rescore_tokens"] > 0
        assert 0 <= now["metrics"]["rescore_mean"] < 1e-4
        if "eval.jsonl" in now["files"]:
            assert (now["sampled_by"]["eval.jsonl"] != now["trained"]) == averaged
    if base:
        assert len({one["trained"].split("+")[1] for one in rounds}) == 1
