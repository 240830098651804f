"""What a round replays: how much, which examples, and that they are copies."""

import collections
import dataclasses

import pytest

from halos_jax.config import FeedbackConfig
from halos_jax.data.records import formats, reading
from halos_jax.rounds.context import StageResult
from halos_jax.rounds.replay import choose
from halos_jax.storage import hash_file
from halos_jax.workdir import manifests
from halos_jax.workdir.manifests import FileRecord, Manifest, ManifestError, round_folder
from tests.rounds.stand_ins import CONFIG


def make_config(share=0.5, type="pairwise", seed=3):
    return dataclasses.replace(CONFIG, seed=seed, feedback=FeedbackConfig(type=type, replay=share))


def write_round(workdir, round, rows, name="feedback.jsonl", **decisions):
    folder = round_folder(workdir, round)
    folder.mkdir(parents=True)
    formats.write_records(folder / name, rows)
    record = FileRecord(hash_file(folder / name), len(rows))
    manifests.save_manifest(folder, Manifest(round, files={name: record}, decisions=decisions))


def make_rows(round, count):
    return [{"prompt_id": f"{round}-{n}", "logps_A": [-0.5 * n]} for n in range(count)]


@pytest.fixture
def workdir(tmp_path):
    """Return a workdir of two rounds, of 40 examples and of 20, and one of ties alone."""
    for round, count in ((1, 40), (2, 20), (3, 0)):
        write_round(tmp_path, round, make_rows(round, count))
    return tmp_path


@pytest.mark.parametrize(
    ("share", "fresh", "count"), [(0.5, 10, 10), (0.25, 30, 10), (0.2, 8, 2), (0.9, 20, 60)]
)
def test_the_share_is_of_all_examples_if_there_are_so_many(workdir, share, fresh, count):
    found = choose.choose_replayed(make_config(share), workdir, 4, make_rows(4, fresh))
    assert found.examples == len(found.rows) == count == sum(found.rounds.values())
    assert count == 60 or count / (count + fresh) == share


def test_examples_are_copies_of_records_of_all_rounds_without_repetition(workdir):
    found = choose.choose_replayed(make_config(), workdir, 4, make_rows(4, 30))
    names = [row["prompt_id"] for row in found.rows]
    assert len(set(names)) == 30
    known = {row["prompt_id"]: row for round in (1, 2) for row in make_rows(round, 40)}
    for row in found.rows:
        assert row == {**known[row["prompt_id"]], "replayed_round": int(row["prompt_id"][0])}
    counts = collections.Counter(row["replayed_round"] for row in found.rows)
    assert found.rounds == {"1": counts[1], "2": counts[2]}
    assert 14 <= counts[1] <= 26, "two thirds of the examples are of round 1"


def test_the_choice_depends_on_seed_and_round_alone(workdir):
    def names(config, round=4):
        fresh = make_rows(round, 10)
        return [
            row["prompt_id"] for row in choose.choose_replayed(config, workdir, round, fresh).rows
        ]

    first = names(make_config())
    assert names(make_config()) == first
    assert names(make_config(seed=4)) != first
    write_round(workdir, 4, [])
    assert names(make_config(), round=5) != first
    assert choose.choose_replayed(make_config(), workdir, 1, make_rows(1, 10)).rows == []
    assert choose.choose_replayed(make_config(), workdir, 4, []).rows == []


def test_the_samples_of_a_prompt_are_one_example_of_scalar_feedback(tmp_path):
    rows = [{"prompt_id": f"p{n // 3}", "sample_id": n % 3} for n in range(30)]
    write_round(tmp_path, 1, rows)
    fresh = [{"prompt_id": f"q{n // 3}"} for n in range(12)]
    found = choose.choose_replayed(make_config(type="scalar"), tmp_path, 2, fresh)
    assert found.examples == 4 and len(found.rows) == 12
    samples = collections.Counter(row["prompt_id"] for row in found.rows)
    assert set(samples.values()) == {3} and len(samples) == 4


@pytest.mark.parametrize(
    ("back", "round", "sources"),
    [({3: 2}, 4, [1, 2]), ({3: 1}, 5, [1, 4]), ({3: 2, 4: 2}, 6, [1, 2, 5]), ({2: 0}, 4, [3])],
)
def test_rounds_that_the_guard_went_back_from_are_not_replayed(tmp_path, back, round, sources):
    for number in range(1, round):
        verdict = {"action": "retry", "to": back[number]} if number in back else {"action": "none"}
        write_round(tmp_path, number, make_rows(number, 10), guard=verdict)
    found = choose.choose_replayed(make_config(0.9), tmp_path, round, make_rows(round, 10))
    assert found.rounds == {str(number): 10 for number in sources}
    assert {row["replayed_round"] for row in found.rows} == set(sources)


def test_what_is_replayed_must_be_as_its_round_wrote_it(workdir):
    path = round_folder(workdir, 2) / "feedback.jsonl"
    path.write_text(path.read_text().replace("-0.5", "-0.6", 1))
    with pytest.raises(ManifestError, match=r"0002/feedback\.jsonl: is gone or not as round 2"):
        choose.choose_replayed(make_config(), workdir, 4, make_rows(4, 1))
    path.unlink()
    with pytest.raises(ManifestError, match=r"put the original file back"):
        choose.choose_replayed(make_config(), workdir, 4, make_rows(4, 1))


def test_the_manifest_says_what_was_chosen(tmp_path):
    found = choose.Replayed([{"a": 1}], 1, {"2": 1})
    done = found.add_to(StageResult({"feedback.jsonl": 5}, {"feedback_pairs": 5}))
    assert done.files == {"feedback.jsonl": 5, "replay.jsonl": 1}
    assert done.metrics == {"feedback_pairs": 5, "feedback_replayed": 1}
    assert done.decisions == {"replay": {"examples": 1, "rounds": {"2": 1}}}
    assert choose.read_replayed(tmp_path) == []
    formats.write_records(tmp_path / choose.FILE, [{"a": 1}])
    assert choose.read_replayed(tmp_path) == [{"a": 1}]
    formats.write_records(tmp_path / choose.FILE, [])
    assert choose.read_replayed(tmp_path) == []
    assert list(reading.read_records(tmp_path / choose.FILE, allow_empty=True)) == []
