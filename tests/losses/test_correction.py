"""Corrections: which losses can have them, their weights in float64, what they weigh, metrics."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax.losses import (
    LossInputs,
    average_metrics,
    check_feedback,
    check_loss,
    get_loss,
    list_losses,
)
from halos_jax.losses.correction import MODES
from halos_jax.types import CHOSEN, MEMBER, MISMATCHED, REJECTED, TARGET

ROLES = {
    "pair": (CHOSEN, REJECTED),
    "unpaired": (TARGET, MISMATCHED),
    "group": (MEMBER,) * 4,
    "answer": (MEMBER,) * 2,
}
ALL = ("wpo", "token_tis", "sequence_tis")
RATIOS = ("token_tis", "sequence_tis")
# Every loss, and what its correction may be besides "none".
TABLE = {
    "apo_down": ALL,
    "apo_zero": ALL,
    "bco": (),
    "bradley-terry": (),
    "cdpo": ALL,
    "cispo": RATIOS,
    "csft": (),
    "dapo": RATIOS,
    "dpo": ALL,
    "dpo_norm": ALL,
    "dr_grpo": RATIOS,
    "exo": ALL,
    "gkd": (),
    "grpo": (),  # its ratio is to the reference
    "grpo_clip": RATIOS,
    "gspo": RATIOS,
    "hinge": ALL,
    "ipo": ALL,
    "kto": ("wpo",),
    "nca": ALL,
    "nll": (),
    "orpo": ALL,
    "ppo": RATIOS,
    "rloo": (),
    "robust": ALL,
    "rpo": ALL,
    "sapo": RATIOS,
    "sft": (),
    "simpo": ALL,
    "slic": ALL,
    "sppo": ALL,
}
CASES = [(name, mode) for name, modes in TABLE.items() for mode in modes]
# Without the terms that no correction weighs.
PLAIN = {"grpo_clip": {"beta": 0.0}, "ppo": {"KL_coef": 0.0}}


def test_the_table_has_every_loss():
    assert set(TABLE) == set(list_losses()), "say in TABLE which corrections the loss can have"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TABLE)
def test_every_other_combination_is_an_error_that_names_the_allowed(name, mode):
    lines = check_loss({"name": name, "correction": mode})
    loss = get_loss({"name": name} | ({} if lines else {"correction": mode}))
    if mode == "none" or mode in TABLE[name]:
        assert lines == []
        assert loss.sampled == (mode in RATIOS)
        assert loss.aligned == (mode == "wpo")
        return
    (line,) = lines
    allowed = ", ".join(map(repr, ("none", *TABLE[name])))
    assert line.startswith(
        f"loss.correction: got {mode!r}, allowed with loss {name!r}: {allowed}; 'wpo' is for losses"
    )
    assert not loss.sampled and not loss.aligned


def test_a_cap_is_a_number_of_one_or_more_with_a_ratio_to_truncate():
    settings = {"name": "dpo", "correction": "token_tis"}
    assert check_loss({**settings, "correction_cap": 1}) == []
    (line,) = check_loss({**settings, "correction_cap": 0.5})
    assert line == "loss.correction_cap: got 0.5, allowed: 1 or more"
    for mode in ("none", "wpo"):
        (line,) = check_loss({"name": "dpo", "correction": mode, "correction_cap": 3.0})
        assert line.startswith(
            f"loss.correction_cap: got 3.0, which has no effect with correction={mode!r}; leave it "
        )
    (line,) = check_loss({"name": "sft", "correction_cap": 3.0})
    assert line.startswith("loss.correction_cap: got 3.0, the correction of loss 'sft': 'none';")
    (line,) = check_loss({"name": "dpo", "correction": ["wpo"]})
    assert line.startswith("loss.correction: got ['wpo'], allowed with loss 'dpo': 'none', 'wpo'")


def test_a_sum_has_one_correction():
    wpo, none = {"correction": "wpo"}, {}
    assert check_loss({"name": "sum", "dpo": wpo, "nll": none}) == []  # nll can have none
    (line,) = check_loss({"name": "sum", "dpo": wpo, "simpo": none})
    assert line.startswith("loss: 'sum' got losses of different corrections (dpo wpo, simpo none)")
    loss = get_loss({"name": "sum", "dpo": wpo, "nll": none})
    assert loss.aligned and not loss.sampled and loss.correction.mode == "none"


def test_ratios_need_the_samplers_log_probabilities():
    for name, feedback in (("dpo", "pairwise"), ("dapo", "scalar")):
        settings = {"name": name, "correction": "sequence_tis"}
        assert check_feedback(settings, feedback, keep_logps=True) == []
        (line,) = check_feedback(settings, feedback, keep_logps=False)
        assert re.match(
            r"sampling.keep_logps: got False, but loss '\w+' .*; set --config.sampling.keep_logps=",
            line,
        )
    assert check_feedback({"name": "dpo", "correction": "wpo"}, "pairwise", keep_logps=False) == []
    settings = {"name": "ppo", "correction": "token_tis"}
    assert check_feedback(settings, "scalar") == []
    (line,) = check_feedback(settings, "pairwise")
    assert line == (
        "feedback.type: got 'pairwise', but loss.correction='token_tis' of loss 'ppo' reads the "
        "samplers' log-probabilities, which only the records of 'scalar' have; set "
        "--config.feedback.type=scalar, or loss.correction=none"
    )
    # Of a sum it is the part that has the correction.
    total = {"name": "sum", "ppo": {"correction": "token_tis"}}
    assert check_feedback(total, "pairwise") == [line]


# --------------------------------------------------------------------------- weights


@dataclasses.dataclass(frozen=True)
class Case:
    """A packed batch with token values of all kinds."""

    packed: object
    tokens: dict
    loss: object

    def inputs(self, policy=None, loss=None):
        placed = {name: jnp.asarray(self.packed.place(x)) for name, x in self.tokens.items()}
        placed["old_values"] = placed["values"] - 0.1
        inputs = LossInputs(**placed | ({} if policy is None else {"policy": policy}))
        statistics = (loss or self.loss).measure(inputs, self.packed.batch)
        return inputs.replace(statistics=statistics)


@pytest.fixture
def make_case(pack, draw_logps):
    """Return the function from a loss to a case whose log-probs are near each other."""

    def near(tokens, seed, scale=0.4):
        rng = np.random.default_rng(seed)
        return [
            tuple(np.minimum(part + scale * rng.normal(size=len(part)), -1e-3) for part in parts)
            for parts in tokens
        ]

    def make(loss) -> Case:
        rng = np.random.default_rng(4)
        packed = pack(ROLES[loss.items], count=6, weights=True)
        items = [
            dataclasses.replace(
                item, desirable=bool(number % 2), rewards=tuple(rng.normal(size=len(item.roles)))
            )
            for number, item in enumerate(packed.items)
        ]
        packed = pack.of(items)
        tokens = {"policy": draw_logps(packed, 1)}
        tokens["old"] = near(tokens["policy"], 2, 0.1)
        tokens["reference"] = near(tokens["policy"], 3)
        tokens["sampled"] = near(tokens["policy"], 5)
        tokens["alignment"] = draw_logps(packed, 6)
        tokens["values"] = draw_logps(packed, 7)
        tokens["entropies"] = draw_logps(packed, 8)
        return Case(packed, tokens, loss)

    return make


def expected_weights(case, mode, cap):
    """Return the weights by token in float64, and (weights, untruncated) of what is counted."""
    weights, counted = [], []
    kind, old = case.loss.items, case.loss.old
    streams = ("policy", "alignment", "sampled", "old")
    for p, alignment, sampled, q in zip(*(case.tokens[x] for x in streams), strict=True):
        logs = [now - s for now, s in zip(q if old else p, sampled, strict=True)]
        if mode == "token_tis":
            each = logs
            counted += [x for part in logs for x in part]
        else:
            if mode == "wpo":
                sums = [np.mean(x - a) for x, a in zip(p, alignment, strict=True)]
            else:
                sums = [part.sum() for part in logs]
            if kind == "pair":
                sums = [sum(sums)] * 2
            counted += sums[:1] if kind in ("pair", "unpaired") else sums
            each = [np.full(len(part), total) for part, total in zip(logs, sums, strict=True)]
        weights.append(tuple(np.minimum(np.exp(x), cap) for x in each))
    if case.loss.name == "gspo":  # one gain a response: it has the mean weight of its tokens
        weights = [tuple(np.full(len(x), x.mean()) for x in parts) for parts in weights]
    return weights, np.exp(counted)


def differentiate(case, loss):
    run = lambda x: loss(case.inputs(x, loss), case.packed.batch)  # noqa: E731
    placed = jnp.asarray(case.packed.place(case.tokens["policy"]))
    (value, metrics), gradient = jax.value_and_grad(run, has_aux=True)(placed)
    return value, metrics, np.asarray(gradient)


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_the_gradient_is_the_plain_one_times_the_weights(make_case, name, mode):
    settings = {"name": name} | PLAIN.get(name, {})
    plain = get_loss(settings)
    case, cap = make_case(plain), np.inf
    settings |= {"correction": mode}
    if mode != "wpo":  # so that about a half is truncated
        cap = max(1.0, float(np.median(expected_weights(case, mode, np.inf)[1])))
        settings["correction_cap"] = cap
    loss = get_loss(settings)
    value, metrics, gradient = differentiate(case, loss)
    plain_value, plain_metrics, plain_gradient = differentiate(case, plain)
    weights, ratios = expected_weights(case, mode, cap)
    expected = case.packed.place(weights) * plain_gradient
    scale = np.abs(plain_gradient).max()
    assert scale > 1e-5
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5 * scale)
    if plain.items == "pair" and mode == "token_tis":
        assert value == plain_value  # to the last bit: the gradients alone are weighed

    # What is reported of the weights, and the plain metrics as they were.
    truncated = np.minimum(ratios, cap)
    means = average_metrics({key: x for key, x in metrics.items() if "correction" in key})
    found = {
        "correction/weight": truncated.mean(),
        "correction/effective": truncated.sum() ** 2 / (truncated**2).sum() / len(truncated),
    }
    if mode != "wpo":
        assert 0 < np.mean(ratios > cap) < 1
        found["correction/truncated"] = np.mean(ratios > cap)
    assert means.keys() == found.keys()
    for key, number in found.items():
        np.testing.assert_allclose(means[key], number, rtol=1e-4, err_msg=key)
    for key in plain_metrics.keys() - {"loss", "loss/policy"}:
        assert metrics[key] == plain_metrics[key], key


@pytest.mark.parametrize("mode", ["wpo", "sequence_tis"])
@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "kto"])
def test_the_value_is_that_of_weighed_examples(make_case, pack, name, mode):
    if mode not in TABLE[name]:
        return
    case, loss = make_case(get_loss({"name": name})), get_loss({"name": name, "correction": mode})
    value, *_ = differentiate(case, loss)
    weights, _ = expected_weights(case, mode, np.inf if mode == "wpo" else 2.0)
    items = [
        dataclasses.replace(item, weight=item.weight * float(parts[0][0]))
        for item, parts in zip(case.packed.items, weights, strict=True)
    ]
    weighed = dataclasses.replace(case, packed=pack.of(items), loss=get_loss({"name": name}))
    other, *_ = differentiate(weighed, weighed.loss)
    totals = [sum(item.weight for item in each) for each in (items, case.packed.items)]
    np.testing.assert_allclose(value, other * totals[0] / totals[1], rtol=1e-5)


@pytest.mark.parametrize(("name", "mode"), [("dpo", "sequence_tis"), ("dapo", "token_tis")])
def test_data_of_the_policy_itself_weigh_one(make_case, name, mode):
    case = make_case(get_loss({"name": name}))
    loss = get_loss({"name": name, "correction": mode})
    case.tokens["sampled"] = case.tokens["old" if loss.old else "policy"]
    value, metrics, gradient = differentiate(case, loss)
    plain_value, _, plain_gradient = differentiate(case, get_loss({"name": name}))
    assert value == plain_value and (gradient == plain_gradient).all()
    means = average_metrics({key: x for key, x in metrics.items() if "correction" in key})
    assert means == {
        "correction/weight": 1,
        "correction/truncated": 0,
        "correction/effective": 1,
    }


def test_answers_without_tokens_and_huge_ratios_are_finite(pack):
    packed = pack((CHOSEN, REJECTED), count=3)
    first = packed.items[0]
    empty = dataclasses.replace(first, responses=(first.responses[0][:0],) * 2)
    packed = pack.of([empty, *packed.items[1:]])
    policy = jnp.where(packed.batch.is_response, -1.0, 0.0)
    for mode in ALL:
        loss = get_loss({"name": "dpo", "correction": mode})

        def run(policy, loss=loss):
            none = jnp.zeros_like(policy)
            inputs = LossInputs(policy, none, sampled=none - 1e4, alignment=none - 0.5)
            return loss(inputs, packed.batch)

        (value, metrics), gradient = jax.value_and_grad(run, has_aux=True)(policy)
        assert np.isfinite(value) and np.isfinite(gradient).all()
        assert metrics["correction/weight"][0] <= 2 * metrics["correction/weight"][1]
