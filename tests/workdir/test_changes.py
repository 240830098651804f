import dataclasses
import json
import logging
import os

import pytest

from halos_jax import config as config_lib
from halos_jax.config import (
    Config,
    DataConfig,
    GuardConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RoundsConfig,
    SamplingConfig,
    TrainConfig,
)
from halos_jax.policies import source
from halos_jax.storage import WorkdirError
from halos_jax.workdir import changes, runs
from tests.reward_parts import with_parts


def start(workdir, config, **where):
    """Start a run as a job does, to the point where it records where it stands."""
    info = runs.open_run(workdir, config)
    try:
        if where:
            runs.begin_segment(info, **where)
    finally:
        info.close()
    (workdir / "metrics.jsonl").touch()  # so that it is no run that has left nothing
    return info


def refusal(workdir, config) -> str:
    with pytest.raises(WorkdirError) as error:
        start(workdir, config)
    return str(error.value)


def recorded(workdir):
    return json.loads((workdir / "config.json").read_text())


def test_how_it_is_computed_may_change_and_is_said_once(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    start(tmp_path, Config(), round=1, step=0)
    assert "segments" not in recorded(tmp_path) and not caplog.records
    smaller = Config(
        model=ModelConfig(remat="full", head_chunk=64, attention="xla"),
        sampling=SamplingConfig(slots=4),
        train=TrainConfig(tokens_per_device=256),
        mesh=MeshConfig(fsdp=2),
    )
    start(tmp_path, smaller, round=3, step=14)
    said = [record.message for record in caplog.records]
    assert (
        "train.tokens_per_device: 16384 -> 256; the results may differ in their last bits" in said
    )
    assert "model.remat: 'auto' -> 'full'; the results may differ in their last bits" in said
    assert len(said) == 6
    assert recorded(tmp_path)["segments"] == [
        {
            "round": 3,
            "step": 14,
            "changed": {
                "mesh.fsdp": [1, 2],
                "model.attention": ["auto", "xla"],
                "model.head_chunk": [4096, 64],
                "model.remat": ["auto", "full"],
                "sampling.slots": [256, 4],
                "train.tokens_per_device": [16384, 256],
            },
        }
    ]
    assert recorded(tmp_path)["model"]["remat"] == "full"
    caplog.clear()
    start(tmp_path, smaller, round=3, step=15)
    assert not caplog.records and len(recorded(tmp_path)["segments"]) == 1
    start(tmp_path, Config(), round=4, step=20)
    assert [one["step"] for one in recorded(tmp_path)["segments"]] == [14, 20]


def test_a_process_that_dies_before_it_knows_where_it_stands_changes_nothing(tmp_path):
    start(tmp_path, Config(), round=1, step=0)
    before = recorded(tmp_path)
    start(tmp_path, Config(train=TrainConfig(tokens_per_device=256)))
    assert recorded(tmp_path) == before


def test_with_dropout_the_place_in_a_batch_counts(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = Config(lora=LoraConfig(rank=4))
    start(tmp_path, config, step=0)
    start(tmp_path, dataclasses.replace(config, train=TrainConfig(tokens_per_device=256)), step=2)
    assert "in their last bits, and lora.dropout drops others" in caplog.text
    caplog.clear()
    config = dataclasses.replace(config, train=TrainConfig(tokens_per_device=256))
    start(tmp_path, dataclasses.replace(config, sampling=SamplingConfig(slots=4)), step=2)
    assert caplog.messages == [
        "sampling.slots: 256 -> 4; the results may differ in their last bits"
    ]


def test_what_is_computed_may_not_change(tmp_path):
    start(tmp_path, Config(), step=0)
    changed = Config(seed=1, train=TrainConfig(batch_size=8, log_every=5), loss={"name": "kto"})
    text = refusal(tmp_path, changed)
    listed = [line for line in text.splitlines() if line.startswith("  - ")]
    assert listed == [
        "  - loss.name: 'dpo' -> 'kto'",
        "  - seed: 0 -> 1",
        "  - train.batch_size: 32 -> 8",
    ]
    assert "--config.workdir=DIR" in text and "--help=resume" in text


def test_the_optimizer_may_be_tuned(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    start(tmp_path, Config(), step=0)
    start(tmp_path, Config(optimizer=OptimizerConfig(learning_rate=1e-6)), round=2, step=9)
    assert caplog.messages == ["optimizer.learning_rate: 2e-06 -> 1e-06; from here on"]
    assert recorded(tmp_path)["segments"][0]["step"] == 9
    assert "optimizer.name: 'adamw' -> 'lion'" in refusal(
        tmp_path, Config(optimizer=OptimizerConfig(learning_rate=1e-6, name="lion"))
    )


@pytest.mark.parametrize(
    ("task", "old", "new", "allowed"),
    [
        ("online", {"rounds": RoundsConfig(total_prompts=8)}, {"rounds": RoundsConfig()}, True),
        ("online", {"rounds": RoundsConfig()}, {"rounds": RoundsConfig(total_prompts=8)}, False),
        ("sft", {"rounds": RoundsConfig()}, {"rounds": RoundsConfig(total_prompts=8)}, True),
        ("sft", {"train": TrainConfig(epochs=1)}, {"train": TrainConfig(epochs=2)}, True),
        ("sft", {"train": TrainConfig(epochs=2)}, {"train": TrainConfig(epochs=1)}, False),
        ("align", {"data": DataConfig(n_examples=5)}, {"data": DataConfig(n_examples=9)}, True),
        ("align", {"data": DataConfig(n_examples=5)}, {"data": DataConfig()}, True),
        ("align", {"data": DataConfig()}, {"data": DataConfig(n_examples=5)}, False),
        ("online", {"data": DataConfig(max_train=5)}, {"data": DataConfig(max_train=6)}, True),
        ("sft", {"data": DataConfig(max_train=5)}, {"data": DataConfig(max_train=6)}, False),
    ],
)
def test_what_grows_may_only_grow(tmp_path, task, old, new, allowed):
    start(tmp_path, Config(task=task, **old), step=0)
    if allowed:
        assert start(tmp_path, Config(task=task, **new), step=4).history.changes == ()
        assert recorded(tmp_path)["task"] == task
    else:
        text = refusal(tmp_path, Config(task=task, **new))
        assert "(it may only grow)" in text or "data.max_train: 5 -> 6\n" in text


def test_a_path_is_what_it_is_however_it_is_spelled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "M" / "chat").mkdir(parents=True)
    (tmp_path / "link").symlink_to("M")
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).touch()

    def make(model, data="a.jsonl,b.jsonl"):
        parts = {"x": {"path": model, "weight": 2.0}, "y": {"path": "other"}}
        return Config(
            model=ModelConfig(path=model),
            data=DataConfig(train=data),
            reward=with_parts(RewardConfig(path=model), parts),
        )

    workdir = tmp_path / "run"
    start(workdir, make("M/chat"), step=0)
    before = recorded(workdir)
    for model in ("M/chat/", "./M/chat", "M/../M/chat", str(tmp_path / "M/chat"), "link/chat"):
        info = start(workdir, make(model), step=1)
        # What names the model in the records is what it was, too.
        assert info.config.model.path == "M/chat" and info.config.reward.path == "M/chat"
        assert info.config.reward.parts["x"].path == "M/chat"
    start(workdir, make("~/M/chat", f"{tmp_path}/a.jsonl, ./b.jsonl"), step=1)
    assert recorded(workdir) == before
    (tmp_path / "M" / "other").mkdir()
    text = refusal(workdir, make("M/other"))
    assert "model.path: 'M/chat' -> 'M/other'" in text
    assert "data.train: 'a.jsonl,b.jsonl' -> 'b.jsonl,a.jsonl'" in refusal(
        workdir, make("M/chat", "b.jsonl,a.jsonl")
    )
    os.symlink("other", tmp_path / "M" / "moved")
    assert "model.path" in refusal(workdir, make("M/moved"))


def test_what_was_moved_is_judged_by_what_it_holds(tmp_path, caplog):
    """Where the run knows that, another place is no change of the config; `inputs.py` compares."""
    caplog.set_level(logging.INFO)
    start(tmp_path, Config(data=DataConfig(train="old.jsonl", eval="e.jsonl")), step=0)
    moved = Config(data=DataConfig(train="new.jsonl", eval="e.jsonl"))
    assert "data.train: 'old.jsonl' -> 'new.jsonl' (another place)" in refusal(tmp_path, moved)
    known = {"data.train": [{"name": "0:", "size": 3}], "data.eval": []}
    (tmp_path / "inputs.json").write_text(json.dumps(known))
    start(tmp_path, moved, step=2)
    assert caplog.messages == ["data.train: 'old.jsonl' -> 'new.jsonl'; its content is the same"]
    assert recorded(tmp_path)["data"]["train"] == "new.jsonl"
    assert "segments" not in recorded(tmp_path)
    other = Config(data=DataConfig(train="new.jsonl", eval="f.jsonl"))
    assert "data.eval: 'e.jsonl' -> 'f.jsonl'" in refusal(tmp_path, other)


def test_a_field_that_an_older_version_did_not_have_had_its_default(tmp_path):
    start(tmp_path, Config(), step=0)
    plain = recorded(tmp_path)
    del plain["model"]["head_remat"], plain["sampling"]["top_k"]
    (tmp_path / "config.json").write_text(json.dumps(plain))
    (tmp_path / "ledger.jsonl").unlink()
    assert start(tmp_path, Config()).history.changes == ()
    assert "sampling.top_k: 0 -> 5" in refusal(tmp_path, Config(sampling=SamplingConfig(top_k=5)))
    plain["sampling"]["gone"] = 1
    (tmp_path / "config.json").write_text(json.dumps(plain))
    assert "sampling.gone: 1 -> '(absent)'" in refusal(tmp_path, Config())


def test_a_default_of_the_loss_may_be_written_out_or_left_out(tmp_path):
    start(tmp_path, Config(loss={"name": "dpo"}), step=0)
    assert start(tmp_path, Config(loss={"name": "dpo", "beta": 0.1}), step=1).history.changes == ()
    assert recorded(tmp_path)["loss"] == {"name": "dpo"}  # what the hashes of the run are of
    changed = refusal(tmp_path, Config(loss={"name": "dpo", "beta": 0.3}))
    assert "changed:\n  - loss.beta: 0.1 -> 0.3\nset them back" in changed
    changed = refusal(tmp_path, Config(loss={"name": "ipo"}))  # not that it has no beta, too
    assert "changed:\n  - loss.name: 'dpo' -> 'ipo'\nset them back" in changed
    assert start(tmp_path, Config(loss={"name": "dpo"})).history.changes == ()


def test_a_run_with_segments_is_a_run_to_start_from(tmp_path):
    start(tmp_path, Config(), step=0)
    config = Config(train=TrainConfig(tokens_per_device=256))
    start(tmp_path, config, step=3)
    assert "segments" in recorded(tmp_path)
    assert source.is_workdir(str(tmp_path))
    assert source.read_config(tmp_path) == config
    assert config_lib.to_dict(config) == changes.drop_segments(recorded(tmp_path))


def test_the_judges_address_may_change(tmp_path):
    judge = dataclasses.replace(Config().reward.judge, url="http://other:8000/v1", timeout=3.0)
    start(tmp_path, Config(), step=0)
    start(tmp_path, Config(reward=RewardConfig(judge=judge)), step=0)
    assert recorded(tmp_path)["reward"]["judge"]["url"] == "http://other:8000/v1"
    assert "segments" not in recorded(tmp_path)


def test_more_epochs_of_an_online_run_are_for_rounds_to_come(tmp_path, caplog):
    """They give a run that is complete nothing to do; more prompts do."""
    caplog.set_level(logging.INFO)
    start(tmp_path, Config(), round=1, step=0)
    longer = Config(train=TrainConfig(epochs=2))
    info = start(tmp_path, longer)
    assert info.history.pick("growing") and not info.history.has_more
    info = start(tmp_path, longer, round=3, step=8)
    assert "train.epochs: 1 -> 2; for rounds not trained yet" in caplog.text
    assert "goes on with more" not in caplog.text and not info.history.has_more
    assert [info.history.value_in("train.epochs", round) for round in (2, 3)] == [1, 2]
    more = dataclasses.replace(longer, rounds=RoundsConfig(total_prompts=4096))
    info = start(tmp_path, more, round=3, step=8)
    assert "rounds.total_prompts: 2048 -> 4096; the run goes on with more" in caplog.text
    assert info.history.has_more


def test_what_is_kept_of_a_stage_is_said_where_it_depends_on_what_changed(tmp_path):
    shards = [tmp_path / "0003" / f"samples.shard-000{number}.jsonl" for number in range(3)]

    def describe(config, found):
        listed = changes.find_changes(config_lib.to_dict(Config()), config_lib.to_dict(config))
        return changes.describe_kept(changes.History(config, tuple(listed)), found)

    slots = Config(sampling=SamplingConfig(slots=4))
    assert describe(slots, shards).startswith("0003/samples.shard-0000.jsonl and 2 more: made")
    assert describe(slots, shards[:1]).startswith("0003/samples.shard-0000.jsonl: made before")
    assert describe(slots, []) == describe(Config(), shards) == ""
    assert describe(Config(optimizer=OptimizerConfig(learning_rate=1.0)), shards) == ""
    assert describe(Config(sampling=SamplingConfig(slots=4, shard_prompts=2)), shards) == ""


def test_a_part_that_says_what_the_reward_says_is_as_one_that_leaves_it_out():
    full = {"kind": "model", "path": "m", "weight": 1.0, "judge": {"timeout": 120.0}}
    reward = with_parts(RewardConfig(path="m"), {"a": full, "b": {"weight": 2}})
    new = config_lib.to_dict(Config(reward=reward))
    old = config_lib.to_dict(Config(reward=RewardConfig(path="m")))
    old["reward"]["parts"] = {"a": full, "b": {"weight": 2}}  # as it was written before
    assert changes.find_changes(old, new) == []
    old["reward"]["parts"]["b"]["weight"] = 3.0
    assert [str(one) for one in changes.find_changes(old, new)] == [
        "reward.parts.b.weight: 3.0 -> 2.0"
    ]


def test_another_bound_of_the_guard_may_give_a_run_more_to_do(tmp_path):
    """Until the run has exported once more, it is not complete."""
    start(tmp_path, Config(), step=0)
    start(tmp_path, Config(guard=GuardConfig(max_kl=5.0)), round=3, step=9)
    (segment,) = recorded(tmp_path)["segments"]
    assert segment["changed"] == {"guard.max_kl": [0.0, 5.0]} and segment["exported"] is False
    history = changes.read_history(tmp_path, Config(guard=GuardConfig(max_kl=5.0)))
    assert history.has_more and not changes.close_segments(history).has_more


@pytest.mark.parametrize(
    ("recorded_as", "expected"),
    [(None, False), (False, False), (True, True), ("auto", "auto")],
)
def test_exact_ratios_by_auto_are_those_that_a_run_was_begun_with(tmp_path, recorded_as, expected):
    start(tmp_path, Config(), step=0)
    plain = recorded(tmp_path)
    if recorded_as is None:  # a run of a version that did not know the field
        del plain["sampling"]["exact_ratios"]
    else:
        plain["sampling"]["exact_ratios"] = recorded_as
    (tmp_path / "config.json").write_text(json.dumps(plain))
    history = changes.read_history(tmp_path, Config())
    changes.refuse_changes(tmp_path, history)
    assert history.changes == () and history.config.sampling.exact_ratios == expected
    assert changes.read_recorded(tmp_path).config.sampling.exact_ratios == expected
    assert runs.find_begun(Config(workdir=str(tmp_path))).sampling.exact_ratios == expected
    asked = Config(sampling=SamplingConfig(exact_ratios=not expected))  # by name, it is a change
    with pytest.raises(WorkdirError, match=f"exact_ratios: {expected!r} -> {not expected}"):
        changes.refuse_changes(tmp_path, changes.read_history(tmp_path, asked))


def test_a_new_run_leaves_exact_ratios_to_auto(tmp_path):
    config = Config(workdir=str(tmp_path / "new"))
    assert runs.find_begun(config) is config
    start(tmp_path, Config(), step=0)
    assert recorded(tmp_path)["sampling"]["exact_ratios"] == "auto"


def test_growth_that_a_killed_start_has_noted_is_noted_once():
    grown = {"data.train": ["8 prompts", "9 prompts"]}
    once = changes.record_changes(changes.History(Config()), grown, round=2, step=6)
    assert [one["changed"] for one in once.segments] == [grown]
    assert changes.record_changes(once, grown, round=2, step=6).segments == once.segments
    assert len(changes.record_changes(once, grown, round=3, step=9).segments) == 2


def test_a_refusal_names_what_has_changed_and_where_the_others_are_listed(tmp_path):
    start(tmp_path, Config(), step=0)
    history = changes.read_history(tmp_path, Config(seed=3, loss={"name": "ipo"}))
    with pytest.raises(WorkdirError) as caught:
        changes.refuse_changes(tmp_path, history)
    assert str(caught.value) == (
        f"workdir: {tmp_path} holds a run with another configuration; changed:\n"
        "  - loss.name: 'dpo' -> 'ipo'\n"
        "  - seed: 0 -> 3\n"
        "set them back, or start a new run with --config.workdir=DIR; --help=resume lists the "
        "fields that may change"
    )
