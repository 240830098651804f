"""`task=sample`: what an online run would draw, the best of n, and what AlpacaEval reads."""

import dataclasses
import json
from pathlib import Path

import pytest

from halos_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    RewardConfig,
    RoundsConfig,
    SamplingConfig,
    TrainConfig,
)
from halos_jax.data import datasets
from halos_jax.data.records.fields import RecordError
from halos_jax.policies import source
from halos_jax.rounds import stages
from halos_jax.rounds.order import spread_passes
from halos_jax.rounds.proof.origin import OriginError
from halos_jax.tasks import sample as sample_task
from halos_jax.tasks.label import run_labelling
from halos_jax.tasks.online import run_online
from halos_jax.tasks.sample import run_sampling
from halos_jax.types import Prompt, Sample, Turn
from halos_jax.workdir.interrupt import Interrupted, StopSignal
from halos_jax.workdir.manifests import load_manifest, save_manifest

SAMPLING = SamplingConfig(
    num_samples_per_prompt=3,
    temperature=1.0,
    max_prompt_length=10,
    max_tokens=4,
    slots=8,
    chunk=4,
    shard_prompts=2,
)


def make_config(toy, workdir, task="sample", **sampling) -> Config:
    return Config(
        task=task,
        workdir=str(workdir),
        seed=3,
        progress=False,
        model=ModelConfig(path=str(toy / "policy"), compute_dtype="float32", remat="none"),
        reward=RewardConfig(kind="function", function="tests.tasks.test_sample:score_early"),
        data=DataConfig(train=str(toy / "prompts.jsonl")),
        rounds=RoundsConfig(total_prompts=4, prompts_per_round=4, num_skip=2),
        sampling=dataclasses.replace(SAMPLING, **sampling),
        train=TrainConfig(batch_size=8, max_length=16, row_multiple=64),
    )


def score_early(prompt, response: str) -> float:
    """Give the number of letters of the first half of the alphabet."""
    return float(sum(letter in "abcde" for letter in response))


def read(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


class StopAfter(StopSignal):
    """A signal that comes when a file is there."""

    def __init__(self, file):
        super().__init__()
        self._file = file

    def check(self):
        if self._file.exists():
            raise Interrupted("now")


def test_it_draws_what_an_online_run_draws_even_when_stopped_in_between(toy, tmp_path, monkeypatch):
    recorded, original = [], source.find_source

    def find_source(settings, **options):
        recorded.append(options["recorded"])
        return original(settings, **options)

    monkeypatch.setattr(source, "find_source", find_source)
    run_online(make_config(toy, tmp_path / "online", task="online"), StopSignal())
    expected = (tmp_path / "online" / "rounds" / "0001" / "samples.jsonl").read_bytes()
    config = make_config(toy, tmp_path / "sample", num_prompts=4)
    with pytest.raises(Interrupted):
        run_sampling(config, StopAfter(tmp_path / "sample" / "samples.shard-0000.jsonl"))
    assert [path.name for path in (tmp_path / "sample").glob("samples*")] == [
        "samples.shard-0000.jsonl"
    ]
    metrics = run_sampling(config, StopSignal())
    # It goes on with the policy that it began with, whatever its path leads to by now.
    assert recorded == ["", "model"]
    assert metrics["samples"] == 12
    drawn = [load_manifest(tmp_path / name).sampled_by for name in ("sample", "online/rounds/0001")]
    assert drawn[0] == {"samples.jsonl": drawn[1]["samples.jsonl"]}
    assert (tmp_path / "sample" / "samples.jsonl").read_bytes() == expected
    names = {path.name for path in (tmp_path / "sample").iterdir()}
    own = {".lock", "config.json", "inputs.json", "ledger.jsonl", "manifest.json"}
    assert names == own | {"executions.jsonl", "journal.jsonl", "samples.jsonl"}
    assert run_sampling(config, StopAfter(tmp_path)) == metrics  # complete: nothing is done
    # Its labels say who drew them, and a checkpoint is held against the round that it ends.
    reward = RewardConfig(kind="function", function="tests.tasks.test_label:score_letters")
    data = dataclasses.replace(config.data, train=str(tmp_path / "sample" / "samples.jsonl"))
    label = dataclasses.replace(config, task="label", workdir=str(tmp_path / "label"), data=data)
    run_labelling(dataclasses.replace(label, reward=reward), StopSignal())
    sampler = drawn[0]["samples.jsonl"]
    found = load_manifest(tmp_path / "label").sampled_by
    assert found == {"scored.jsonl": sampler, "feedback.jsonl": sampler}
    check_checkpoint(config, tmp_path)
    # The policy that the run has made draws otherwise, in another round otherwise still.
    trained = dataclasses.replace(config.model, path=str(tmp_path / "online"))
    texts = []
    for number, round in enumerate((1, 2)):
        again = make_config(toy, tmp_path / f"again{number}", num_prompts=4, round=round)
        run_sampling(dataclasses.replace(again, model=trained), StopSignal())
        lines = read(tmp_path / f"again{number}" / "samples.jsonl")
        assert {line["generator"] for line in lines} == {str(tmp_path / "online")}
        texts.append([line["output"] for line in lines])
    assert texts[0] != texts[1]


def check_checkpoint(config, tmp_path):
    """Sample from the last checkpoint of the online run, and from what is none of its round."""
    (folder,) = (tmp_path / "online" / "checkpoints").iterdir()
    model = dataclasses.replace(
        config.model, path=str(tmp_path / "online"), checkpoint=int(folder.name)
    )
    asked = dataclasses.replace(config, model=model, workdir=str(tmp_path / "checkpoint"))
    run_sampling(asked, StopSignal())
    last = max((tmp_path / "online" / "rounds").iterdir())
    found, ended = load_manifest(tmp_path / "checkpoint"), load_manifest(last)
    assert found.sampled_by == {"samples.jsonl": ended.trained}
    save_manifest(last, dataclasses.replace(ended, trained="ff" * 16))
    asked = dataclasses.replace(asked, workdir=str(tmp_path / "swapped"))
    with pytest.raises(OriginError, match="of round 1 it is ffffffffffff; allowed: that policy"):
        run_sampling(asked, StopSignal())
    assert not list((tmp_path / "swapped").glob("samples*"))
    save_manifest(last, ended)


def test_the_best_of_each_prompt_goes_to_a_file_of_its_own(toy, tmp_path, monkeypatch):
    output = tmp_path / "out" / "best.json"
    config = make_config(
        toy,
        tmp_path / "run",
        best_of=True,
        format="alpacaeval",
        output=str(output),
        generator="tiny",
    )
    calls, original = [], stages.sample_shard

    def sample_shard(*arguments, **options):
        calls.append(1)
        return original(*arguments, **options)

    monkeypatch.setattr(stages, "sample_shard", sample_shard)
    # 5 shards of the 10 prompts; then the scoring is stopped after its second shard.
    with pytest.raises(Interrupted):
        run_sampling(config, StopAfter(tmp_path / "run" / "scores.shard-0001.jsonl"))
    assert len(calls) == 5 and len(list((tmp_path / "run").glob("scores.shard-*"))) == 2
    metrics = run_sampling(config, StopSignal())
    assert len(calls) == 5 and (metrics["best"], metrics["samples"]) == (10, 30)
    samples, scores = (read(tmp_path / "run" / f"{name}.jsonl") for name in ("samples", "scores"))
    assert [score["reward"] for score in scores] == [
        score_early(None, sample["output"]) for sample in samples
    ]
    rows = json.loads(output.read_text())
    keys = {"dataset", "datasplit", "instruction", "output", "generator"}
    assert all(row.keys() == keys and set(map(type, row.values())) == {str} for row in rows)
    assert {row["generator"] for row in rows} == {"tiny"}
    by_prompt: dict[str, list[dict]] = {}
    for sample in samples:
        by_prompt.setdefault(sample["prompt"][0]["content"], []).append(sample)
    # In the order of the prompts' file, of which two were skipped.
    instructions = [line["prompt"][0]["content"] for line in read(toy / "prompts.jsonl")]
    kept = [instruction for instruction in instructions if instruction in by_prompt]
    assert [row["instruction"] for row in rows] == kept and len(kept) == 10
    for row in rows:
        rewards = [score_early(None, one["output"]) for one in by_prompt[row["instruction"]]]
        first = by_prompt[row["instruction"]][rewards.index(max(rewards))]
        assert row["output"] == first["output"]
    assert metrics["reward_best"] > metrics["reward_label"]


def test_the_best_is_the_first_of_equals_and_has_a_reward():
    def make(prompt, number, reward):
        return Sample(Prompt(prompt, ()), number, "", (), (), "stop", reward=reward)

    samples = [make("a", 0, 1.0), make("b", 0, None), make("c", 0, None)]
    samples += [make("a", 1, 2.0), make("a", 2, 2.0), make("c", 1, -3.0)]
    assert sample_task.choose_best(samples) == [samples[3], samples[5]]


def test_outputs_and_prompts_that_cannot_be_are_refused_at_the_start(toy, tmp_path):
    (tmp_path / "mine.jsonl").write_text("mine")
    config = make_config(toy, tmp_path / "run", output=str(tmp_path / "mine.jsonl"))
    with pytest.raises(ConfigError, match=r"sampling\.output: .* exists already"):
        run_sampling(config, StopSignal())
    assert (tmp_path / "mine.jsonl").read_text() == "mine"
    config = make_config(toy, tmp_path / "run2", output=str(tmp_path / "run2" / "samples.jsonl"))
    with pytest.raises(ConfigError, match=r"sampling\.output: got .*keeps all samples"):
        run_sampling(config, StopSignal())
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
    (tmp_path / "turns.jsonl").write_text(json.dumps({"prompt": turns}))
    config = make_config(toy, tmp_path / "run3", format="alpacaeval", num_samples_per_prompt=1)
    data = DataConfig(train=str(tmp_path / "turns.jsonl"))
    rounds = RoundsConfig(num_skip=0)
    with pytest.raises(RecordError, match=r"got 3 turns, but sampling\.format='alpacaeval'"):
        run_sampling(dataclasses.replace(config, data=data, rounds=rounds), StopSignal())
    config = make_config(toy, tmp_path / "run4")
    rounds = RoundsConfig(num_skip=12)
    with pytest.raises(RecordError, match=r"got 12 prompts, but rounds\.num_skip=12 skips them"):
        run_sampling(dataclasses.replace(config, rounds=rounds), StopSignal())


def test_a_reward_that_cannot_be_is_refused_before_the_sampling_and_may_be_mended(toy, tmp_path):
    config = make_config(toy, tmp_path / "run", best_of=True, num_prompts=2)
    wrong = RewardConfig(kind="function", function="tests.tasks.test_sample:score_erly")
    with pytest.raises(ConfigError, match=r"reward\.function: got .*score_erly"):
        run_sampling(dataclasses.replace(config, reward=wrong), StopSignal())
    names = {path.name for path in (tmp_path / "run").glob("*.jsonl")}
    assert names == {"journal.jsonl", "ledger.jsonl"}
    assert run_sampling(config, StopSignal())["best"] == 2


def test_a_system_prompt_is_no_part_of_the_instruction():
    turns = (Turn("system", "Be brief."), Turn("user", "Why?"))
    assert sample_task.read_instruction(Prompt("p", turns)) == "Why?"
    assert sample_task.name_dataset("tatsu-lab/alpaca_eval@eval") == "tatsu-lab/alpaca_eval@eval"
    assert sample_task.name_dataset("data/prompts.jsonl.gz") == "prompts"


def test_conversations_that_alpacaeval_cannot_name_are_left_out_on_demand(toy, tmp_path, caplog):
    path = tmp_path / "prompts.jsonl"
    talk = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    path.write_text(json.dumps({"prompt": "one"}) + "\n" + json.dumps({"prompt": talk}))
    config = make_config(toy, tmp_path, format="alpacaeval")
    data = dataclasses.replace(config.data, train=str(path))
    config = dataclasses.replace(config, data=data)
    with pytest.raises(RecordError, match=rf"{path} line 2: prompt .*: got 3 turns, but sampling"):
        sample_task.check_instructions(config, sample_task.load_ordered(config))
    config = dataclasses.replace(config, data=dataclasses.replace(data, skip_bad=True))
    assert [one.turns[-1].content for one in sample_task.load_ordered(config)] == ["one"]
    assert "1 bad records are left out (data.skip_bad), 1 are left" in caplog.text


def test_a_preference_file_gives_its_prompts(toy, tmp_path):
    config = make_config(toy, tmp_path, num_prompts=3)
    data = dataclasses.replace(config.data, train=str(toy / "pairs.jsonl"))
    config = dataclasses.replace(config, data=data, rounds=RoundsConfig())
    everything = datasets.order_prompts(datasets.load_prompts(data.train), config.seed)
    chosen = sample_task.select_prompts(config, everything)
    assert len(everything) > 3 and chosen == everything[:3]


def test_the_prompts_of_later_passes_are_those_of_an_online_run(toy, tmp_path):
    config = make_config(toy, tmp_path, num_prompts=3)
    ordered = sample_task.load_ordered(config)[:5]
    rounds = RoundsConfig(passes=2, num_skip=4)
    twice = dataclasses.replace(config, rounds=rounds)
    chosen = sample_task.select_prompts(twice, ordered)
    assert chosen == spread_passes(ordered, twice, 10)[4:7]
    assert [one.pass_number for one in chosen] == [1, 2, 2]
    every = dataclasses.replace(twice, sampling=dataclasses.replace(config.sampling, num_prompts=0))
    assert len(sample_task.select_prompts(every, ordered)) == 6
