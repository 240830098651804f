"""Rounds on disk, as a run that is done leaves them."""

import json

from halos_jax.workdir import manifests, timing
from halos_jax.workdir.manifests import Manifest, round_folder

# What rounds of the newest kind say of themselves: an estimate, shares, signs.
FIRST = {"reward_eval": 0.25, "reward_eval/low": 0.2, "reward_eval/high": 0.3}
FIRST |= {"reward_eval/rule": 0.5, "response_tokens_eval": 4.0, "steps_done": 0}
SIGNS = {"kl_sampled": 1.234, "fresh_margin": -0.0321, "tied_share": 0.6, "kl_stale": 0.071}
SECOND = {"feedback_pairs": 7, "samples": 20, "truncated": 5, "steps_done": 3, **SIGNS}
THIRD = {**SECOND, **FIRST, "win_rate_eval": 0.55, "steps_done": 5}


def commit_all(folder, manifest) -> None:
    folder.mkdir(parents=True)
    for stage in manifests.stages_of(manifest.round):
        manifest = manifests.commit_stage(folder, manifest, stage)


def commit_rounds(workdir, *metrics):
    for round, found in enumerate(metrics):
        manifest = Manifest(round=round, start=2, stop=2 + 10 * round, metrics=found)
        commit_all(round_folder(workdir, round), manifest)


def name_scorers(workdir, *rules, **sections):
    reward = {"rules": [f"module:{name}" for name in rules], **sections.pop("reward", {})}
    (workdir / "config.json").write_text(json.dumps({"reward": reward, **sections}))


def time_rounds(workdir, round=1, *stages):
    """Write how many seconds each stage of a round took; there is a second between two."""
    start, lines = 0.0, []
    for stage, seconds in stages or (("sample", 2), ("train", 1.5)):
        lines.append({"round": round, "stage": stage, "start": start, "end": start + seconds})
        start += seconds + 1
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (workdir / timing.FILE).write_text(text)
