"""The rewards of held-out samples that are not trained on."""

import dataclasses

import pytest

from halos_jax.config import (
    Config,
    ConfigError,
    EvalConfig,
    GuardConfig,
    RewardConfig,
    RoundsConfig,
)
from halos_jax.config.rewards import JudgeConfig, PartConfig, ScorerConfig
from halos_jax.rewards import held_out, scorers
from halos_jax.rewards.functions import numeric_answer
from halos_jax.rewards.labels import RewardError
from halos_jax.types import Prompt, Sample, Turn

NUMERIC = f"halos_jax.rewards.functions:{numeric_answer.__name__}"
RULES = "tests.rewards.test_held_out"


def long(prompt, response, *, least=3):
    return float(len(response) >= least)


def some(prompt, response):
    return None if response == "" else 1.0


def make_config(*, task="online", reward=None, **parts):
    made = {name: ScorerConfig(**{"kind": "function", **part}) for name, part in parts.items()}
    reward = reward or RewardConfig(path="m")
    return Config(task=task, reward=reward, eval=EvalConfig(scorers=made))


def draw(*outputs, **extra):
    prompt = Prompt("p", (Turn("user", "2 + 2?"),), extra)
    return [Sample(prompt, n, text, (1,), (2,), "length") for n, text in enumerate(outputs)]


def test_rules_and_scorers_have_their_names_and_own_settings():
    config = make_config(
        # What is subtracted or cut for the reward is no matter of a scorer.
        reward=RewardConfig(
            path="m",
            rules=(f"{RULES}:some",),
            missing_eos_penalty=5.0,
            cut_at_sentence=True,
            arguments={"least": 9},
        ),
        right={"function": NUMERIC},
        long={"function": f"{RULES}:long", "arguments": {"least": 2}},
    )
    made = held_out.make_scorers(config, None, None)
    samples = draw("4", "so 4.", answer="4")
    assert list(made) == ["some", "right", "long"]
    assert made["some"](samples) == [1.0, 1.0]
    assert made["right"](samples).rewards == [1.0, 1.0]
    assert made["long"](samples).rewards == [0.0, 1.0]


def test_a_model_s_batches_have_the_name_of_its_scorer(monkeypatch):
    seen = []

    def make(config, mesh, renderer, layouts, name, check):
        seen.append((config.reward.path, config.reward.parts, name, layouts, check))
        return lambda samples: [0.5] * len(samples)

    monkeypatch.setattr(scorers, "_make_single_scorer", make)
    reward = RewardConfig(parts={"a": PartConfig(path="a")})
    config = make_config(reward=reward, gold={"kind": "model", "path": "g"})
    check, layouts = (lambda: None), object()
    made = held_out.make_scorers(config, None, None, check, layouts)
    assert seen == [("g", {}, "scorer gold", layouts, check)]
    assert made["gold"](draw("x")).rewards == [0.5]


def test_errors_name_the_scorer_s_own_fields():
    with pytest.raises(ConfigError, match=r"^eval\.scorers\.right\.function: got 'absent:f'"):
        held_out.make_scorers(make_config(right={"function": "absent:f"}), None, None)
    config = make_config(right={"function": NUMERIC})
    scorer = held_out.make_scorers(config, None, None)["right"]
    with pytest.raises(RewardError, match=r"^eval\.scorers\.right\.function "):
        scorer(draw("4"))
    with pytest.raises(RewardError, match=r"eval\.scorers\.right\.function "):
        held_out.check_held_out(config, [one.prompt for one in draw("4")])
    # As many as reward.max_unlabelled may have no score.
    for allowed in (0.4, 0.5):
        reward = RewardConfig(path="m", max_unlabelled=allowed)
        config = make_config(reward=reward, s={"function": f"{RULES}:some"})
        scorer = held_out.make_scorers(config, None, None)["s"]
        if allowed == 0.5:
            assert scorer(draw("", "x")).rewards == [None, 1.0]
            continue
        with pytest.raises(RewardError, match="1 of 2 samples have no reward"):
            scorer(draw("", "x"))


def test_prompts_that_a_scorer_cannot_score_are_left_out_where_that_is_asked_for(caplog):
    prompts = [draw("x", answer="4")[0].prompt, draw("x")[0].prompt]
    config = make_config(right={"function": NUMERIC})
    assert held_out.check_held_out(config, prompts, skip=True) == prompts[:1]
    assert "1" in caplog.text
    # Neither has a task without held-out samples a use for scorers, nor may it fail for them.
    assert held_out.check_held_out(make_config(task="label", right={}), prompts) == prompts
    assert held_out.make_scorers(make_config(task="label", right={}), None, None) == {}


def test_scores_that_compare_one_policy_s_samples_are_told_apart():
    compare = JudgeConfig(mode="compare")
    parts = {"a": PartConfig(normalise="prompt"), "b": PartConfig()}
    assert held_out.find_relative(make_config()) == set()
    assert held_out.find_relative(make_config(reward=RewardConfig(parts=parts))) == {""}
    found = make_config(
        reward=RewardConfig(kind="judge", judge=compare, parts={"b": parts["b"]}),
        pairs={"kind": "judge", "judge": compare},
        each={"kind": "judge"},
        rule={"judge": compare},  # a function, whatever its judge
    )
    assert held_out.find_relative(found) == {"pairs"}
    parts["b"] = PartConfig(kind="judge", judge=compare)
    del parts["a"]
    assert held_out.find_relative(make_config(reward=RewardConfig(parts=parts))) == {""}


COMPARE = {"kind": "judge", "judge": JudgeConfig(mode="compare")}
WHOLE, CENTRED = PartConfig(kind="function"), PartConfig(kind="function", normalise="file")


@pytest.mark.parametrize(
    ("reward", "is_fixed"),
    [
        (RewardConfig(path="m"), False),
        (RewardConfig(**COMPARE), True),
        (RewardConfig(kind="judge", judge=JudgeConfig(mode="score")), False),
        (RewardConfig(parts={"a": CENTRED}), True),
        (RewardConfig(parts={"a": CENTRED, "b": PartConfig(**COMPARE)}), True),
        # A part that is as it is moves the mean, whatever the other does.
        (RewardConfig(parts={"a": CENTRED, "b": WHOLE}), False),
    ],
)
def test_no_round_is_chosen_by_a_mean_that_is_the_same_for_every_policy(reward, is_fixed, caplog):
    config = make_config(reward=reward)
    assert held_out.has_fixed_mean(reward) == is_fixed
    held_out.check_means(config, is_watched=False)
    assert not caplog.text
    held_out.check_means(config, is_watched=True)
    assert ("by reward_eval no round is the best" in caplog.text) == is_fixed
    choosing = [("rounds", RoundsConfig(keep_best=True)), ("guard", GuardConfig(action="retry"))]
    for section, settings in choosing:
        asked = dataclasses.replace(config, **{section: settings})
        if is_fixed:
            with pytest.raises(ConfigError, match=f"{section}.*its mean is the same for every"):
                held_out.check_means(asked, is_watched=True)
        else:
            held_out.check_means(asked, is_watched=True)


def test_the_guard_takes_no_scorer_whose_mean_cannot_fall():
    config = make_config(one=COMPARE, other={})
    for name, is_fixed in (("one", True), ("other", False)):
        asked = dataclasses.replace(config, guard=GuardConfig(scorer=name))
        if is_fixed:
            with pytest.raises(ConfigError, match="scorer: got 'one'"):
                held_out.check_means(asked, is_watched=True)
        else:
            held_out.check_means(asked, is_watched=True)
