"""The judge: nothing lost, nothing invented, and a rerun costs nothing."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace as Reply

import httpx2
import pytest

from halos_jax.config import Config, ConfigError
from halos_jax.config.rewards import JudgeConfig, RewardConfig
from halos_jax.rewards.judge import scorer as judge
from halos_jax.rewards.judge.client import UnreachableError
from halos_jax.rewards.judge.scorer import (
    count_wins,
    join_verdicts,
    list_pairs,
    make_judge_scorer,
)
from halos_jax.rewards.labels import Labels, RewardError, label_samples
from halos_jax.types import FINISH_STOP, Prompt, Sample, Turn

TURNS = (Turn("system", "be kind"), Turn("user", "first?"), Turn("assistant", "one."))
PROMPT_FILE = "{{ turns | length }} {{ turns[-1].content }}|{{ response }}"
PAIR_FILE = "{{ turns[-1].content }}|{{ response_a }}|{{ response_b }}"


def make_samples(*groups: str):
    """Make a prompt of each text; its words are the outputs."""
    samples = []
    for number, words in enumerate(groups):
        prompt = Prompt(f"p{number}", (*TURNS, Turn("user", f"q{number}")), {"level": number})
        samples += [
            Sample(prompt, index, word, (1,), (2,), FINISH_STOP)
            for index, word in enumerate(words.split())
        ]
    return samples


@pytest.fixture
def make_config(server, tmp_path):
    def make(*, max_unlabelled=0.1, **settings) -> Config:
        mode = settings.get("mode", "score")
        path = tmp_path / f"{mode}.jinja"
        path.write_text(PROMPT_FILE if mode == "score" else PAIR_FILE)
        judge = JudgeConfig(
            url=server.url,
            model="m",
            key_variable="JUDGE_KEY",
            prompt=str(path),
            retries=2,
            timeout=5.0,
        )
        reward = RewardConfig(
            kind="judge",
            judge=dataclasses.replace(judge, **settings),
            max_unlabelled=max_unlabelled,
        )
        return Config(workdir=str(tmp_path / "run"), progress=False, reward=reward)

    return make


def read_cache(tmp_path):
    lines = (tmp_path / "run" / "judge.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_scores_come_in_order_and_a_rerun_asks_nothing(server, make_config, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    server.reply = lambda question, before: f"Fine.\nFinal Score: {len(question.split('|')[1])}"
    samples = make_samples("a bb a", "ccc a", "a")
    config = make_config(concurrency=3)
    score = make_judge_scorer(config)
    assert score(samples) == [1.0, 2.0, 1.0, 3.0, 1.0, 1.0]
    # Equal samples of a prompt share one question; every turn of the conversation is in it.
    assert sorted(server.questions) == ["4 q0|a", "4 q0|bb", "4 q1|a", "4 q1|ccc", "4 q2|a"]
    assert all(body["temperature"] == 0 and body["model"] == "m" for body in server.bodies)
    assert all(body["messages"][0]["role"] == "system" for body in server.bodies)
    assert server.most_at_once <= 3
    assert make_judge_scorer(config)(samples) == score(samples) == [1.0, 2.0, 1.0, 3.0, 1.0, 1.0]
    assert len(server.bodies) == 5 == len(read_cache(tmp_path))
    assert "5 questions, 5 of them answered before; 0 requests" in caplog.text
    # Another model, or another parameter, is another question.
    make_judge_scorer(make_config(parameters={"seed": 1, "temperature": None}))(samples[-1:])
    assert len(server.bodies) == 6 and server.bodies[-1]["seed"] == 1
    assert "temperature" not in server.bodies[-1]
    assert set(server.keys) == {"Bearer sk-secret-123"}
    written = (tmp_path / "run" / "judge.jsonl").read_text()
    assert "secret" not in written and "secret" not in caplog.text


def test_failures_that_pass_lose_nothing(server, make_config):
    troubles = [
        Reply(status=429, headers={"Retry-After": "0.1"}),
        Reply(status=429),
        Reply(status=500),
        Reply(hang_up=True),
        Reply(raw="garbage"),
        Reply(delay=0.6),
        Reply(text="I cannot say"),
        Reply(text="Final Score: 1", finish_reason="length"),
    ]
    order = {}

    def reply(question, before):
        trouble = troubles[order.setdefault(question, len(order)) % len(troubles)]
        return trouble if before == 0 else f"Final Score: {len(question.split('|')[1])}"

    server.reply = reply
    words = " ".join("x" * n for n in range(1, 9))
    samples = make_samples(words, words)
    assert make_judge_scorer(make_config(timeout=0.3))(samples) == [1, 2, 3, 4, 5, 6, 7, 8] * 2
    assert len(server.bodies) == 32


def test_an_answer_without_a_score_is_none_and_is_not_asked_for_again(
    server, make_config, tmp_path
):
    server.reply = lambda question, before: (
        "Hmm, 3 or 4." if "bad" in question else "Rating from 0 to 10: 7"
    )
    samples = make_samples("a bad", "b c", "bad d")
    config = make_config(max_unlabelled=0.5, repeats=1)
    labels = label_samples(make_judge_scorer(config), samples, config.reward)
    assert labels.rewards == [7.0, None, 7.0, 7.0, None, 7.0] and labels.unlabelled == 2
    assert len(server.bodies) == 4 + 2 * 2 == len(read_cache(tmp_path))
    assert make_judge_scorer(config)(samples) == labels.rewards
    assert len(server.bodies) == 8
    # With a lower limit the same answers stop the run, and still nothing is asked.
    config = make_config(max_unlabelled=0.3, repeats=1)
    with pytest.raises(RewardError, match=r"2 of 6 questions .* reward\.max_unlabelled=0\.3 "):
        make_judge_scorer(config)(samples)
    assert len(server.bodies) == 8


def test_a_server_that_dies_stops_the_run_early_and_keeps_what_it_said(server, make_config):
    def reply(question, before):
        return "Final Score: 4" if len(server.bodies) <= 5 else Reply(status=500)

    server.reply = reply
    samples = make_samples(*["a b c d"] * 10)
    config = make_config(concurrency=1, retries=0)
    with pytest.raises(RewardError, match=r"5 of 40 questions to the judge brought no usable"):
        make_judge_scorer(config)(samples)
    assert len(server.bodies) <= 12  # not all 40
    asked = len(server.bodies)
    server.reply = lambda question, before: "Final Score: 4"
    assert make_judge_scorer(config)(samples) == [4.0] * 40
    assert len(server.bodies) == asked + 35


def test_a_refusal_stops_the_run_with_one_error(server, make_config, caplog):
    server.reply = lambda *_: Reply(status=401, raw="bad key sk-secret-123")
    with pytest.raises(RewardError, match=r"answers 401 .* check reward\.judge\.url") as caught:
        make_judge_scorer(make_config(concurrency=2))(make_samples("a b c d e f"))
    assert len(server.bodies) <= 4
    assert "secret" not in str(caught.value) + caplog.text


def test_a_stop_leaves_within_a_moment(server, make_config):
    server.reply = lambda *_: Reply(status=429, headers={"Retry-After": "300"})

    class Stop(Exception):
        pass

    def check():
        if server.bodies:
            raise Stop

    with pytest.raises(Stop):
        make_judge_scorer(make_config(), check)(make_samples("a b"))


def test_a_killed_run_asks_only_for_the_rest(server, make_config, tmp_path):
    # The process is killed, without any warning, in the middle of its fifth question.
    program = """
        import os, sys
        from halos_jax.config import Config
        from halos_jax.config.rewards import JudgeConfig, RewardConfig
        from halos_jax.rewards.judge import scorer as judge
        from halos_jax.types import Prompt, Sample, Turn

        url, workdir, file = sys.argv[1:]
        settings = JudgeConfig(
            url=url, model="m", key_variable="JUDGE_KEY", prompt=file, concurrency=1, timeout=5.0
        )
        reward = RewardConfig(kind="judge", judge=settings)
        config = Config(workdir=workdir, progress=False, reward=reward)
        prompt = Prompt("p", (Turn("user", "q"),))
        samples = [Sample(prompt, i, "x" * i, (1,), (2,), "stop") for i in range(8)]
        asked, original = [], judge.JudgeClient.ask
        def ask(self, body):
            asked.append(body)
            return os._exit(9) if len(asked) == 5 else original(self, body)
        if os.environ.get("KILL"):
            judge.JudgeClient.ask = ask
        print(judge.make_judge_scorer(config)(samples))
    """
    server.reply = lambda question, before: f"Final Score: {len(question.split('|')[1])}"
    make_config()
    arguments = [server.url, str(tmp_path / "run"), str(tmp_path / "score.jinja")]
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    run = {"capture_output": True, "text": True, "cwd": Path(__file__).parents[3]}
    killed = subprocess.run(command, env=os.environ | {"KILL": "1"}, **run)
    assert killed.returncode == 9 and len(server.bodies) == 4 == len(read_cache(tmp_path))
    # And a line was cut short, as by a power failure.
    with open(tmp_path / "run" / "judge.jsonl", "a") as file:
        file.write('{"key": "abc", "te')
    again = subprocess.run(command, **run)
    assert again.stdout.strip() == str([float(n) for n in range(8)]), again.stderr
    assert len(server.bodies) == 8 and len(set(server.questions)) == 8


# --------------------------------------------------------------------------- comparisons


def test_comparisons_in_both_orders_become_shares_of_wins(server, make_config):
    def reply(question, before):
        _, first, second = question.split("|")
        if {first, second} == {"b", "ccc"}:
            return "Final Verdict: A"  # whichever stands first: no preference at all
        return f"Final Verdict: {'A' if len(first) > len(second) else 'B'}"

    server.reply = reply
    samples = make_samples("a b ccc", "aa aa a")
    samples[1] = dataclasses.replace(samples[1], output="b")
    config = make_config(mode="compare")
    labels = make_judge_scorer(config)(samples)
    # p0: a against b is B in both orders, which is discord; ccc beats a; b and ccc are a tie.
    assert labels.rewards[:3] == [0.25, 0.5, 0.75]
    # p1: the equal texts tie without being asked about.
    assert labels.rewards[3:] == [0.75, 0.75, 0.0]
    assert labels.counts == {"comparisons": 6, "ties": 3, "undecided": 0}
    # Both orders of the 3 pairs of p0, and of the one pair of texts of p1.
    assert len(server.bodies) == 6 + 2
    assert label_samples(make_judge_scorer(config), samples, config.reward) == labels
    assert len(server.bodies) == 8


def test_a_comparison_without_a_verdict_is_left_out(server, make_config):
    server.reply = lambda question, before: (
        "No idea" if "|a|b" in question else f"Final Verdict: {'AB'['|c' in question]}"
    )
    samples = make_samples("a b c", "a b")
    config = make_config(mode="compare", repeats=0, max_unlabelled=0.5)
    labels = label_samples(make_judge_scorer(config), samples, config.reward)
    assert labels.rewards[3:] == [None, None] and labels.unlabelled == 2
    assert None not in labels.rewards[:3] and labels.counts["undecided"] == 2


def test_pairs_verdicts_and_wins():
    samples = make_samples("a b c d", "e", "f g")
    assert list_pairs(samples, "neighbours") == [(0, 1), (1, 2), (2, 3), (5, 6)]
    everything = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3), (5, 6)]
    assert list_pairs(samples, "all") == everything
    verdicts = {
        ("A", "B"): 1.0,
        ("B", "A"): 0.0,
        ("A", "A"): 0.5,
        ("B", "B"): 0.5,
        ("tie", "tie"): 0.5,
        ("A", "tie"): 0.5,
        ("A", None): None,
        (None, None): None,
    }
    assert {pair: join_verdicts(*pair) for pair in verdicts} == verdicts
    found = count_wins(4, {(0, 1): 1.0, (1, 2): 0.5, (0, 2): None})
    assert found == Labels(
        [1.0, 0.25, 0.5, None], counts={"comparisons": 3, "ties": 1, "undecided": 1}
    )


def test_no_key_and_no_template_are_found_before_anything_is_asked(
    server, make_config, monkeypatch
):
    with pytest.raises(ConfigError, match=r"reward\.judge\.rubric: got 'missing\.jinja'"):
        make_judge_scorer(make_config(rubric="missing.jinja"))
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ConfigError, match="variable JUDGE_KEY holds nothing"):
        make_judge_scorer(make_config())
    assert not server.bodies


DEAD = "http://127.0.0.1:9/v1"


def test_a_probe_has_the_parameters_of_the_run_and_stops_it_before_anything_else(
    server, make_config
):
    server.reply = lambda question, before: "yes"
    assert judge.probe_judge(make_config(parameters={"seed": 7}, max_tokens=5))
    (body,) = server.bodies
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "Answer with the word yes."}],
        "temperature": 0,
        "max_tokens": 5,
        "seed": 7,
    }
    server.reply = lambda question, before: Reply(status=401, raw="no such key")
    with pytest.raises(RewardError, match=r"answers 401 .*no such key"):
        judge.probe_judge(make_config())
    with pytest.raises(RewardError, match=r"nothing listens at 127\.0\.0\.1:9"):
        judge.probe_judge(make_config(url=DEAD))


def test_answers_on_disk_need_no_server(server, make_config, caplog, monkeypatch):
    samples = make_samples("a b")
    config = make_config()
    expected = make_judge_scorer(config)(samples)
    server.reply = lambda question, before: Reply(status=401, raw="nothing listens to you")
    with pytest.raises(RewardError, match="answers 401"):  # a server that is there is no dead one
        judge.probe_judge(config)
    asked = len(server.bodies)

    def refuse(*_, **__):
        raise httpx2.ConnectError("[Errno 111] Connection refused")

    monkeypatch.setattr(httpx2.Client, "send", refuse)
    assert make_judge_scorer(config)(samples) == expected
    assert not judge.probe_judge(config)
    assert "2 answers are on disk: continuing with these" in caplog.text
    start = time.monotonic()
    with pytest.raises(UnreachableError, match="nothing listens at"):
        make_judge_scorer(config)(make_samples("a b c"))
    assert time.monotonic() - start < 1 and len(server.bodies) == asked


def test_a_server_that_was_there_is_waited_for(server, make_config):
    """Known by the probe, or lost between two rounds: the retries are for that."""
    server.reply = lambda question, before: Reply(hang_up=True) if before < 1 else "Final Score: 3"
    score = make_judge_scorer(make_config(), is_known=True)
    assert score(make_samples("a")) == [3.0]


def test_too_many_answers_without_a_score_show_the_last_one(server, make_config, tmp_path):
    server.reply = lambda question, before: "I think it is\n good"
    with pytest.raises(RewardError) as caught:
        make_judge_scorer(make_config(repeats=0, highest=5.0))(make_samples("a b"))
    message = str(caught.value)
    assert " of 2 questions to the judge brought no usable answer, more than " in message
    assert "the last answer was 'I think it is\\n good', without a line 'Final Score: NUMBER' " in (
        message
    )
    assert f"from 0 to 5; all answers are kept in {tmp_path / 'run' / 'judge.jsonl'}" in message


def test_from_its_answers_alone_no_judge_is_asked(make_config, server):
    """The answers are those of the server that would have been asked."""
    config, samples = make_config(), make_samples("1 2 3")
    known = list(make_judge_scorer(config)(samples[:2]))
    settings = dataclasses.replace(
        config.reward.judge, url=judge.CACHE_ONLY + config.reward.judge.url, key_variable=""
    )
    reward = dataclasses.replace(config.reward, judge=settings)
    offline = dataclasses.replace(config, reward=reward)
    asked = len(server.bodies)
    assert judge.probe_judge(offline) is False
    assert list(make_judge_scorer(offline)(samples)) == [*known, None]
    assert len(server.bodies) == asked
