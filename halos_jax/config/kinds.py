"""The kinds of rewards, of feedback, and of the items that losses train on: one row each.

A new kind is a row here and, where it does something new, a module of its own. Functions are named
as text, "module:function", since they stand on higher levels; `tasks.load` imports them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

RewardKind = Literal["model", "function", "judge"]
FeedbackType = Literal["pairwise", "binary", "scalar"]
ItemKind = Literal["pair", "target", "controlled", "unpaired", "group", "answer"]


@dataclasses.dataclass(frozen=True)
class RewardSpec:
    """Where a score comes from.

    Attributes:
      needs: the field of the reward that must not be empty.
      make: the scorer's maker, called with (config, mesh, renderer, layouts, name, check) as
        `rewards.scorers.make_model_scorer` is.
      check: called with the reward's config, and the folders that earlier stages of a pipeline
        make, to raise what is wrong before the run.
      reads: the fields, or sections, of the reward that name the files it reads.
      function: whether it calls the user's function.
      by_tokens: whether it scores tokens, up to `reward.max_length` of them, and not text.
    """

    needs: str
    make: str
    check: str
    reads: tuple[str, ...] = ()
    function: bool = False
    by_tokens: bool = False


REWARD_KINDS: Mapping[RewardKind, RewardSpec] = {
    "model": RewardSpec(
        "path",
        make="halos_jax.rewards.scorers:make_model_scorer",
        check="halos_jax.tasks.preflight:check_reward_model",
        reads=("path",),
        by_tokens=True,
    ),
    "function": RewardSpec(
        "function",
        make="halos_jax.rewards.scorers:make_user_scorer",
        check="halos_jax.tasks.preflight:check_reward_function",
        function=True,
    ),
    "judge": RewardSpec(
        "judge.model",
        make="halos_jax.rewards.scorers:make_asking_scorer",
        check="halos_jax.tasks.preflight:check_reward_judge",
        reads=("judge",),
    ),
}


def _count_pairs(num_prompts: int, num_samples: int, mode: str) -> int:
    pairs = {"random": num_samples // 2, "all": num_samples * (num_samples - 1) // 2}
    return num_prompts * pairs.get(mode, 1)


@dataclasses.dataclass(frozen=True)
class FeedbackSpec:
    """What rewards are turned into.

    Attributes:
      make: called with (config, scored samples, round); returns the records and their counts.
      warn: called with (config, counts); returns what is wrong with feedback that teaches little.
      count: the most examples of (prompts, samples a prompt, `feedback.mode`).
      pairs: whether an example is two samples, and the threshold the least difference of theirs.
      compares: whether it says nothing of a prompt's only sample.
      single_losses: the losses that learn from a single sample none the less.
    """

    make: str
    warn: str
    count: Callable[[int, int, str], int]
    pairs: bool = False
    compares: bool = False
    single_losses: tuple[str, ...] = ()


FEEDBACK_TYPES: Mapping[FeedbackType, FeedbackSpec] = {
    "pairwise": FeedbackSpec(
        make="halos_jax.rewards.feedback:make_pairwise",
        warn="halos_jax.rewards.feedback:warn_of_pairs",
        count=_count_pairs,
        pairs=True,
        compares=True,
    ),
    "binary": FeedbackSpec(
        make="halos_jax.rewards.feedback:make_binary",
        warn="halos_jax.rewards.feedback:warn_of_classes",
        count=lambda num_prompts, num_samples, mode: num_prompts * num_samples,
    ),
    # PPO learns of a reward alone, the others of its difference from those of its group.
    "scalar": FeedbackSpec(
        make="halos_jax.rewards.feedback:make_scalar",
        warn="halos_jax.rewards.feedback:warn_of_groups",
        count=lambda num_prompts, num_samples, mode: num_prompts,
        compares=True,
        single_losses=("ppo",),
    ),
}


@dataclasses.dataclass(frozen=True)
class ItemSpec:
    """What an example of a loss is.

    Attributes:
      words: for people.
      load: reads the records of a source, called with (source, selection).
      make: makes the items of records, called with (records, renderer, lengths).
      feedback: the types of feedback that can become these items; the first one suits best.
      noun: what training counts.
      per_pair: the examples that a pair makes.
      scored_as: the kind whose functions read records that have scores, where that is another.
      has_control: whether `make` is given `data.control`, too.
      has_classes: whether each is desirable or not, of which there should be enough of both.
      is_weighed: whether the loss has a weight for each of these classes.
    """

    words: str
    load: str
    make: str
    feedback: tuple[FeedbackType, ...] = ()
    noun: str = "examples"
    per_pair: int = 1
    scored_as: ItemKind | Literal[""] = ""
    has_control: bool = False
    has_classes: bool = False
    is_weighed: bool = False


ITEM_KINDS: Mapping[ItemKind, ItemSpec] = {
    "pair": ItemSpec(
        "pairs of a better and a worse answer",
        load="halos_jax.data.datasets:load_preferences",
        make="halos_jax.data.tokenize:make_pair_items",
        feedback=("pairwise",),
        noun="pairs",
    ),
    "target": ItemSpec(
        "demonstrations",
        load="halos_jax.data.datasets:load_demonstrations",
        make="halos_jax.data.conversations:make_target_items",
    ),
    "controlled": ItemSpec(
        "answers that are better or worse",
        load="halos_jax.data.datasets:load_judgements",
        make="halos_jax.data.tokenize:make_controlled_items",
        feedback=("pairwise", "binary"),
        per_pair=2,
        has_control=True,
        has_classes=True,
    ),
    "unpaired": ItemSpec(
        "single answers, desirable or not",
        load="halos_jax.data.datasets:load_judgements",
        make="halos_jax.data.tokenize:make_unpaired_items",
        feedback=("binary", "pairwise"),
        per_pair=2,
        has_classes=True,
        is_weighed=True,
    ),
    "group": ItemSpec(
        "all samples of a prompt with their rewards",
        load="halos_jax.data.datasets:load_scored",
        make="halos_jax.data.tokenize:make_scored_items",
        feedback=("scalar",),
    ),
    "answer": ItemSpec(
        "answers with a reward",
        load="halos_jax.data.datasets:load_judgements",
        make="halos_jax.data.tokenize:make_answer_items",
        feedback=("scalar", "binary", "pairwise"),
        per_pair=2,
        scored_as="group",
    ),
}
