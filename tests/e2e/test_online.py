"""Whole online runs: budgets, rewards, retention, meshes."""

import json
import shutil

import pytest
from safetensors.numpy import load_file

from halos_jax.data import datasets
from halos_jax.workdir import execution, manifests


def read_ids(workdir, round: int) -> list[str]:
    """Return the prompt ids of a round in order, each once."""
    lines = (workdir / "rounds" / f"{round:04d}" / "samples.jsonl").read_text().splitlines()
    return list(dict.fromkeys(json.loads(line)["prompt_id"] for line in lines))


def order_ids(program) -> list[str]:
    prompts = datasets.load_prompts(str(program.inputs / "prompts.jsonl"))
    return [prompt.prompt_id for prompt in datasets.order_prompts(prompts, 0)]


def read_rounds(workdir) -> list[manifests.Manifest]:
    return [manifests.load_manifest(folder) for folder in sorted((workdir / "rounds").iterdir())]


def test_a_last_partial_round_after_skipped_prompts(program, tmp_path):
    workdir, order = tmp_path / "run", order_ids(program)
    overrides = ("rounds.total_prompts=10", "rounds.num_skip=5", "checkpoint.keep=2")
    page = "report.enabled=true"
    code, output, errors = program.run(workdir, *overrides, "checkpoint.every=0", page)
    assert (code, errors) == (0, "")
    assert [read_ids(workdir, round) for round in (1, 2)] == [order[5:11], order[11:15]]
    assert [(m.start, m.stop) for m in read_rounds(workdir)] == [(0, 0), (5, 11), (11, 15)]
    assert len(list((workdir / "checkpoints").iterdir())) == 2
    (start,) = execution.read_starts(workdir)
    for found in read_rounds(workdir):
        assert tuple(found.executed) == found.stages
        assert [execution.find_executions(found, one) for one in found.stages] == [
            [start.execution] for _ in found.stages
        ]
    assert "round 2 of 2 is done" in output and "reward_eval" in output
    shown = (workdir / "report.html").read_text()
    assert ">complete<" in shown and "after round 2" in shown and "report.html could" not in output
    assert f"the page about it is {workdir}/report.html" in output


def test_a_reward_function_and_prompts_that_run_out(program, tmp_path):
    workdir, order = tmp_path / "run", order_ids(program)
    lines = (program.inputs / "prompts.jsonl").read_text().splitlines()
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines[:8]))
    code, output, errors = program.run(
        workdir,
        "rounds.total_prompts=64",
        f"data.train={tmp_path / 'prompts.jsonl'}",
        "data.eval=",
        "reward.kind=function",
        "reward.path=",
        "reward.function=tests.e2e.rewards:score_length",
    )
    assert (code, errors) == (0, "")
    assert "8 prompts are enough for 2 of 11 rounds (rounds.total_prompts=64)" in output
    used = read_ids(workdir, 1) + read_ids(workdir, 2)
    first = {prompt.prompt_id for prompt in datasets.load_prompts(str(tmp_path / "prompts.jsonl"))}
    assert used == [name for name in order if name in first]
    for round in (1, 2):
        folder = workdir / "rounds" / f"{round:04d}"
        assert not (folder / "eval.jsonl").exists()
        samples, scores = (
            [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
            for name in ("samples", "scores")
        )
        assert [score["reward"] for score in scores] == [-len(s["output"]) for s in samples]
    # Nothing is held out, so nothing is evaluated, at no point.
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert records and not [name for record in records for name in record if "eval" in name]
    assert (workdir / "final" / "model.safetensors").exists()


def test_rounds_of_ties_alone_change_nothing(program, inputs, tmp_path):
    workdir = tmp_path / "run"
    code, output, errors = program.run(
        workdir,
        "reward.kind=function",
        "reward.path=",
        "reward.function=tests.e2e.rewards:score_nothing",
        "sampling.keep_logps=True",
    )
    assert (code, errors) == (0, "")
    assert "round 2 has no pairs to train on" in output
    assert [m.next_stage for m in read_rounds(workdir)] == [None, None, None]
    assert (workdir / "rounds" / "0002" / "feedback.jsonl").read_text() == ""
    before, after = (
        load_file(folder / "model.safetensors") for folder in (inputs / "policy", workdir / "final")
    )
    assert before.keys() == after.keys()
    assert all((before[name] == after[name]).all() for name in before)
    # Round 2 is checkpointed all the same: a resume must not sample it again.
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["00000002"]


def test_eight_devices_sample_what_one_does(program, finished, tmp_path):
    workdir = tmp_path / "run"
    flags = f"{program.environment['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    code, output, errors = program.run(
        workdir,
        "rounds.total_prompts=6",
        "train.batch_size=4",
        "mesh.data=2",
        "mesh.fsdp=2",
        "mesh.tensor=2",
        environment={"XLA_FLAGS": flags},
    )
    assert (code, errors) == (0, "")
    assert "mesh data=2, fsdp=2, tensor=2" in output
    one, eight = (folder / "rounds" / "0001" for folder in (finished[0], workdir))
    samples = [
        [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        for folder in (one, eight)
    ]
    for name in ("sum_logps", "mean_entropy"):  # whose last bits are another mesh's
        found, wanted = ([record.pop(name) for record in run] for run in samples)
        assert found == pytest.approx(wanted, rel=1e-4)
    assert samples[0] == samples[1]
    # The signs of a mesh are those of one device, from the sampler to the table.
    signs = [dict(manifests.load_manifest(folder).metrics) for folder in (one, eight)]
    for name in ("kl_sft", "entropy", "fresh_loss", "reward_best", "tied_share", "repeated_4grams"):
        assert signs[0][name] == pytest.approx(signs[1][name], rel=1e-3, abs=1e-4), name
    rewards = [
        [json.loads(line)["reward"] for line in (folder / "scores.jsonl").read_text().splitlines()]
        for folder in (one, eight)
    ]
    assert rewards[0] == pytest.approx(rewards[1], rel=1e-4, abs=1e-5)


def test_a_resume_may_keep_more_checkpoints(program, finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    shutil.rmtree(workdir / "final")
    code, _, errors = program.run(workdir, "checkpoint.keep=3")
    assert (code, errors) == (0, "")
    final = [folder / "final" / "model.safetensors" for folder in (workdir, finished[0])]
    assert final[0].read_bytes() == final[1].read_bytes()
