"""What a manifest and the log say of a verdict."""

import json
from types import SimpleNamespace

from halos_jax.course.verdicts import (
    NO_VERDICT,
    Broken,
    Verdict,
    describe_beyond,
    describe_stop,
    describe_verdict,
    make_change,
    read_verdict,
    scale_rate,
)
from halos_jax.signs.intervals import Estimate

BEYOND = Broken("guard.max_kl", (2, 3), (12.0, 13.25), 10.0)
FALLEN = Broken("guard.fall", (3,), (-0.05,), None, ((-0.08, -0.02),))


def record(decision):
    return SimpleNamespace(round=3, metrics={}, decisions={"guard": decision})


def test_a_verdict_is_read_as_it_was_written():
    change = {"reward_change": make_change(4, Estimate(-0.05, -0.08, -0.02))}
    for verdict in (
        NO_VERDICT,
        Verdict("warn", (BEYOND, FALLEN)),
        Verdict("retry", (Broken("guard.min_margin", (1,), (-1.0,), 0.0),), 0, 0.5, 1),
        Verdict("stop", (FALLEN,), retries=3),
    ):
        plain = json.loads(json.dumps(verdict.to_record()))
        assert plain == verdict.to_record()
        assert read_verdict(record(plain | change)) == verdict
    assert change["reward_change"] == {"than": 4, "value": -0.05, "low": -0.08, "high": -0.02}
    assert read_verdict(record(change)) == NO_VERDICT and read_verdict(None) == NO_VERDICT
    assert read_verdict(SimpleNamespace(decisions={})) == NO_VERDICT
    finals = [Verdict(action).is_final for action in ("none", "warn", "stop", "retry")]
    assert finals == [False, False, True, True]


def test_the_learning_rate_is_lowered_by_each_way_back():
    back = {"action": "retry", "to": 0, "rate_factor": 0.5}
    rounds = [record({}), record(back), record({"action": "warn"}), record(back | {"to": 1})]
    assert [scale_rate(rounds[:count]) for count in range(5)] == [1, 1, 0.5, 0.5, 0.25]


def test_a_verdict_is_said_with_its_numbers_and_what_to_change():
    said = describe_verdict(Verdict("warn", (BEYOND, FALLEN)), 3)
    assert "round 3 is beyond guard.max_kl=10" in said
    assert "KL from the SFT model, nats a response: 12, 13.25 in rounds 2, 3" in said
    assert (
        "guard.fall (change of the held-out reward against its highest: -0.05 [-0.08, -0.02])"
        in (said)
    )
    assert "it goes on (guard.action=warn)" in said
    assert said.count("lower optimizer.learning_rate") == 2 and "beta" in said
    back = describe_verdict(Verdict("retry", (FALLEN,), 2, 0.5), 3)
    assert (
        "starts from round 2, the best within the bounds so far, with the learning rate times 0.5"
        in back
    )
    assert "starts from the SFT model" in describe_verdict(Verdict("retry", (FALLEN,), 0, 0.5), 3)
    assert "ends here (guard.action=stop)" in describe_verdict(Verdict("stop", (FALLEN,)), 3)
    tried = describe_verdict(Verdict("stop", (FALLEN,), retries=3), 3)
    assert "ends here: it has gone back 3 times (guard.max_retries)" in tried


def test_in_the_last_round_no_next_one_is_promised():
    back = describe_verdict(Verdict("retry", (FALLEN,), 2, 0.5), 3, is_last=True)
    assert "it was the last round; a further one, with more prompts, starts from round 2" in back
    assert "the next round" not in back
    warned = describe_verdict(Verdict("warn", (FALLEN,)), 3, is_last=True)
    assert "it was the last round (guard.action=warn)" in warned and "it goes on" not in warned
    stop = describe_stop(Verdict("stop", (BEYOND,)), 3, is_last=True)
    assert "guard.action=warn, raise rounds.total_prompts (it is used up), and run" in stop


def test_a_run_that_was_ended_says_why_and_how_it_goes_on():
    said = describe_stop(Verdict("stop", (BEYOND,), retries=2), 3)
    assert said.startswith("the guard has ended the run after round 3: guard.max_kl=10 (")
    assert "and 2 retries (guard.max_retries); to go on, change the bound or set --config" in said
    assert "retries" not in describe_stop(Verdict("stop", (BEYOND,)), 3)


def test_an_exported_policy_beyond_a_bound_is_said_with_its_numbers():
    said = describe_beyond(4, (BEYOND,))
    assert said.startswith("final/ holds the policy of round 4, which is beyond guard.max_kl=10 (")
    assert "12, 13.25 in rounds 2, 3" in said
