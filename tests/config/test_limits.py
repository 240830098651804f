import typing

import pytest

from halos_jax.config import Config, Task, limits, schema
from halos_jax.config.kinds import REWARD_KINDS, RewardSpec
from halos_jax.config.rewards import PartConfig, ScorerConfig

# A config of each task that is right; each case below breaks it in one way.
RIGHT = {
    "task": "online",
    "model.path": "model",
    "data.train": "train.jsonl",
    "reward.path": "reward",
    "train.max_length": 2560,
    "reward.max_length": 2560,
}


def violations(**changes):
    values = dict(schema.flatten(schema.to_plain(Config()))) | RIGHT
    paths = {path.replace("__", "."): value for path, value in changes.items()}
    assert paths.keys() <= values.keys(), "a case must change fields that exist"
    return list(limits.find_violations(values | paths))


def test_a_kind_of_reward_may_need_nothing(monkeypatch):
    row = RewardSpec(make="a:b", check="a:b")
    monkeypatch.setattr(limits, "REWARD_KINDS", REWARD_KINDS | {"new": row})
    assert violations(reward__kind="new", reward__path="") == []
    assert len(violations(reward__kind="model", reward__path="")) == 1


TASKS = sorted(set(typing.get_args(Task)) - {"pipeline", "eval", "compare"})


@pytest.mark.parametrize("task", TASKS)
def test_right_configs_pass(task):
    assert violations(task=task) == []


def test_a_comparison_needs_two_files():
    named = [line.partition(":")[0] for line in violations(task="compare")]
    assert named == ["data.eval", "eval.second_samples"]
    files = {"data__eval": "a", "eval__second_samples": "b"}
    assert violations(task="compare", **files) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"mesh__data": 0}, "mesh: got {'data': 0, 'fsdp': 1, 'tensor': 1}"),
        (
            {"lora__rank": 8, "lora__path": "adapter"},
            "lora.rank: got 8, but the adapter of lora.path has a rank, alpha and targets of its",
        ),
        ({"lora__alpha": 16.0}, "lora.alpha: got 16.0, but lora.rank=0 trains all weights"),
        (
            {"lora__alpha": 16.0, "lora__path": "adapter"},
            "lora.alpha: got 16.0, but the adapter of lora.path has its own",
        ),
        ({"lora__targets": ("q_proj",)}, "lora.targets: got ['q_proj'], but lora.rank=0"),
        ({"lora__base": "nf4"}, "lora.base: got 'nf4', but without an adapter all weights are"),
        ({"lora__rank": 8, "lora__targets": ()}, "lora.targets: got (), allowed: 'all-linear'"),
        ({"mesh__fsdp": -1}, "-1 for one axis at most"),  # mesh.data is -1 by default
        ({"mesh__tensor": -2}, "sizes of 1 or more"),
        ({"workdir": ""}, "workdir: got ''"),
        ({"model__path": ""}, "model.path: got ''"),
        ({"data__train": ""}, "data.train: got ''"),
        ({"data__n_examples": 5}, "data.n_examples: got 5, allowed with task='online': 0"),
        ({"data__frac_unique_desirable": 0.5}, "data.frac_unique_desirable: got 0.5, allowed with"),
        ({"loss.name": None}, "loss.name: got None"),
        (
            {"loss.name": "csft", "data__bad_token": "<|good|>"},
            "data.good_token, data.bad_token: got ('<|good|>', '<|good|>'), allowed: two texts",
        ),
        ({"sampling__stop": [""]}, "sampling.stop: got an empty string"),
        (
            {"sampling__exact_ratios": True, "sampling__temperature": 0.0},
            "sampling.exact_ratios: got True, allowed with sampling.temperature=0: False",
        ),
        (
            {"sampling__exact_ratios": True, "sampling__top_k": 65},
            "sampling.top_k: got 65, allowed with sampling.exact_ratios: at most sampling.max_kept",
        ),
        ({"reward__rules": ["a:f", "b:f"]}, "reward.rules: got ['f', 'f'], allowed: functions of"),
        ({"reward__rules": ["a:low"]}, "reward.rules: got ['low'], allowed: functions of"),
        (
            {"data__holdout": 4, "data__eval": "e"},
            "data.holdout: got 4, but data.eval='e' is held out too; allowed: one of them",
        ),
        (
            {"task": "sft", "data__holdout": 4, "data__max_eval": 2},
            "data.max_eval: got 2, allowed with data.holdout: 0",
        ),
        (
            {"data__holdout": 4, "data__eval_split": "a"},
            "data.eval_split: got 'a', allowed with data.holdout: ''",
        ),
        ({"task": "align", "data__test": "t"}, "data.test: got 't', allowed with task='align': ''"),
        ({"eval__test_temperature": -1.0}, "eval.test_temperature: got -1.0, allowed: 'auto', or"),
        (
            {"eval__test_temperature": 0.0, "eval__test_samples": 2},
            "eval.test_samples: got 2, allowed with eval.test_temperature=0: 0 or 1",
        ),
        ({"model__added_tokens": ["a", "a"]}, "model.added_tokens: got ['a', 'a']"),
        ({"model__added_tokens": [""]}, "allowed: distinct tokens that are not empty"),
        ({"reward__path": ""}, "reward.path: got '', but reward.kind='model'"),
        ({"reward__kind": "function"}, "reward.function: got '', but reward.kind='function'"),
        ({"reward__kind": "judge"}, "reward.judge.model: got '', but reward.kind='judge'"),
        (
            {"reward__judge__key_variable": "sk-12"},
            "reward.judge.key_variable: got what is no name",
        ),
        (
            {"reward__judge__url": "localhost:80/v1"},
            "reward.judge.url: got what is no plain address",
        ),
        ({"reward__judge__url": "http://user:word@host/v1"}, "without a user, a password or a key"),
        ({"reward__judge__url": "http://host/v1?key=word"}, "without a user, a password or a key"),
        ({"reward__judge__lowest": 10.0}, "reward.judge.lowest: got 10.0, allowed: less than"),
        ({"sampling__num_samples_per_prompt": 1}, "allowed: 2 or more"),
        (
            {"sampling__num_samples_per_prompt": 1, "feedback__type": "scalar"},
            "feedback.type='scalar' compares the samples of a prompt",
        ),
        ({"sampling__num_samples_per_prompt": 1, "loss.name": "ppo"}, "allowed: 2 or more"),
        ({"train__max_length": 2559}, "train.max_length: got 2559"),
        ({"reward__max_length": 2559}, "cut before it is scored"),
        (
            {"task": "sft", "model__checkpoint": 3},
            "model.checkpoint: got 3, allowed for",
        ),
        ({"rounds__keep_best": True}, "rounds.keep_best: got True, but there are no held-out"),
        ({"guard__action": "retry"}, "guard.action: got 'retry', but there are no held-out"),
        (
            {"guard__action": "retry", "rounds__keep_best": False, "data__eval": "e"},
            "rounds.keep_best: got False, but guard.action='retry' goes back to the best round",
        ),
        (
            {"guard__scorer": "g", "data__eval": "e", "reward__rules": ["a:f"]},
            "guard.scorer: got 'g', allowed: one of eval.scorers: f",
        ),
        ({"task": "sample", "sampling__format": "alpacaeval"}, "has one output an instruction"),
        (
            {
                "task": "sample",
                "sampling__format": "alpacaeval",
                "sampling__num_samples_per_prompt": 1,
                "rounds__passes": 2,
            },
            "rounds.passes: got 2, but sampling.format='alpacaeval'",
        ),
        ({"task": "sample", "sampling__best_of": True, "reward__path": ""}, "reward.path: got ''"),
        (
            {
                "task": "sample",
                "sampling__format": "alpacaeval",
                "sampling__best_of": True,
                "sampling__output": "out.jsonl",
            },
            "sampling.output: got 'out.jsonl', but alpaca_eval tells",
        ),
        ({"task": "label", "feedback__threshold": "mean"}, "feedback.threshold: got 'mean'"),
        ({"task": "eval"}, "data.eval: got ''"),
        ({"task": "eval", "data__eval": "e", "reward__path": ""}, "reward.path: got ''"),
        ({"task": "export", "model__path": ""}, "model.path: got ''"),
        ({"task": "toy_data", "toy__alphabet": "aab"}, "toy.alphabet: got 'aab'"),
        ({"task": "toy_data", "toy__alphabet": "a1"}, "toy.alphabet: got 'a1'"),
        ({"task": "toy_data", "toy__max_letters": 3}, "toy.max_letters: got 3, allowed: 4 (see"),
        ({"task": "toy_data", "toy__max_letters": 11}, "allowed: 4 (see toy.min_letters) to 10"),
        ({"task": "toy_data", "toy__alphabet": "abcdef"}, "allowed: 889, half of those"),
    ],
)
def test_each_combination_has_its_error(changes, expected):
    (line,) = violations(**changes)
    assert expected in line
    # What may hold a secret is not repeated.
    assert "sk-12" not in line and "word@" not in line and "=word" not in line


def test_exact_ratios_by_auto_are_refused_nowhere():
    assert violations(sampling__exact_ratios="auto", sampling__temperature=0.0) == []
    assert violations(sampling__exact_ratios="auto", sampling__top_k=65) == []


def test_a_reward_function_needs_no_reward_length():
    changes = {"reward__kind": "function", "reward__function": "m:f", "reward__max_length": 1}
    assert violations(**changes) == []


def test_what_the_parts_of_a_reward_need_is_not_asked_of_the_sum():
    values = dict(schema.flatten(schema.to_plain(Config()))) | RIGHT
    part = PartConfig(path="reward", max_length=2560)
    values |= {"reward.path": "", "reward.max_length": 1}
    values |= dict(schema.flatten(schema.to_plain(part), "reward.parts.a."))
    assert list(limits.find_violations(values)) == []


def test_tasks_ask_only_for_what_they_use():
    assert violations(task="toy_data", model__path="", data__train="") == []
    assert violations(task="sft", reward__path="", sampling__num_samples_per_prompt=1) == []


def test_the_threshold_suits_the_type_of_feedback():
    def lines(type, threshold):
        return violations(feedback__type=type, feedback__threshold=threshold)

    for type, threshold in (("pairwise", 0.0), ("pairwise", "auto"), ("binary", -3.0)):
        assert lines(type, threshold) == []
    assert lines("binary", "mean") == lines("binary", "auto") == []
    assert lines("pairwise", -0.5) == ["feedback.threshold: got -0.5, allowed: 0 or more"]
    (line,) = lines("pairwise", "median")
    assert line.startswith("feedback.threshold: got 'median', allowed: 'auto' or a number of 0")


def test_one_sample_a_prompt_can_be_judged_but_not_compared():
    for type, count in (("pairwise", 1), ("scalar", 1), ("binary", 0)):
        found = violations(feedback__type=type, sampling__num_samples_per_prompt=1)
        assert len(found) == count


def test_ppo_needs_no_second_sample_of_a_prompt_with_scores():
    changes = {"sampling__num_samples_per_prompt": 1, "feedback__type": "scalar"}
    assert violations(**changes, **{"loss.name": "ppo"}) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data__fields": "prompt"}, "data.fields: got 'prompt', allowed: OUR_NAME=FIELD"),
        ({"data__fields": "promt=q"}, "data.fields: got 'promt' before '='"),
        (
            {"data__prompt_template": "\\boxed{}"},
            "data.prompt_template: got '{}', allowed: {FIELD}",
        ),
        (
            {"task": "label", "data__system_prompt": "s"},
            "data.system_prompt: got 's', allowed with task='label': ''",
        ),
        (
            {"task": "label", "data__merge_turns": True},
            "data.merge_turns: got True, allowed with task='label': False",
        ),
    ],
)
def test_what_is_added_to_records_is_checked(changes, expected):
    [line] = violations(**changes)
    assert line.startswith(expected)


def test_further_prompts_must_be_able_to_help():
    wanted = {"rounds__prompts_per_round": 8, "feedback__max_prompts_factor": 1.5}
    # 12 prompts give a pair each in mode "max", which is two examples of KTO, and 12 groups.
    for loss, most in {"dpo": 12, "kto": 24, "unknown": 24}.items():
        named = {**wanted, "loss__name": loss}
        assert violations(**named, feedback__min_examples=most) == []
        (line,) = violations(**named, feedback__min_examples=most + 1)
        assert line.startswith(
            f"feedback.min_examples: got {most + 1}, but a round of 8 prompts x "
            f"feedback.max_prompts_factor=1.5 prompts give {most} at most"
        )
    assert len(violations(**wanted, feedback__min_examples=13, feedback__type="scalar")) == 1
    wanted |= {"rounds__prompts_per_round": "auto", "rounds__max_prompts_per_round": 128}
    assert violations(**wanted, feedback__min_examples=192) == []
    assert len(violations(**wanted, feedback__min_examples=193)) == 1
    values = dict(schema.flatten(schema.to_plain(Config()))) | RIGHT
    part = PartConfig(path="reward", max_length=2560, normalise="file")
    values |= dict(schema.flatten(schema.to_plain(part), "reward.parts.a."))
    assert list(limits.find_violations(values)) == []
    (line,) = limits.find_violations(values | {"feedback.min_examples": 1})
    assert line.startswith("reward.parts.a.normalise: got 'file', allowed with feedback.min_exam")


def test_bounds_of_a_rounds_size_are_for_sizes_that_the_run_chooses():
    auto = {"rounds__prompts_per_round": "auto"}
    low, high = "rounds__min_prompts_per_round", "rounds__max_prompts_per_round"
    assert violations(**auto) == violations(**auto, **{low: 64, high: 64}) == []
    (line,) = violations(**auto, **{low: 65, high: 64})
    assert line.startswith(
        "rounds.min_prompts_per_round: got 65, allowed: at most rounds.max_prompts_per_round=64"
    )
    (line,) = violations(**{high: 64})
    assert line == (
        "rounds.max_prompts_per_round: got 64, but every round has rounds.prompts_per_round=512 "
        "prompts; allowed: 1024; set --config.rounds.prompts_per_round=auto"
    )
    assert violations(task="sft", **{high: 64}) == []


def test_gaps_and_weights_are_those_of_pairs():
    assert violations(feedback__max_length_gap=0.5, feedback__margin_weights=1.0) == []
    (line,) = violations(feedback__margin_weights=0.5)
    assert line.startswith("feedback.margin_weights: got 0.5, allowed: 0 (no weights), or 1 or mo")
    found = violations(
        feedback__type="binary", feedback__max_length_gap=0.5, feedback__margin_weights=2.0
    )
    assert [line.partition(":")[0] for line in found] == [
        "feedback.max_length_gap",
        "feedback.margin_weights",
    ]
    assert "allowed with feedback.type='binary': 0; it has no pairs" in found[0]


SCORER = dict(schema.flatten(schema.to_plain(ScorerConfig(path="gold"))))


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("gold", {}, None),
        ("gold", {"task": "sft"}, None),  # which has no samples
        ("gold", {"task": "eval", "data.eval": "e", "eval.on": "feedback"}, None),
        (
            "gold",
            {"data.eval": ""},
            "eval.scorers: got eval.scorers.gold, but there are no samples",
        ),
        ("gold", {"data.eval": "", "data.holdout": 3}, None),
        ("gold", {"data.eval": "", "data.test": "t"}, None),
        ("low", {}, "eval.scorers.low: allowed: a name of letters"),
        ("a/b", {}, "eval.scorers.a/b: allowed: a name of letters"),
        ("rule", {}, "that no other metric has (taken: rule, low, high, unpenalised)"),
        (
            "gold",
            {"path": ""},
            "eval.scorers.gold.path: got '', but eval.scorers.gold.kind='model'",
        ),
        ("gold", {"max_length": 2559}, "eval.scorers.gold.max_length: got 2559"),
        (
            "gold",
            {"judge.url": "host"},
            "eval.scorers.gold.judge.url: got what is no plain address",
        ),
    ],
)
def test_a_scorer_of_held_out_samples_is_checked_where_it_is_used(name, changes, expected):
    values = dict(schema.flatten(schema.to_plain(Config()))) | RIGHT | {"data.eval": "e"}
    values |= {"reward.rules": ["a:rule"]}
    own = SCORER | {"max_length": 2560} | {k: v for k, v in changes.items() if k in SCORER}
    values |= {f"eval.scorers.{name}.{field}": value for field, value in own.items()}
    values |= {path: value for path, value in changes.items() if path not in SCORER}
    found = list(limits.find_violations(values))
    assert (not found) if expected is None else (len(found) == 1 and expected in found[0])
