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
from halos_jax.data.records.fields import shorten
from halos_jax.metrics import make_progress
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

_PROBE = "Answer with the word yes."
_LOOK = 0.5  # seconds between two looks at whether the run must stop
_POINTS = {"A": 1.0, "B": 0.0, "tie": 0.5}  # of the sample that stands as A
Parse = Callable[[str], Any]


def probe_judge(config: Config) -> bool:
    """Send the judge one small question, so that a dead one is known before anything is sampled.

    It costs one request of the config's own parameters, with an answer of a word. Where there is no
    server but answers of an earlier run are on disk, they may be all that is needed: that is only
    said. Returns whether the server is there.

    Raises:
      ConfigError: where there is no key, or a template or an address that cannot be used.
      RewardError: where there is no server, or it refuses the request.
    """
    settings = config.reward.judge
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
        logger.warning("%s (%d answers are on disk: going on with these)", error, len(cache))
        return False
    finally:
        client.close()
    return True


def find_cache(config: Config) -> Path:
    """Return the file of a run's answers."""
    return Path(config.reward.judge.cache or Path(config.workdir) / "judge.jsonl")


def make_judge_scorer(
    config: Config, check: Callable[[], None] = lambda: None, *, is_known: bool = False
) -> Scorer:
    """Return the scorer that asks the judge of `config.reward.judge`.

    In mode "score" a sample's reward is the judge's score. In mode "compare" it is the share of its
    comparisons with other samples of its prompt that it wins. Two samples are compared in both
    orders: the same verdict twice counts 1 or 0, two that differ, or a tie, count 1/2 for both.
    Samples with one text share their answers, and a pair of them is a tie that nobody is asked
    about.

    Every answer is kept in `reward.judge.cache`, and what is there is never asked again. Where
    several processes run, process 0 asks and the others read its file.

    Args:
      check: is called now and then while the scorer waits; what it raises stops the scorer.
      is_known: `probe_judge` has had an answer; else a server that is not there is no error that
        may pass when it is first needed.

    Raises:
      ConfigError: where there is no key, or a template that cannot be used.
    """
    settings = config.reward.judge
    key = load_key(settings.key_variable)
    question = make_question(settings)
    check_url(settings.url)
    cache, met = AnswerCache(find_cache(config)), threading.Event()
    if is_known:
        met.set()

    def ask(conversations: Sequence[Messages], parse: Parse) -> list[Any]:
        asker = _Asker(config, cache, parse)
        if jax.process_index() == 0:
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
    """Return the pairs of indices of samples of one prompt: "all", or "neighbours" alone."""
    groups: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        groups.setdefault(sample.prompt.prompt_id, []).append(index)
    if which == "all":
        return [pair for group in groups.values() for pair in itertools.combinations(group, 2)]
    return [pair for group in groups.values() for pair in itertools.pairwise(group)]


def join_verdicts(first: str | None, second: str | None) -> float | None:
    """Return the points of a pair's first sample: 1, 0 or, for a tie or discord, 1/2.

    Args:
      first: the verdict where that sample stands as A; `second`: where it stands as B. The result
        is None where one of them is.
    """
    if first is None or second is None:
        return None
    here, swapped = _POINTS[first], 1.0 - _POINTS[second]
    return here if here == swapped else 0.5


def count_wins(count: int, points: dict[tuple[int, int], float | None]) -> Labels:
    """Return the share of points that each of `count` samples has of its comparisons.

    A comparison without points is left out. The counts have: comparisons; ties; undecided.
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
    """One pass over questions: which of them are answered, and who asks the rest."""

    def __init__(self, config: Config, cache: AnswerCache, parse: Parse):
        self._config, self._cache, self._parse = config, cache, parse
        self._settings: JudgeConfig = config.reward.judge
        self._useless: str | None = None  # the last answer without what is wanted

    def look_up(self, messages: Messages) -> tuple[Any, int]:
        """Return (what the answers on disk say or None, how many of them there are)."""
        for repeat in range(self._settings.repeats + 1):
            answer = self._cache.get(self._key(messages, repeat))
            if answer is None:
                return None, repeat
            # What was cut by the token limit may be the first half of a number.
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
        """Ask what is not on disk yet, `concurrency` at a time.

        `met` is set where the server is known to be there, and from its first contact on.

        Raises:
          RewardError: where the server refuses, or too many questions stay without an answer. The
            answers of all requests under way are kept.
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
        bar = make_progress(len(open_questions), "judge", enabled=self._config.progress)
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
        """Raise RewardError where too many questions have no answer that can be used."""
        allowed = self._config.reward.max_unlabelled
        if failed <= allowed * total:
            return
        settings = self._settings
        wanted = "'Final Verdict: A', 'B' or 'tie'"
        if settings.mode == "score":
            wanted = f"'Final Score: NUMBER' from {settings.lowest:g} to {settings.highest:g}"
        last = "none came"
        if self._useless is not None:
            last = f"the last answer was {shorten(self._useless)}, wanted was a line {wanted}"
        raise RewardError(
            f"{failed} of {total} questions to the judge brought no answer that can be used, more "
            f"than reward.max_unlabelled={allowed} allows: {last}; all answers are in "
            f"{self._cache.path}, and are kept: mend reward.judge.prompt or the server, or raise "
            "--config.reward.max_unlabelled, and run the same command again"
        )

    def _ask(self, client: JudgeClient, messages: Messages) -> Any:
        """Ask until an answer has what is wanted; None where none of them has."""
        found, repeat = self.look_up(messages)
        while found is None and repeat <= self._settings.repeats:
            try:
                answer = client.ask(self._body(messages))
            except Cancelled:
                return None
            if answer is None:  # not an answer: another run may get one
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
        return make_key(self._settings.url.rstrip("/"), self._body(messages), repeat)

    def _body(self, messages: Messages) -> dict[str, Any]:
        return _make_body(self._settings, messages)

    def _report(self, distinct: int, asked: int, failed: int, client: JudgeClient) -> None:
        counts = client.counts
        reasons = "".join(f", {counts[name]} x {name}" for name in counts if name != "requests")
        logger.info(
            "judge: %d questions, %d of them answered before; %d requests%s; %d without an answer "
            "that can be used",
            distinct,
            distinct - asked,
            counts["requests"],
            reasons,
            failed,
        )


def _make_body(settings: JudgeConfig, messages: Messages) -> dict[str, Any]:
    body = {"model": settings.model, "messages": messages, "temperature": 0}
    if settings.max_tokens:
        body["max_tokens"] = settings.max_tokens
    # A parameter that is None is not sent: some models refuse a temperature.
    body |= schema.to_plain(settings.parameters)
    return {name: value for name, value in body.items() if value is not None}
