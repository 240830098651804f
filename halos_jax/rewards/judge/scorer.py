"""A language model as the judge: scores of single samples, or comparisons of two."""

import concurrent.futures
import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from halos_jax import sharding
from halos_jax.config import Config, schema
from halos_jax.config.rewards import JudgeConfig
from halos_jax.console.bars import make_progress
from halos_jax.data.records.fields import shorten
from halos_jax.json_text import JsonObject
from halos_jax.rewards.judge.answers import parse_score, parse_verdict
from halos_jax.rewards.judge.cache import AnswerCache, make_key
from halos_jax.rewards.judge.client import (
    Cancelled,
    JudgeClient,
    UnreachableError,
    check_url,
    load_key,
)
from halos_jax.rewards.judge.prompts import Messages, make_question
from halos_jax.rewards.labels import Labels, RewardError, Scorer
from halos_jax.types import Sample

logger = logging.getLogger(__name__)

# Before the address of a server that is not asked: the answers of it that are on disk must do, and
# other questions have no answer.
CACHE_ONLY = "cache:"
_PROBE = "Answer with the word yes."
_LOOK = 0.5  # seconds between two checks whether the run must stop
_POINTS = {"A": 1.0, "B": 0.0, "tie": 0.5}  # of the sample that stands as A
Parse = Callable[[str], Any]


def probe_judge(config: Config) -> bool:
    """Ask the judge one small question, so that a dead server is known before anything is sampled.

    It is one request with the config's own parameters, whose answer is one word. If there is no
    server but answers of an earlier run are on disk, these may suffice: then it only warns. Return
    whether the server is there.

    Raises:
      ConfigError: if there is no key, or if a template or the address cannot be used.
      RewardError: if there is no server, or it refuses the request.
    """
    settings = config.reward.judge
    if settings.url.startswith(CACHE_ONLY):
        return False
    key = load_key(settings.key_variable)
    make_question(settings)
    check_url(settings.url)
    if jax.process_index():
        return True
    client = JudgeClient(settings, key)
    try:
        client.probe(_make_body(settings, [{"role": "user", "content": _PROBE}]))
    except UnreachableError as error:
        cache = AnswerCache(find_cache(config))
        cache.load()
        if not len(cache):
            raise
        logger.warning("%s (%d answers are on disk: continuing with these)", error, len(cache))
        return False
    finally:
        client.close()
    return True


def find_cache(config: Config) -> Path:
    """Return the file with the answers of a run's judge."""
    return Path(config.reward.judge.cache or Path(config.workdir) / "judge.jsonl")


def make_judge_scorer(
    config: Config, check: Callable[[], None] = lambda: None, *, is_known: bool = False
) -> Scorer:
    """Return the scorer that asks the judge of `config.reward.judge`.

    In mode "score" a sample's reward is the judge's score. In mode "compare" it is the share of its
    comparisons with other samples of its prompt that it wins. Two samples are compared in both
    orders: the same winner twice gives 1 and 0; a tie, or two different winners, gives both 1/2.
    Samples with the same text share their answers; a pair of them is a tie without a question.

    Every answer is kept in `reward.judge.cache`, and its question never asked again. With several
    processes, process 0 asks and the others read its file.

    Args:
      check: called now and then while the scorer waits; an error that it raises stops the scorer.
      is_known: whether `probe_judge` has had an answer; if not, a server that is missing when it is
        first needed is an error at once, without retries.

    Raises:
      ConfigError: if there is no key, or if a template cannot be used.
    """
    settings = config.reward.judge
    key = load_key(settings.key_variable)
    question = make_question(settings)
    check_url(settings.url.removeprefix(CACHE_ONLY))
    cache, met = AnswerCache(find_cache(config)), threading.Event()
    if is_known:
        met.set()

    def ask(conversations: Sequence[Messages], parse: Parse) -> list[Any]:
        asker = _Asker(config, cache, parse)
        if jax.process_index() == 0 and not settings.url.startswith(CACHE_ONLY):
            cache.load()
            asker.ask_all(conversations, key, check, met)
        sharding.wait_for_all("asked the judge")
        cache.load()
        return [asker.look_up(messages)[0] for messages in conversations]

    def score(samples: Sequence[Sample]) -> list[float | None]:
        conversations = [question(sample.prompt, sample.output) for sample in samples]
        limits = {"lowest": settings.lowest, "highest": settings.highest}
        return ask(conversations, lambda text: parse_score(text, **limits))

    def compare(samples: Sequence[Sample]) -> Labels:
        pairs = list_pairs(samples, settings.pairs)
        asked = [pair for pair in pairs if samples[pair[0]].output != samples[pair[1]].output]
        orders = [order for i, j in asked for order in ((i, j), (j, i))]
        conversations = [
            question(samples[i].prompt, samples[i].output, samples[j].output) for i, j in orders
        ]
        verdicts = ask(conversations, parse_verdict)
        points = dict(zip(asked, map(join_verdicts, verdicts[::2], verdicts[1::2]), strict=True))
        return count_wins(len(samples), {pair: points.get(pair, 0.5) for pair in pairs})

    return score if settings.mode == "score" else compare


def list_pairs(samples: Sequence[Sample], which: str) -> list[tuple[int, int]]:
    """Return pairs of indices of samples of the same prompt: "all" pairs, or "neighbours"."""
    groups: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.prompt.prompt_id, []).append(index)
    if which == "all":
        return [pair for group in groups.values() for pair in itertools.combinations(group, 2)]
    return [pair for group in groups.values() for pair in itertools.pairwise(group)]


def join_verdicts(first: str | None, second: str | None) -> float | None:
    """Return the points of a pair's first sample: 1, 0 or, for a tie or a contradiction, 1/2.

    Args:
      first: the verdict when that sample is A.
      second: the verdict when it is B. The result is None if either verdict is.
    """
    if first is None or second is None:
        return None
    here, swapped = _POINTS[first], 1.0 - _POINTS[second]
    return here if here == swapped else 0.5


def count_wins(count: int, points: dict[tuple[int, int], float | None]) -> Labels:
    """Return the mean points of each of `count` samples over its comparisons, as rewards.

    Comparisons without points are left out. `Labels.counts` has: comparisons, ties, undecided.
    """
    won: list[list[float]] = [[] for _ in range(count)]
    for (i, j), share in points.items():
        if share is not None:
            won[i].append(share)
            won[j].append(1.0 - share)
    values = list(points.values())
    counts = {
        "comparisons": len(values),
        "ties": values.count(0.5),
        "undecided": values.count(None),
    }
    rewards = [sum(shares) / len(shares) if shares else None for shares in won]
    return Labels(rewards, counts=counts)


class _Asker:
    """One pass over questions: looks up those that are answered, and asks the rest."""

    def __init__(self, config: Config, cache: AnswerCache, parse: Parse):
        self._config, self._cache, self._parse = config, cache, parse
        self._settings: JudgeConfig = config.reward.judge
        self._useless: str | None = None  # the last answer without a score or verdict

    def look_up(self, messages: Messages) -> tuple[Any, int]:
        """Return (the score or verdict of the answers on disk, or None; how many answers)."""
        for repeat in range(self._settings.repeats + 1):
            answer = self._cache.get(self._key(messages, repeat))
            if answer is None:
                return None, repeat
            # A text cut by the token limit may end in the first half of a number.
            whole = answer["finish_reason"] != "length"
            found = self._parse(answer["text"]) if whole else None
            if found is not None:
                return found, repeat
            self._useless = answer["text"]
        return None, self._settings.repeats + 1

    def ask_all(
        self,
        conversations: Sequence[Messages],
        key: str,
        check: Callable[[], None],
        met: threading.Event,
    ) -> None:
        """Ask the questions whose answers are not on disk, `concurrency` at a time.

        Args:
          check: as of `make_judge_scorer`.
          met: set once the server is known to be there.

        Raises:
          RewardError: if the server refuses, or too many questions stay without an answer. The
            answers to requests under way are kept.
        """
        uses: dict[str, int] = {}
        distinct: dict[str, Messages] = {}
        for messages in conversations:
            name = self._key(messages, 0)
            uses[name] = uses.get(name, 0) + 1
            distinct[name] = messages
        failed, open_questions = 0, []
        for name, messages in distinct.items():
            found, tries = self.look_up(messages)
            if found is None and tries > self._settings.repeats:
                failed += uses[name]
            elif found is None:
                open_questions.append(name)
        client = JudgeClient(self._settings, key)
        if open_questions and not met.is_set():
            client.reach()
            met.set()
        bar = make_progress(
            len(open_questions), "judge", unit="questions", enabled=self._config.progress
        )
        pool = concurrent.futures.ThreadPoolExecutor(self._settings.concurrency, "judge")
        try:
            pending = {
                pool.submit(self._ask, client, distinct[name]): name for name in open_questions
            }
            while True:
                self._check_failed(failed, len(conversations))
                if not pending:
                    break
                check()
                done, _ = concurrent.futures.wait(
                    pending, _LOOK, concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    failed += uses[pending.pop(future)] * (future.result() is None)
                    bar.update(1)
        finally:
            client.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            client.close()
            bar.close()
        self._report(len(distinct), len(open_questions), failed, client)

    def _check_failed(self, failed: int, total: int) -> None:
        """Raise RewardError if too many questions have no usable answer."""
        allowed = self._config.reward.max_unlabelled
        if failed <= allowed * total:
            return
        settings = self._settings
        wanted = "'Final Verdict: A', 'B' or 'tie'"
        if settings.mode == "score":
            wanted = f"'Final Score: NUMBER' from {settings.lowest:g} to {settings.highest:g}"
        last = "none came"
        if self._useless is not None:
            last = f"the last answer was {shorten(self._useless)}, without a line {wanted}"
        raise RewardError(
            f"{failed} of {total} questions to the judge brought no usable answer, more than "
            f"reward.max_unlabelled={allowed} allows: {last}; all answers are kept in "
            f"{self._cache.path}: mend reward.judge.prompt or the server, or raise "
            "--config.reward.max_unlabelled, and run the same command again"
        )

    def _ask(self, client: JudgeClient, messages: Messages) -> Any:
        """Ask until an answer has a score or verdict; None if none has after all repeats."""
        found, repeat = self.look_up(messages)
        while found is None and repeat <= self._settings.repeats:
            try:
                answer = client.ask(self._body(messages))
            except Cancelled:
                return None
            if answer is None:  # no answer: another run may get one
                return None
            self._cache.put(
                self._key(messages, repeat),
                {
                    "model": self._settings.model,
                    "text": answer.text,
                    "finish_reason": answer.finish_reason,
                },
            )
            found, repeat = self.look_up(messages)
        return found

    def _key(self, messages: Messages, repeat: int) -> str:
        url = self._settings.url.removeprefix(CACHE_ONLY).rstrip("/")
        return make_key(url, self._body(messages), repeat)

    def _body(self, messages: Messages) -> JsonObject:
        return _make_body(self._settings, messages)

    def _report(self, distinct: int, asked: int, failed: int, client: JudgeClient) -> None:
        counts = client.counts
        reasons = "".join(f", {counts[name]} x {name}" for name in counts if name != "requests")
        logger.info(
            "judge: %d questions, %d of them answered before; %d requests%s; %d without a usable "
            "answer",
            distinct,
            distinct - asked,
            counts["requests"],
            reasons,
            failed,
        )


def _make_body(settings: JudgeConfig, messages: Messages) -> JsonObject:
    body = {"model": settings.model, "messages": messages, "temperature": 0}
    if settings.max_tokens:
        body["max_tokens"] = settings.max_tokens
    # A parameter that is None is left out: some models refuse a temperature.
    body |= schema.to_plain(settings.parameters)
    return {name: value for name, value in body.items() if value is not None}
