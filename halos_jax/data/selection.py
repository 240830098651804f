"""Which records of a source are taken: subsets, edits, and the part that is held out."""

import dataclasses

from halos_jax.config import DataConfig
from halos_jax.data.records.edits import make_edits
from halos_jax.data.records.fields import NO_EDITS, Edits


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which records of a source to take; the defaults take all of them, as they are.

    Attributes:
      split: only records whose field `split` has this value.
      limit: take a random subset of this many records (for samples with rewards, prompts); 0: all.
      seed: seed of all random choices; the same seed takes the same records.
      per_prompt: most preferences to take for each prompt; 0: all.
      keep_desirable: the share of the desirable answers to keep; `keep_undesirable`: of the others.
      collapse: replace runs of spaces and tabs by one space in all text (not in token ids).
      every_turn: learn all assistant turns of a conversation, not only the last one.
      best_only: learn one output per prompt from feedback (`targets.Targets`).
      every_output: take all outputs of feedback, however often, instead of choosing.
      edits: changes to records and conversations as they are read.
      margins: every pair must have rewards, or a margin.
      holdout: how many prompts are held out with all of their records (see `holdout`).
      is_held: take these records; otherwise all others.
    """

    split: str = ""
    limit: int = 0
    seed: int = 0
    per_prompt: int = 0
    keep_desirable: float = 1.0
    keep_undesirable: float = 1.0
    collapse: bool = False
    every_turn: bool = True
    best_only: bool = True
    every_output: bool = False
    edits: Edits = NO_EDITS
    margins: bool = False
    holdout: int = 0
    is_held: bool = False


ALL = Selection()


def select_train(data: DataConfig, seed: int) -> Selection:
    """Return the selection of `data.train` for a run with this seed."""
    return Selection(
        split=data.train_split,
        limit=data.max_train,
        seed=seed,
        per_prompt=data.max_prompt_count,
        keep_desirable=data.frac_unique_desirable,
        keep_undesirable=data.frac_unique_undesirable,
        collapse=data.collapse_whitespace,
        every_turn=data.learn_turns == "all",
        best_only=data.learn_outputs == "best",
        edits=make_edits(data),
        holdout=data.holdout,
    )


def select_eval(data: DataConfig) -> Selection:
    """Return the selection of the held-out records, the same for any seed.

    They are those of `data.eval`, or the part of `data.train` that `data.holdout` holds out.
    """
    held_out = 0 if data.eval else data.holdout
    return Selection(
        split=data.train_split if held_out else data.eval_split,
        limit=data.max_eval,
        holdout=held_out,
        is_held=bool(held_out),
        collapse=data.collapse_whitespace,
        every_turn=data.learn_turns == "all",
        best_only=data.learn_outputs == "best",
        edits=make_edits(data),
    )


def select_test(data: DataConfig) -> Selection:
    """Return the selection of `data.test`, the same for any seed."""
    return dataclasses.replace(
        select_eval(data), split=data.test_split, limit=data.max_test, holdout=0, is_held=False
    )
