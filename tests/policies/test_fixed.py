"""Whose log-probabilities fixed data get: the reference's, and those of the starting policy."""

from types import SimpleNamespace

import pytest

from halos_jax.config import Config, ConfigError, ModelConfig
from halos_jax.losses import get_loss
from halos_jax.policies import fixed

OWN = SimpleNamespace(reference=None)
OTHER = SimpleNamespace(reference=SimpleNamespace(decoder="decoder"))


def make_data(name, old=()):
    return SimpleNamespace(name=name, items=[SimpleNamespace(old_logps=old)], reference_logps=name)


@pytest.fixture
def passes(monkeypatch):
    """Note every pass: which data, by which trainer, under which params."""
    noted = []

    def note(trainer, dataset, params, *, label, **options):
        noted.append((label, dataset.name, trainer.name, params))
        return dataset

    def note_start(trainer, dataset, load_params, *, known, label):
        noted.append((label, dataset.name, trainer.name, known or load_params()))
        return dataset

    monkeypatch.setattr(fixed.training, "add_reference", note)
    monkeypatch.setattr(fixed.training, "add_collected", note)
    monkeypatch.setattr(fixed, "add_proximal", note_start)
    monkeypatch.setattr(fixed, "load_sft", lambda policy, mesh, frozen: "other params")
    monkeypatch.setattr(
        fixed, "refer", lambda trainer, decoder: make_trainer(trainer.loss, f"of {decoder}")
    )
    return noted


def make_trainer(loss, name="own"):
    config = Config(model=ModelConfig(reference="DIR"))
    return SimpleNamespace(config=config, loss=loss, mesh=None, frozen=None, name=name)


def add(loss, policy, **data):
    trainer = make_trainer(get_loss(loss))
    train, held_out = make_data("train", **data), make_data("eval", **data)
    return fixed.add_fixed(trainer, train, held_out, lambda: "start params", policy)


def test_without_another_model_the_reference_is_the_starting_policy(passes):
    add({"name": "dpo"}, OWN)
    assert passes == [
        ("reference", "train", "of None", "start params"),
        ("reference eval", "eval", "of None", "start params"),
        ("start", "train", "own", "train"),  # known from the first pass
    ]


def test_another_model_is_the_reference_and_the_start_is_still_the_policy_s(passes):
    add({"name": "ppo"}, OTHER)
    assert passes == [
        ("reference", "train", "of decoder", "other params"),
        ("reference eval", "eval", "of decoder", "other params"),
        ("values", "train", "own", "start params"),
    ]
    passes.clear()
    add({"name": "grpo_clip"}, OTHER, old=("logps",))
    assert passes[-1] == ("start", "train", "own", "start params")


def test_another_reference_stands_in_for_no_policy_that_sampled(passes):
    add({"name": "grpo_clip"}, OWN)  # the starting policy does
    with pytest.raises(ConfigError, match="1 of 1 examples lack its log-probabilities"):
        add({"name": "grpo_clip"}, OTHER)
