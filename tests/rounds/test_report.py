"""What people read of an online run."""

from halos_jax.rounds.report import format_rounds
from halos_jax.workdir import manifests
from halos_jax.workdir.manifests import Manifest, round_folder


def commit_all(folder, manifest) -> None:
    folder.mkdir(parents=True)
    for stage in manifests.stages_of(manifest.round):
        manifest = manifests.commit_stage(folder, manifest, stage)


def test_a_table_of_all_rounds(tmp_path):
    for round, reward in enumerate((0.25, 0.5, 1.0)):
        metrics = {"reward_eval": reward, "reward_eval/rule": 2 * reward, "truncated": 3}
        metrics |= {"feedback_pairs": 7, "response_tokens_eval": 4.0}
        manifest = Manifest(round=round, start=2, stop=2 + round, metrics=metrics)
        commit_all(round_folder(tmp_path, round), manifest)
    lines = [line.split() for line in format_rounds(tmp_path).splitlines()]
    assert lines == [
        ["round", "prompts", "examples", "reward_eval", "reward_eval/rule", "response_tokens_eval"],
        ["0", "0", "0", "0.250", "0.500", "4.000"],
        ["1", "1", "7", "0.500", "1.000", "4.000"],
        ["2", "2", "7", "1.000", "2.000", "4.000"],
    ]


def test_a_table_without_evaluation(tmp_path):
    for round in range(2):
        commit_all(round_folder(tmp_path, round), Manifest(round=round, stop=round))
    (tmp_path / "rounds" / ".DS_Store").write_text("")
    assert format_rounds(tmp_path).split() == ["round", "prompts", "examples", *"000110"]
