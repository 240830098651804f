"""What a loss requires of the rest of the config, and how a want of it is said."""

import dataclasses
import itertools

import pytest

from halos_jax.config import (
    Config,
    ConfigError,
    FeedbackConfig,
    ModelConfig,
    RoundsConfig,
    SamplingConfig,
)
from halos_jax.losses import (
    check_evaluation,
    check_exact,
    check_feedback,
    check_loss,
    check_mixture,
    check_reference,
    find_mixture,
    get_loss,
    list_losses,
    needs_exact,
    reads_drawn,
    settle_sampling,
)
from halos_jax.losses.requirements import check_given_reference, check_teacher

GKD = {"name": "gkd"}


def test_feedback_that_a_loss_cannot_use_is_refused():
    assert check_feedback({"name": "dpo"}, "pairwise") == []
    (line,) = check_feedback({"name": "dpo"}, "binary")
    assert line == (
        "feedback.type: got 'binary', but loss 'dpo' trains on pairs of a better and a worse "
        "answer; allowed: 'pairwise'; set --config.feedback.type=pairwise, or another loss"
    )
    for name in ("sft", "bradley-terry"):
        (line,) = check_feedback({"name": name}, "pairwise")
        assert line.startswith(f"loss.name: got {name!r}, which does not train a policy on")
        assert " dpo," in line and " sft," not in line.partition("allowed")[2]
    assert check_feedback({"name": "dpo"}, "pairwise", weights=True) == []
    (line,) = check_feedback({"name": "kto"}, "pairwise", weights=True)
    assert line.startswith(
        "feedback.margin_weights: allowed with loss 'kto': 0; it trains on single"
    )
    both = check_feedback({"name": "grpo_clip"}, "pairwise", keep_logps=False)
    assert [line.partition(":")[0] for line in both] == ["feedback.type", "sampling.keep_logps"]
    assert check_feedback({"name": "grpo_clip"}, "scalar", keep_logps=False) == both[1:]
    assert check_feedback({"name": "dpoo"}, "pairwise") == []  # said by check_loss already


def test_exact_ratios_need_a_loss_and_feedback_that_have_them():
    for name in ("dapo", "dr_grpo", "gspo", "ppo"):
        assert check_exact({"name": name}, "scalar") == []
    (line,) = check_exact({"name": "grpo"}, "scalar")
    assert line.startswith("sampling.exact_ratios: got True, but loss 'grpo' compares the policy")
    assert " dapo," in line and " dpo," not in line
    (line,) = check_exact({"name": "ppo"}, "binary")
    assert "allowed with feedback.type='binary': False" in line
    assert check_exact({"name": "dpoo"}, "scalar") == []  # said by check_loss already


def test_a_sum_reads_what_was_drawn_in_all_its_losses_or_in_none():
    """Of each pair of losses that can be added."""
    names, found = list_losses(), {True: 0, False: 0}
    for one, other in itertools.combinations(names, 2):
        settings = {"name": "sum", one: {}, other: {}}
        if check_loss(settings):
            continue
        is_mixed = get_loss({"name": one}).old != get_loss({"name": other}).old
        found[is_mixed] += 1
        lines = check_mixture(settings)
        assert bool(lines) == is_mixed == bool(find_mixture(get_loss(settings))), settings
        if is_mixed:
            assert check_exact(settings, "scalar") == lines
    assert found[True] == 12 and found[False] > 100
    (line,) = check_mixture({"name": "sum", "rloo": {}, "dapo": {"weight": 0.5}})
    assert line.startswith("loss: 'sum' got dapo, which compares what is drawn with exact ratios")
    assert "and rloo, which is of the policy at temperature 1" in line
    assert check_mixture({"name": "dapo"}) == check_mixture({"name": "dpoo"}) == []
    with pytest.raises(ConfigError, match="which of the sum dapo reads and rloo does not"):
        reads_drawn(get_loss({"name": "sum", "rloo": {}, "dapo": {}}))
    assert reads_drawn(get_loss({"name": "sum", "dr_grpo": {}, "dapo": {}}))
    assert not reads_drawn(get_loss({"name": "sum", "rloo": {}, "grpo": {}}))


def draw(loss, *, task="online", feedback="scalar", **fields) -> Config:
    sampling = SamplingConfig(**{"temperature": 0.7, "top_p": 1.0} | fields)
    return Config(
        task=task, loss={"name": loss}, feedback=FeedbackConfig(type=feedback), sampling=sampling
    )


def test_ratios_are_exact_by_auto_where_they_would_else_be_wrong():
    exact = {name for name in list_losses() if settle_sampling(draw(name)).exact_ratios}
    assert exact == {"dapo", "dr_grpo", "gspo", "ppo", "grpo_clip", "cispo", "sapo"}
    for fields in (
        {"temperature": 1.3},
        {"temperature": 1.0, "top_p": 0.95},
        {"temperature": 1.0, "top_k": 5},
        {"task": "sample"},
    ):
        assert settle_sampling(draw("dapo", **fields)).exact_ratios is True, fields
    for fields in (
        {"temperature": 1.0},  # the policy itself
        {"temperature": 0.0, "top_p": 0.95, "top_k": 5},  # nothing is drawn
        {"feedback": "binary"},
        *({"task": task} for task in ("eval", "align", "label", "bench", "sft")),
    ):
        config = draw("ppo", **fields)
        assert settle_sampling(config).exact_ratios is False, fields
        assert settle_sampling(config).max_kept == 64
    assert settle_sampling(draw("dapoo")).exact_ratios is False  # said by check_loss


def test_what_is_asked_for_is_not_settled():
    for asked in (True, False):
        config = draw("dapo", exact_ratios=asked, top_k=65)
        assert settle_sampling(config) is config.sampling and needs_exact(config)


def test_sets_by_auto_have_room_for_top_k():
    assert settle_sampling(draw("dapo", top_k=100)).max_kept == 100
    assert settle_sampling(draw("dapo", top_k=5)).max_kept == 64
    assert settle_sampling(draw("dpo", top_k=100)).max_kept == 64


def test_a_moving_reference_is_refused_where_there_is_nothing_to_compare_with():
    for reference in ("sft", "round_start", "previous_step"):
        assert check_reference({"name": "kto"}, reference, task="online") == []
    assert check_reference({"name": "kto"}, "previous_step", task="align") == []
    (line,) = check_reference({"name": "kto"}, "round_start", task="align")
    assert line.startswith("rounds.reference: got 'round_start', but task='align' has no rounds")
    for name in ("simpo", "dapo"):
        assert check_reference({"name": name}, "sft", task="online") == []
        (line,) = check_reference({"name": name}, "previous_step", task="online")
        assert line.startswith(
            f"rounds.reference: got 'previous_step', but loss {name!r} has no reference; allowed"
        )


@pytest.mark.parametrize(
    ("loss", "reference", "task", "expected"),
    [
        ("dpo", "sft", "online", ""),
        ("ppo", "sft", "align", ""),
        ("unknown", "sft", "align", ""),  # that is an error of its own
        ("dpo", "sft", "sft", "model.reference: got 'DIR', allowed with task='sft': ''"),
        ("dpo", "sft", "eval", "model.reference: got 'DIR', allowed with task='eval': ''"),
        ("dpo", "round_start", "online", "model.reference: got 'DIR', allowed with rounds.refer"),
        ("dpo", "previous_step", "align", "model.reference: got 'DIR', allowed with rounds.refe"),
        ("simpo", "sft", "align", "model.reference: got 'DIR', but loss 'simpo' has no reference"),
    ],
)
def test_a_given_reference_is_read_by_a_fixed_one_alone(loss, reference, task, expected):
    config = Config(
        model=ModelConfig(reference="DIR"),
        rounds=RoundsConfig(reference=reference),
        loss={"name": loss},
    )
    found = check_given_reference(config, task=task)
    assert len(found) == bool(expected) and all(line.startswith(expected) for line in found)
    config = dataclasses.replace(config, model=ModelConfig())
    assert check_given_reference(config, task=task) == []


def test_a_value_head_is_no_part_of_a_model_that_is_evaluated():
    assert check_evaluation({"name": "dpo"}) == []
    (line,) = check_evaluation({"name": "ppo"})
    assert line.startswith("loss.name: got 'ppo', which is measured with its value head")


@pytest.mark.parametrize(
    ("settings", "teacher", "has_loss", "expected"),
    [
        (GKD, "big", True, ""),
        ({"name": "dpo"}, "", True, ""),
        ({"name": "unknown"}, "big", True, ""),  # that is an error of its own
        (GKD, "", False, ""),  # the loss of a later task of a pipeline
        (GKD, "", True, "model.teacher: got '', but loss 'gkd' compares the policy with a teacher"),
        ({"name": "dpo"}, "big", True, "model.teacher: got 'big', but loss 'dpo' has no teacher"),
        (GKD, "big", False, "model.teacher: got 'big', allowed with task='sft': ''"),
    ],
)
def test_a_teacher_and_its_loss_need_each_other(settings, teacher, has_loss, expected):
    found = check_teacher(settings, teacher, task="sft", has_loss=has_loss)
    assert len(found) == bool(expected) and all(line.startswith(expected) for line in found)
