"""The kinds of rewards, of feedback, and of the items that losses train on: one row each.

A new kind is a row here and, if it does something new, a module of its own. Functions are named as
text, "module:function", because they live on higher levels; `tasks.load` imports them.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Literal

RewardKind = Literal["model", "function", "judge", "none"]
FeedbackType = Literal["pairwise", "binary", "scalar", "samples"]
ItemKind = Literal["pair", "target", "controlled", "unpaired", "group", "answer", "output"]


@dataclasses.dataclass(frozen=True)
class RewardSpec:
    """A kind of reward.

    Attributes:
      make: makes the scorer; called with the arguments of `rewards.scorers.make_model_scorer`.
      check: raises an error for a reward that cannot work, before the run; called with the reward's
        config and the folders that earlier tasks of a pipeline will have made.
      needs: the field of the reward that must not be empty, if there is one.
      reads: the fields or sections of the reward that name the files it reads.
      function: whether it calls a function of the user.
      by_tokens: whether it scores tokens, at most `reward.max_length` of them, rather than text.
      one_by_one: whether the samples of a prompt may be scored without those of other prompts, so
        that a file is scored, and saved, in shards.
      scores: whether samples get a reward at all.
    """

    make: str
    check: str
    needs: str = ""
    reads: tuple[str, ...] = ()
    function: bool = False
    by_tokens: bool = False
    one_by_one: bool = False
    scores: bool = True


REWARD_KINDS: Mapping[RewardKind, RewardSpec] = {
    "model": RewardSpec(
        make="halos_jax.rewards.scorers:make_model_scorer",
        check="halos_jax.tasks.preflight:check_reward_model",
        needs="path",
        reads=("path",),
        by_tokens=True,
        one_by_one=True,
    ),
    "function": RewardSpec(
        make="halos_jax.rewards.scorers:make_user_scorer",
        check="halos_jax.tasks.preflight:check_reward_function",
        needs="function",
        function=True,
        one_by_one=True,
    ),
    "judge": RewardSpec(
        make="halos_jax.rewards.scorers:make_asking_scorer",
        check="halos_jax.tasks.preflight:check_reward_judge",
        needs="judge.model",
        reads=("judge",),
    ),
    "none": RewardSpec(
        make="halos_jax.rewards.scorers:make_no_scorer",
        check="halos_jax.tasks.preflight:check_no_reward",
        one_by_one=True,
        scores=False,
    ),
}


def _count_pairs(num_prompts: int, num_samples: int, mode: str) -> int:
    pairs = {"random": num_samples // 2, "all": num_samples * (num_samples - 1) // 2}
    return num_prompts * pairs.get(mode, 1)


@dataclasses.dataclass(frozen=True)
class FeedbackSpec:
    """A type of feedback, which rewards are turned into.

    Attributes:
      make: called with (config, scored samples, round); returns the records and their counts.
      warn: called with (config, counts); returns a warning if the feedback teaches little.
      useful: called with the counts; returns how many examples teach something: pairs, labelled
        answers, or groups whose rewards differ.
      count: called with (prompts, samples per prompt, `feedback.mode`); returns the largest number
        of examples that these can give.
      pairs: whether an example is a pair, and the threshold the least difference of its rewards.
      compares: whether a prompt needs two samples or more, because they are compared.
      scored: whether it needs the samples' rewards.
      single_losses: losses that can learn from a prompt's only sample even so.
    """

    make: str
    warn: str
    useful: Callable[[Mapping[str, int]], int]
    count: Callable[[int, int, str], int]
    pairs: bool = False
    compares: bool = False
    scored: bool = True
    single_losses: tuple[str, ...] = ()


FEEDBACK_TYPES: Mapping[FeedbackType, FeedbackSpec] = {
    "pairwise": FeedbackSpec(
        make="halos_jax.rewards.feedback:make_pairwise",
        warn="halos_jax.rewards.feedback_report:warn_of_pairs",
        useful=lambda counts: counts["pairs"],
        count=_count_pairs,
        pairs=True,
        compares=True,
    ),
    "binary": FeedbackSpec(
        make="halos_jax.rewards.feedback:make_binary",
        warn="halos_jax.rewards.feedback_report:warn_of_classes",
        useful=lambda counts: counts["examples"],
        count=lambda num_prompts, num_samples, mode: num_prompts * num_samples,
    ),
    # PPO learns from a reward by itself, other losses from its difference to those of its group.
    "scalar": FeedbackSpec(
        make="halos_jax.rewards.feedback:make_scalar",
        warn="halos_jax.rewards.feedback_report:warn_of_groups",
        useful=lambda counts: counts["examples"] - counts["equal"] - counts["single"],
        count=lambda num_prompts, num_samples, mode: num_prompts,
        compares=True,
        single_losses=("ppo",),
    ),
    "samples": FeedbackSpec(
        make="halos_jax.rewards.samples:make_samples",
        warn="halos_jax.rewards.samples:warn_of_samples",
        useful=lambda counts: counts["examples"],
        count=lambda num_prompts, num_samples, mode: num_prompts * num_samples,
        scored=False,
    ),
}


@dataclasses.dataclass(frozen=True)
class ItemSpec:
    """A kind of item, which is what a loss calls an example.

    Attributes:
      words: a description for messages.
      load: reads the records of a source; called with (source, selection).
      make: turns records into items; called with (records, renderer, lengths).
      feedback: the types of feedback that can become these items; the first one suits best.
      noun: what to call examples in messages.
      per_pair: how many examples one pair becomes.
      scored_as: another kind, whose functions read the source if its records have scores.
      has_control: whether `make` also gets `data.control`.
      has_classes: whether each item is desirable or undesirable; the data should have enough of
        both.
      is_weighed: whether the loss has a weight for each of the two classes.
      takes_all: whether it takes every output of feedback, and not those alone that are good.
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
    takes_all: bool = False


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
    "output": ItemSpec(
        "samples and demonstrations, whatever their rewards",
        load="halos_jax.data.datasets:load_demonstrations",
        make="halos_jax.data.conversations:make_target_items",
        feedback=("samples",),
        per_pair=2,
        takes_all=True,
    ),
}
