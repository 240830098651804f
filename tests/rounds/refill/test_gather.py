"""A round that gets further prompts leaves what a round with all of them would have left."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest

from halos_jax.config import FeedbackConfig, RewardConfig
from halos_jax.losses import get_loss
from halos_jax.once import forget_run
from halos_jax.rewards.labels import Labels
from halos_jax.rounds import stages
from halos_jax.rounds.budget import Budget, RoundPlan
from halos_jax.rounds.pending import open_round
from halos_jax.rounds.progress import Progress
from halos_jax.rounds.proof.origin import Origin
from halos_jax.rounds.refill import gather as module
from halos_jax.types import Prompt, Turn
from halos_jax.workdir import manifests
from halos_jax.workdir.ledger import open_ledger
from halos_jax.workdir.manifests import round_folder
from tests.rounds.stand_ins import CONFIG, make_run, make_sample

# The samples of the first three prompts tie: both have one character. Of the others, one has four
# and is cut, for which there is a penalty.
PROMPTS = [Prompt(f"p{i}", (Turn("user", f"question {i}"),)) for i in range(9)]
FEEDBACK = FeedbackConfig(min_examples=3, max_prompts_factor=4)


@pytest.fixture
def parts(monkeypatch):
    """Stand for the sampler; return what was sampled, and scored, call by call."""
    asked = SimpleNamespace(sampled=[], scored=[])

    def sample_shard(sampler, weights, prompts, *, seed, round, generator, logps_of, on_sample):
        asked.sampled.append([one.prompt_id for one in prompts])
        return [
            make_sample(one, n, 1 + 3 * n * (int(one.prompt_id[1:]) > 2))
            for one in prompts
            for n in range(2)
        ]

    def score(samples):
        asked.scored.append([one.prompt.prompt_id for one in samples][::2])
        rewards = [float(len(one.output)) for one in samples]
        return Labels(rewards, parts={"length": rewards}, counts={"asked": len(samples)})

    asked.score = score
    monkeypatch.setattr(stages, "sample_shard", sample_shard)
    monkeypatch.setattr(module, "merge_adapter", lambda params, frozen: "params")
    monkeypatch.setattr(module, "identify_start", lambda *given: Origin("f" * 32))
    return asked


def make(tmp_path, parts, *, feedback=FEEDBACK, score=None, total=8):
    config = dataclasses.replace(
        CONFIG, feedback=feedback, reward=RewardConfig(missing_eos_penalty=0.25)
    )
    run = make_run(
        workdir=tmp_path,
        config=config,
        prompts=PROMPTS,
        scorer=score or parts.score,
        ledger=open_ledger(tmp_path),
        budget=Budget(total, 2),
        trainer=SimpleNamespace(loss=get_loss({"name": "dpo"}), frozen=None),
    )
    state = SimpleNamespace(step=0, params={})
    return run, Progress(state, 0, budget=Budget(total, 2))


def do(run, progress, size=2):
    manifest = manifests.load_manifest(round_folder(run.workdir, 1))
    stop = manifest.stop if manifest else size
    manifest = open_round(run, 1, RoundPlan(0, stop))
    if manifest.next_stage == "sample":
        manifest = module.gather(run, progress, manifest)
    module.remove_extents(run, manifest)
    return manifest


def test_prompts_are_added_until_there_are_enough_pairs(tmp_path, parts, caplog):
    caplog.set_level("INFO")
    run, progress = make(tmp_path / "refilled", parts)
    manifest = do(run, progress)
    # Pairs: none of p0 p1, one of p2 p3, two of p4 p5.
    assert parts.sampled == parts.scored == [["p0", "p1"], ["p2", "p3"], ["p4", "p5"]]
    assert (manifest.start, manifest.stop, manifest.stages) == (0, 6, ("sample", "score"))
    assert manifest.decisions["refill"] == {
        "extents": [
            {"stop": 2, "examples": 0, "counts": {"asked": 4}},
            {"stop": 4, "examples": 1, "counts": {"asked": 4}},
            {"stop": 6, "examples": 3, "counts": {"asked": 4}},
        ],
        "ended": "enough",
    }
    assert progress.budget.opened == ((0, 6),) and progress.budget.count_rounds(9) == 2
    assert "2 prompts give 0 of feedback.min_examples=3 examples: 2 more prompts" in caplog.text
    assert "6 prompts give 3 examples, enough" in caplog.text
    assert manifest.metrics["feedback_refilled"] == 4
    assert manifest.metrics["feedback_extensions"] == 2
    assert manifest.sampled_by == {"samples.jsonl": "f" * 32}
    # A round that had them all from the start has the same files and metrics.
    whole, _ = make(tmp_path / "whole", parts, feedback=FeedbackConfig())
    opened = open_round(whole, 1, RoundPlan(0, 6))
    folder = round_folder(whole.workdir, 1)
    sampled = stages.sample_stage(whole.rollouts, "params", PROMPTS[:6], folder, 1)
    scored = stages.score_stage(whole.rollouts, folder)
    assert manifest.prompts == opened.prompts
    refilled = round_folder(run.workdir, 1)
    assert sorted(path.name for path in refilled.iterdir()) == [
        *("manifest.json", "samples.jsonl", "scores.jsonl")
    ]
    for name in ("samples.jsonl", "scores.jsonl"):
        assert (refilled / name).read_bytes() == (folder / name).read_bytes()
    rest = {key: value for key, value in manifest.metrics.items() if "feedback" not in key}
    assert rest == {**sampled.metrics, **scored.metrics}
    assert rest["asked_train"] == 12 and rest["reward_train/length"] == (9 * 1 + 3 * 4) / 12


def test_what_limits_a_round_is_said(tmp_path, parts, caplog):
    caplog.set_level("WARNING")
    few = dataclasses.replace(FEEDBACK, max_prompts_factor=1.5)
    manifest = do(*make(tmp_path / "share", parts, feedback=few))
    assert manifest.stop == 3 and parts.sampled == [["p0", "p1"], ["p2"]]
    assert (
        "3 prompts give 0 of feedback.min_examples=3 examples, and it gets no more prompts: "
        in (caplog.text)
    )
    assert "it has had feedback.max_prompts_factor=1.5 times its share" in caplog.text
    forget_run()  # which says it once
    manifest = do(*make(tmp_path / "budget", parts, total=5))
    assert manifest.stop == 5 and "the budget or the prompts are used up" in caplog.text


def test_a_run_that_dies_anywhere_goes_on_as_if_it_had_not(tmp_path, parts, monkeypatch):
    """Die before and after each write of a file in turn."""
    expected, progress = make(tmp_path / "whole", parts)
    do(expected, progress)
    wanted = round_folder(expected.workdir, 1)
    real, left, died = manifests.storage.os.replace, [0], 0

    def replace(old, new):
        for move in (lambda: None, lambda: real(old, new)):
            move()
            left[0] -= 1
            if left[0] == -1:
                raise KeyboardInterrupt

    for number in itertools.count():
        workdir = tmp_path / f"killed {number}"
        left[0] = number
        monkeypatch.setattr(manifests.storage.os, "replace", replace)
        try:
            do(*make(workdir, parts))
            break
        except KeyboardInterrupt:
            died += 1
        left[0] = 1000
        parts.sampled.clear()
        run, progress = make(workdir, parts)
        assert do(run, progress).stop == 6 and len(parts.sampled) <= 3
        files = sorted(path.name for path in round_folder(workdir, 1).iterdir())
        assert files == ["manifest.json", "samples.jsonl", "scores.jsonl"]
        for name in files:
            found = (round_folder(workdir, 1) / name).read_bytes()
            assert found == (wanted / name).read_bytes(), (number, name)
    assert died >= 2 * (3 * 4 + 3)  # an extent's four files, and the round's three
