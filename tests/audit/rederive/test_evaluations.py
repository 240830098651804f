"""Evaluations made again."""

from types import SimpleNamespace

from halos_jax.audit.rederive import evaluations
from halos_jax.data.records import formats as records
from halos_jax.types import Prompt, Sample, Turn
from halos_jax.workdir.manifests import FileRecord, Manifest

PROMPTS = [Prompt(str(number), (Turn("user", "a"),), {"answer": number}) for number in range(3)]
SAMPLES = [Sample(one, 0, "x", (1,), (2, 3), "stop", reward=0.5) for one in PROMPTS]


def test_what_was_evaluated_is_named_by_the_files():
    files = {name: FileRecord("", 1) for name in ("test.jsonl", "eval.jsonl")}
    assert evaluations.list_splits(Manifest(1, files=files)) == ["eval", "test"]
    assert evaluations.list_splits(Manifest(1)) == []


def test_recorded_answers_are_read_without_the_scores_of_others(tmp_path):
    rows = [records.sample_to_record(one) | {"scores": {"short": 1.0}} for one in SAMPLES]
    records.write_records(tmp_path / "eval.jsonl", rows)
    replica = SimpleNamespace(folder=lambda round: tmp_path)
    run = SimpleNamespace(held_out=PROMPTS, test=())
    draws = evaluations.read_drawn(replica, run, Manifest(4), "eval")
    assert (draws.check, draws.round, draws.prompts) == ("held-out samples", 0, PROMPTS)
    assert draws.samples == SAMPLES


def test_shards_are_those_of_the_stage_without_rewards(tmp_path):
    sampling = SimpleNamespace(shard_prompts=2)
    run = SimpleNamespace(config=SimpleNamespace(sampling=sampling))
    draws = evaluations.Draws("held-out samples", 0, PROMPTS, SAMPLES)
    evaluations._put_shards(run, tmp_path, draws, "eval")
    found = [evaluations.read_rows(path) for path in sorted(tmp_path.iterdir())]
    assert [[row["prompt_id"] for row in shard] for shard in found] == [["0", "1"], ["2"]]
    assert not any("reward" in row for shard in found for row in shard)
