"""Data sets of the hub. HALOs' have names and readers of their own, which give usual records.

A reader is one function: it takes the rows of one split and yields records, or None for a row that
it leaves out (`read_named` counts those). Its records are like those in files: `messages`,
`instruction` and `output`, or a pair of answers in the pairwise_feedback format.
"""

import collections
import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from halos_jax.data.records.fields import RecordError
from halos_jax.json_text import JsonObject

logger = logging.getLogger(__name__)

Row: TypeAlias = Mapping[str, Any]
Records: TypeAlias = Iterator[JsonObject | None]
# (rows of a split, our name for the split) -> records.
Reader: TypeAlias = Callable[[Iterable[Row], str], Records]


@dataclasses.dataclass(frozen=True)
class HubSet:
    """A data set of the hub that has a reader of its own.

    Attributes:
      read: the reader, from rows to records.
      arguments: the arguments of `datasets.load_dataset`, without `split`.
      splits: our name for a split -> the hub's.
    """

    name: str
    read: Reader
    arguments: Mapping[str, Any]
    splits: Mapping[str, str]

    @property
    def is_benchmark(self) -> bool:
        """Whether it is a benchmark, which nobody should train on: it has no split for training."""
        return "train" not in self.splits


HUB_SETS: dict[str, HubSet] = {}
_TRAIN_TEST = {"train": "train", "test": "test"}


def register(
    name: str, path: str, splits: Mapping[str, str] | None = None, /, **arguments: Any
) -> Callable[[Reader], Reader]:
    """Register a data set under `name`; a name can be taken once.

    Args:
      path: the hub id.
      splits: our name for a split -> the hub's; None: "train" and "test", as on the hub.
      arguments: further arguments of `datasets.load_dataset`.
    """

    def add(read: Reader) -> Reader:
        if name in HUB_SETS:
            raise ValueError(f"data set {name!r} is registered already, by {HUB_SETS[name].read}")
        HUB_SETS[name] = HubSet(name, read, {"path": path, **arguments}, splits or _TRAIN_TEST)
        return read

    return add


def find_named(source: str) -> HubSet | None:
    """Return the registered data set that a source names, with or without a split, or None."""
    return HUB_SETS.get(source.rpartition("@")[0] or source)


def load_set(source: str, allowed: str) -> Any:
    """Return a data set of the hub as a `datasets.Dataset`.

    Args:
      source: "NAME@split" of a registered data set, or "id@split", "id:config@split".
      allowed: the kinds of sources that there are, for the error.

    Raises:
      RecordError: if it cannot be loaded, or has no such split.
    """
    arguments = _find_arguments(source)
    try:
        import datasets  # Seconds to import, and only hub data sets need it.
    except ImportError as error:
        raise RecordError(
            f"{source}: hub data sets need the package 'datasets'; install it"
        ) from error
    try:
        return datasets.load_dataset(**arguments)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reasons = [str(one).partition("\n")[0] for one in (error, error.__cause__) if one]
        raise RecordError(
            f"{source}: cannot load the data set: {': '.join(reasons)}; allowed: {allowed}"
        ) from error


def _find_arguments(source: str) -> JsonObject:
    """Return the arguments of `datasets.load_dataset`."""
    name, _, split = source.rpartition("@")
    hub_set = find_named(source)
    if hub_set is None:
        path, _, config = name.partition(":")
        return {"path": path, "name": config or None, "split": split}
    split = split if name else ""
    if split not in hub_set.splits:
        listed = ", ".join(f"'{hub_set.name}@{name}'" for name in hub_set.splits)
        raise RecordError(f"{source}: got split {split!r}, allowed: {listed}")
    return {**hub_set.arguments, "split": hub_set.splits[split]}


def read_named(
    source: str, hub_set: HubSet, rows: Iterable[Row]
) -> Iterator[tuple[int, JsonObject]]:
    """Yield (number, record) from a data set's own reader; log how many rows it leaves out."""
    count = left_out = 0
    try:
        for record in hub_set.read(rows, source.rpartition("@")[2]):
            if record is None:
                left_out += 1
            else:
                count += 1
                yield count, record
    except (LookupError, TypeError, AttributeError) as error:
        name = getattr(hub_set.read, "__name__", "its reader")
        raise RecordError(
            f"{source}: its rows are not as {name} expects them ({error!r}); the data set or its "
            "copy on this machine has changed"
        ) from error
    if left_out:
        logger.info("%s: %d records, %d rows left out", source, count, left_out)


# The repository has a loading script, which `datasets` refuses to run; so the file is read itself.
@register(
    "alpacaeval",
    "json",
    {"test": "train"},
    data_files="hf://datasets/tatsu-lab/alpaca_eval/alpaca_eval.json",
)
def read_alpacaeval(rows: Iterable[Row], split: str) -> Records:
    """AlpacaEval's prompts with the baseline model's answers."""
    for row in rows:
        yield {
            "instruction": row["instruction"],
            "output": row["output"],
            "source": row["dataset"],
        }


@register(
    "shp",
    "stanfordnlp/SHP",
    {"train": "train", "validation": "validation", "test": "test"},
)
def read_shp(rows: Iterable[Row], split: str) -> Records:
    """Stanford Human Preferences: Reddit answers by their scores.

    For training, only pairs in which one score is at least twice the other, and of these the first
    five of each post.
    """
    seen: dict[str, int] = collections.Counter()
    for row in rows:
        if split == "train":
            if row["score_ratio"] < 2 or seen[row["post_id"]] == 5:
                yield None
                continue
            seen[row["post_id"]] += 1
        answers = [(row["human_ref_A"], row["score_A"]), (row["human_ref_B"], row["score_B"])]
        better, worse = answers if row["labels"] else answers[::-1]
        yield _compare(row["history"], better[0], worse[0], (better[1], worse[1]))


@register("hh", "Anthropic/hh-rlhf")
@register("hh_helpful", "Anthropic/hh-rlhf", data_dir="helpful-base")
@register("hh_harmless", "Anthropic/hh-rlhf", data_dir="harmless-base")
def read_hh(rows: Iterable[Row], split: str) -> Records:
    """Anthropic's helpful and harmless dialogues: pairs that differ in their last turn alone.

    Pairs that differ elsewhere, or have no question before the answers, are left out.
    """
    for row in rows:
        chosen, rejected = _split_dialogue(row["chosen"]), _split_dialogue(row["rejected"])
        roles = [turn["role"] for turn in chosen[-2:]]
        if roles != ["user", "assistant"] or chosen[:-1] != rejected[:-1]:
            yield None
        else:
            yield _compare(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def _split_dialogue(text: str) -> list[dict[str, str]]:
    parts = re.split(r"\n\n(Human|Assistant): ?", text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        _turn(roles[role], content.strip())
        for role, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


@register("oasst", "OpenAssistant/oasst1", {"train": "train", "test": "validation"})
def read_oasst(rows: Iterable[Row], split: str) -> Records:
    """Open Assistant's English answers, each paired with the next one in its ranking (0 is best).

    The prompt is the path from the root of the tree to the question.
    """
    messages = {row["message_id"]: row for row in rows if row["lang"] == "en"}
    rankings: dict[str, dict[int, Row]] = collections.defaultdict(dict)
    for message in messages.values():
        ranked = message["role"] == "assistant" and message["rank"] is not None
        if ranked and message["parent_id"] in messages:
            rankings[message["parent_id"]][int(message["rank"])] = message
    roles = {"prompter": "user", "assistant": "assistant"}
    for parent, ranking in rankings.items():
        path = []
        while parent in messages:
            path.append(_turn(roles[messages[parent]["role"]], messages[parent]["text"]))
            parent = messages[parent]["parent_id"]
        complete = parent is None  # else a message of the path is in another language
        for rank in sorted(ranking):
            if complete and rank + 1 in ranking:
                yield _compare(path[::-1], ranking[rank]["text"], ranking[rank + 1]["text"])


@register(
    "ultrabin",
    "HuggingFaceH4/ultrafeedback_binarized",
    {"train": "train_prefs", "test": "test_prefs"},
)
def read_ultrabin(rows: Iterable[Row], split: str) -> Records:
    """UltraFeedback, binarized: of four answers, the one that GPT-4 rated best and another."""
    for row in rows:
        chosen, rejected = row["chosen"], row["rejected"]
        rewards = (row["score_chosen"], row["score_rejected"])
        yield _compare(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"], rewards)


@register("ultrafeedback_armorm", "princeton-nlp/llama3-ultrafeedback-armorm")
@register("ultrafeedback_gemma", "princeton-nlp/gemma2-ultrafeedback-armorm")
def read_ultrafeedback_armorm(rows: Iterable[Row], split: str) -> Records:
    """Answers of an instruct model to UltraFeedback's prompts: ArmoRM's best and worst."""
    for row in rows:
        chosen, rejected = row["chosen"], row["rejected"]
        rewards = (max(row["all_rm_scores"]), min(row["all_rm_scores"]))
        yield _compare(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"], rewards)


@register(
    "ultrachat",
    "HuggingFaceH4/ultrachat_200k",
    {"train": "train_sft", "test": "test_sft"},
)
def read_ultrachat(rows: Iterable[Row], split: str) -> Records:
    """UltraChat's conversations of several turns."""
    for row in rows:
        yield {"messages": _turns(row["messages"])}


@register("s1k_11", "simplescaling/s1K-1.1", {"train": "train"})
def read_s1k_11(rows: Iterable[Row], split: str) -> Records:
    """s1K-1.1: a thousand hard questions with the thoughts and answers of DeepSeek R1."""
    for row in rows:
        thoughts, answer = row["deepseek_thinking_trajectory"], row["deepseek_attempt"]
        yield {
            "question": row["question"],
            "completion": f"<think>\n{thoughts.strip()}\n</think>\n\n{answer}",
            "solution": row["solution"],
        }


@register("safe_rlhf", "PKU-Alignment/PKU-SafeRLHF-single-dimension")
def read_safe_rlhf(rows: Iterable[Row], split: str) -> Records:
    """PKU-SafeRLHF with one preference per pair, for helpfulness and harmlessness together."""
    for row in rows:
        better = row["better_response_id"]
        yield _compare(row["prompt"], row[f"response_{better}"], row[f"response_{1 - better}"])


@register("wildbench", "allenai/WildBench", {"test": "test"}, name="v2")
def read_wildbench(rows: Iterable[Row], split: str) -> Records:
    """WildBench's conversations of real users (all turns), with GPT-4's answers."""
    for row in rows:
        answer = _turn("assistant", row["references"]["gpt-4"])
        messages = [*_turns(row["conversation_input"]), answer]
        yield {"messages": messages, "checklist": row["checklist"]}


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _turns(messages: Iterable[Row]) -> list[dict[str, str]]:
    return [_turn(message["role"], message["content"]) for message in messages]


def _compare(
    prompt: str | Sequence[Row],
    better: str,
    worse: str,
    rewards: tuple[float, float] | None = None,
) -> JsonObject:
    """Return the pairwise_feedback record of two answers."""
    record: JsonObject = {
        "type": "pairwise_feedback",
        "prompt": prompt if isinstance(prompt, str) else _turns(prompt),
        "output_A": [_turn("assistant", better)],
        "output_B": [_turn("assistant", worse)],
        "label": 1,
    }
    if rewards:
        record |= {"reward_A": float(rewards[0]), "reward_B": float(rewards[1])}
    return record
