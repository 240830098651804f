"""Whole runs of the objectives that do not train on pairs: online in rounds, and on fixed files."""

import json
import signal

import pytest

from halos_jax.workdir import manifests
from tests.e2e.origins import assert_drawn_by_the_policy

# Scores that a policy can raise: how much of an answer is letters before "n".
EARLY = ("reward.kind=function", "reward.path=", "reward.function=tests.e2e.rewards:score_early")


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_metric(workdir, name: str) -> list[float]:
    return [line[name] for line in read_lines(workdir / "metrics.jsonl") if name in line]


INEXACT = "sampling.exact_ratios=false"
BINARY = ("feedback.type=binary", "feedback.threshold=mean")


@pytest.mark.parametrize(
    ("overrides", "kind", "examples", "steps", "metric"),
    [
        (("loss.name=kto", *BINARY), "binary_feedback", 18, 9, "rewards_train/KL_estimate"),
        (
            (
                "loss.name=kto",
                "loss.humanline=true",
                "rounds.reference=previous_step",
                "rounds.sync_every=2",
                "train.ema_decay=0.5",
                "lora.rank=2",
                "lora.base=int8",
                *BINARY,
            ),
            "binary_feedback",
            18,
            9,
            "rewards_train/chosen",
        ),
        (
            ("loss.name=dapo", "feedback.type=scalar", "sampling.keep_logps=true"),
            "scalar_feedback",
            6,
            3,
            "rewards_train/weighted_advantage",
        ),
        (
            (
                "loss.name=grpo_clip",
                "loss.correction=token_tis",
                "feedback.type=scalar",
                "sampling.max_kept=4",
                "sampling.temperature=0.7",
                "sampling.top_p=0.9",
            ),
            "scalar_feedback",
            6,
            3,
            "correction/weight",
        ),
        (
            (
                "loss.name=ppo",
                "feedback.type=scalar",
                "rounds.reference=round_start",
                "train.epochs=2",
                "train.ema_decay=0.5",
                "sampling.temperature=0.7",
                INEXACT,
            ),
            "scalar_feedback",
            6,
            6,
            "rewards_train/KL",
        ),
        (
            (
                "loss.name=ppo",
                "feedback.type=scalar",
                "sampling.exact_ratios=true",
                "sampling.temperature=1.3",
                "sampling.top_p=0.9",
                "sampling.max_kept=4",
                "lora.rank=2",
                "lora.base=nf4",
                "lora.dropout=0.0",
            ),
            "scalar_feedback",
            6,
            3,
            "rewards_train/KL",
        ),
    ],
    ids=["kto", "kto-previous-step", "dapo", "grpo_clip-corrected", "ppo", "ppo-exact"],
)
def test_two_rounds_online(program, tmp_path, overrides, kind, examples, steps, metric):
    workdir = tmp_path / "run"
    code, output, errors = program.run(workdir, *EARLY, *overrides)
    assert (code, errors) == (0, ""), output
    for round in (1, 2):
        folder = workdir / "rounds" / f"{round:04d}"
        feedback, samples = (read_lines(folder / f"{x}.jsonl") for x in ("feedback", "samples"))
        assert {line["type"] for line in feedback} == {kind}
        # No sample is lost, and its tokens are what was sampled.
        names = [(line["prompt_id"], line["sample_id"]) for line in samples]
        assert [(line["prompt_id"], line["sample_id"]) for line in feedback] == names
        assert [x["response_ids"] for x in feedback] == [x["response_ids"] for x in samples]
        is_exact = any("temperature" in one for one in overrides) and INEXACT not in overrides
        assert {"drawn" in line for line in (*samples, *feedback)} == {is_exact}
        manifest = manifests.load_manifest(folder)
        assert manifest.metrics["feedback_examples"] == examples
        if kind == "binary_feedback":
            labels = [line["label"] for line in feedback]
            assert sum(labels) == manifest.metrics["feedback_desirable"]
            assert 0 < sum(labels) < len(labels)
    values = read_metric(workdir, metric)
    assert len(values) == 2 * steps and any(values)
    if metric == "correction/weight":  # the policy at a round's start is the one that sampled
        assert max(abs(value - 1) for value in values) < 1e-4
    if is_exact:
        if "loss.name=ppo" in overrides:  # before a round's first step the policy is what sampled
            moved = read_metric(workdir, "loss_train/policykl")
            assert max(map(abs, moved[::steps])) < 1e-5 < max(map(abs, moved))
        # Signs compare policies at temperature 1: in round 1 it is the SFT checkpoint that sampled.
        assert abs(read_metric(workdir, "kl_sampled")[0]) < 1e-5
    # Re-scored by the trainer's pass, with a value head and on a base in int8 and nf4, too.
    averaged = "train.ema_decay=0.5" in overrides
    assert_drawn_by_the_policy(workdir, base="lora.rank=2" in overrides, averaged=averaged)
    assert read_metric(workdir, "loss/eval")
    assert (workdir / "final" / "model.safetensors").exists()

    # Killed in the middle of round 2's training and started again, it ends the same.
    event = f"2 train: before train_step {steps + steps // 2 + 1}"
    killed = tmp_path / "killed"
    code, _, _ = program.run(killed, *EARLY, *overrides, signals={event: signal.SIGKILL})
    assert code == -signal.SIGKILL
    # Runs begun before "auto" have recorded `false`, and go on so with the command of then.
    left_out = [one for one in overrides if one != INEXACT]
    code, _, errors = program.run(killed, *EARLY, *left_out)
    assert (code, errors) == (0, "")
    for file in ("final/model.safetensors", "rounds/0002/feedback.jsonl", "rounds/0002/eval.jsonl"):
        assert (killed / file).read_bytes() == (workdir / file).read_bytes(), file


def test_pairs_are_weighed_by_who_sampled_them_and_refused_where_that_is_unknown(program, tmp_path):
    def read_weights(name, *options):
        code, output, errors = program.run(tmp_path / name, *options)
        assert (code, errors) == (0, ""), output
        return read_metric(tmp_path / name, "correction/weight")

    ratios = ("loss.correction=sequence_tis", "sampling.keep_logps=true", "rounds.total_prompts=6")
    weights = read_weights("online", *EARLY, *ratios)
    # The policy of the first step has sampled its pairs: but for rounding the ratio is 1.
    assert abs(weights[0] - 1) < 1e-3 and len(set(weights)) > 1
    feedback = tmp_path / "online" / "rounds" / "0001" / "feedback.jsonl"
    rows = read_lines(feedback)
    assert all(len(row[f"logps_{x}"]) == len(row[f"ids_{x}"]) for row in rows for x in "AB")

    file = ("task=align", "data.eval=", f"data.train={tmp_path / 'pairs.jsonl'}")
    del rows[0]["logps_A"]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, _, errors = program.run(tmp_path / "lacking", *file, "loss.correction=token_tis")
    assert code == 1 and f"1 of {len(rows)} examples lack its log-probabilities" in errors
    assert all(0 < weight != 1 for weight in read_weights("wpo", *file, "loss.correction=wpo"))


@pytest.mark.parametrize(
    "loss",
    [
        ("loss.name=grpo", "loss.epsilon=0.5"),
        ("loss.name=ppo", "loss.KL_coef=0.01", "loss.critic_coef=1.0"),
    ],
    ids=["grpo", "ppo"],
)
def test_rounds_raise_the_reward(program, tmp_path, loss):
    workdir = tmp_path / "run"
    code, output, errors = program.run(
        workdir,
        *EARLY,
        *loss,
        "feedback.type=scalar",
        "sampling.num_samples_per_prompt=8",
        "rounds.total_prompts=20",
        "rounds.prompts_per_round=5",
        "train.batch_size=1",
        "train.eval_every=0",
        "optimizer.learning_rate=0.02",
    )
    assert (code, errors) == (0, ""), output
    rewards = read_metric(workdir, "reward_eval")
    assert len(rewards) == 5
    assert rewards[-1] > rewards[0] + 0.2, rewards


def test_ppo_on_a_file_is_killed_and_ends_the_same(program, tmp_path):
    rows = [
        {"prompt": letters, "completion": answer, "label": answer == "aaa"}
        for letters in ("bcd", "cbe", "dgf", "ehg")
        for answer in ("aaa", "ccc")
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = (
        "task=align",
        "loss.name=ppo",
        "rounds.reference=previous_step",
        "train.ema_decay=0.5",
        f"data.train={tmp_path / 'train.jsonl'}",
        f"data.eval={tmp_path / 'train.jsonl'}",
        "train.batch_size=4",
        "train.epochs=3",
    )
    code, output, errors = program.run(tmp_path / "run", *options)
    assert (code, errors) == (0, ""), output
    values = read_metric(tmp_path / "run", "val_eval/vpred")
    assert values[0] == 0 and values[-1] != 0  # a new head says nothing, a trained one does
    signals = {"start: before train_step 4": signal.SIGKILL}
    assert program.run(tmp_path / "killed", *options, signals=signals)[0] == -signal.SIGKILL
    assert program.run(tmp_path / "killed", *options)[0] == 0
    ends = [(tmp_path / name / "final" / "model.safetensors") for name in ("run", "killed")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_kto_on_a_file_orders_held_out_answers(program, tmp_path):
    rows = [
        {"prompt": letters, "completion": answer, "label": answer == "aaa"}
        for letters in ("bcd", "cbe", "dgf", "ehg", "fba", "gcb", "hda", "iec")
        for answer in ("aaa", "ccc")
    ]
    for name, part in (("train", rows[:12]), ("eval", rows[12:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    workdir = tmp_path / "run"
    code, output, errors = program.run(
        workdir,
        "task=align",
        "loss.name=kto",
        "loss.beta=0.5",
        f"data.train={tmp_path / 'train.jsonl'}",
        f"data.eval={tmp_path / 'eval.jsonl'}",
        "train.batch_size=4",
        "train.epochs=4",
        "checkpoint.every=0",
    )
    assert (code, errors) == (0, ""), output
    assert "6 desirable and 6 undesirable answers" in output
    chosen, rejected = (read_metric(workdir, f"rewards_eval/{x}") for x in ("chosen", "rejected"))
    assert abs(chosen[0]) < 1e-4 and abs(rejected[0]) < 1e-4
    assert chosen[-1] > rejected[-1] + 0.5


def test_feedback_that_does_not_suit_the_loss_is_one_error_before_anything_runs(program, tmp_path):
    code, _, errors = program.run(tmp_path / "run", "loss.name=kto", "feedback.type=scalar")
    assert code == 1
    assert "feedback.type: got 'scalar', but loss 'kto' trains on single answers" in errors
    code, _, errors = program.run(tmp_path / "run", "loss.name=gspo", "feedback.type=scalar")
    assert code == 1 and "set --config.sampling.keep_logps=true" in errors
    assert not (tmp_path / "run").exists()
