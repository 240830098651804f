"""The Bradley-Terry loss against its formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from halos_jax.losses import LossInputs, get_loss
from halos_jax.types import CHOSEN, REJECTED, Item

PAIR = (CHOSEN, REJECTED)


def make_scores(packed, seed):
    rng = np.random.default_rng(seed)
    return {(index, role): rng.normal() for index in range(len(packed.items)) for role in PAIR}


@pytest.mark.parametrize(("num_rows", "weights"), [(1, False), (3, True)])
def test_bradley_terry_equals_its_formula(pack, num_rows, weights):
    packed = pack(PAIR, num_rows=num_rows, weights=weights)
    scores = make_scores(packed, 0)
    scale = np.array([item.weight for item in packed.items])
    margins = np.array([scores[index, CHOSEN] - scores[index, REJECTED] for index in range(7)])
    loss = get_loss({"name": "bradley-terry"})
    assert loss.needs == "scores" and not loss.reference

    run = lambda x: loss(LossInputs(scores=x), packed.batch)  # noqa: E731
    placed = jnp.asarray(packed.place_by_role(scores))
    (value, metrics), gradient = jax.value_and_grad(run, has_aux=True)(placed)
    expected = np.sum(scale * np.log1p(np.exp(-margins))) / scale.sum()
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    # d/dm of -log sigmoid(m) is -sigmoid(-m); scores that belong to nothing get none.
    slopes = -scale / (1 + np.exp(margins)) / scale.sum()
    signs = {CHOSEN: 1, REJECTED: -1}
    wanted = packed.place_by_role({(i, r): slopes[i] * signs[r] for i, r in scores})
    wanted = np.where(packed.batch.sequences.role > 0, wanted, 0)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-9)

    by_role = {role: [scores[index, role] for index in range(7)] for role in PAIR}
    expected = {
        "rewards/chosen": np.sum(by_role[CHOSEN]),
        "rewards/rejected": np.sum(by_role[REJECTED]),
        "rewards/margins": margins.sum(),
        "rewards/accuracies": (margins > 0).sum(),
    }
    assert set(metrics) == {*expected, "loss"}
    for name, total in expected.items():
        np.testing.assert_allclose(metrics[name][0], total, rtol=1e-5, err_msg=name)
        assert metrics[name][1] == 7


def test_equal_scores_give_ln_2_and_no_accuracy(pack):
    packed = pack(PAIR, count=8)
    scores = dict.fromkeys(make_scores(packed, 0), 0.25)
    inputs = LossInputs(scores=packed.place_by_role(scores))
    value, metrics = get_loss({"name": "bradley-terry"})(inputs, packed.batch)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-7)
    assert metrics["rewards/accuracies"] == (0, 8)


def test_margins_and_centring_equal_their_formulas(pack):
    rng = np.random.default_rng(1)
    draw = lambda: rng.integers(1, 50, rng.integers(1, 9)).astype(np.int32)  # noqa: E731
    items = [
        Item(draw(), (draw(), draw()), PAIR, tuple(rng.normal(size=2)), float(rng.integers(1, 4)))
        for _ in range(7)
    ]
    packed = pack.of(items)
    scores = make_scores(packed, 2)
    placed = jnp.asarray(packed.place_by_role(scores))
    chosen, rejected = (np.array([scores[i, role] for i in range(7)]) for role in PAIR)
    gaps = np.array([item.rewards[0] - item.rewards[1] for item in items])
    scale = np.array([item.weight for item in items])

    for margin, centre in ((0.7, 0.0), (0.0, 0.3), (1.5, 0.01)):
        loss = get_loss({"name": "bradley-terry", "margin": margin, "center_coefficient": centre})
        run = lambda x, loss=loss: loss(LossInputs(scores=x), packed.batch)  # noqa: E731
        (value, metrics), gradient = jax.value_and_grad(run, has_aux=True)(placed)
        inner = chosen - rejected - margin * gaps
        each = np.log1p(np.exp(-inner)) + centre * (chosen + rejected) ** 2
        np.testing.assert_allclose(value, np.sum(scale * each) / scale.sum(), rtol=1e-5)
        slope, pull = -1 / (1 + np.exp(inner)), 2 * centre * (chosen + rejected)
        slopes = {CHOSEN: scale * (slope + pull), REJECTED: scale * (pull - slope)}
        wanted = packed.place_by_role({(i, r): slopes[r][i] / scale.sum() for i, r in scores})
        wanted = np.where(packed.batch.sequences.role > 0, wanted, 0)
        np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-7)
        # The accuracy is of the scores alone, whatever margin was wanted.
        assert metrics["rewards/accuracies"][0] == (chosen > rejected).sum()
        if margin:
            np.testing.assert_allclose(
                metrics["rewards/wanted_margins"][0], margin * gaps.sum(), rtol=1e-4
            )


def test_negative_margins_are_refused():
    with pytest.raises(ValueError, match=r"loss\.margin: got -1, allowed: 0 or more"):
        get_loss({"name": "bradley-terry", "margin": -1})
