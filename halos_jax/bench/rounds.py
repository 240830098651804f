"""The case of a whole round: the online task itself, on random models that are made for it."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from halos_jax.bench.training import draw_params
from halos_jax.bench.workloads import ARCHITECTURES, Case, make_decoder
from halos_jax.config import Config, ModelConfig
from halos_jax.data.records.formats import make_prompt_id, write_records
from halos_jax.data.toy import make_tokenizer
from halos_jax.models.files.export import save_model
from halos_jax.tasks.online import run_online
from halos_jax.types import Turn
from halos_jax.workdir.interrupt import StopSignal
from halos_jax.workdir.timing import read_times

# The second is reported, up to the start of the third: in the first everything compiles, and what
# is left to do when a round's stages are over, the next one waits for.
_ROUNDS, _REPORTED = 3, 2
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def run_round_case(case: Case, config: Config, mesh: Mesh, stop: StopSignal) -> dict[str, Any]:
    """Run three rounds in a folder of their own; return the seconds of the second one's stages."""
    workdir = Path(config.workdir) / "round"
    if workdir.exists():
        shutil.rmtree(workdir)
    _make_inputs(case, config, workdir, mesh)
    run_online(_make_config(case, config, workdir), stop)
    times = read_times(workdir / "run")
    shutil.rmtree(workdir)
    starts = [one["start"] for one in times if one["stage"] == "sample"]
    whole = starts[_REPORTED] - starts[_REPORTED - 1]
    stages = [one for one in times if one["round"] == _REPORTED]
    seconds = {one["stage"]: one["end"] - one["start"] for one in stages}
    return {
        "seconds": whole,
        **{f"seconds_{stage}": value for stage, value in seconds.items()},
        "in_no_stage": 1 - sum(seconds.values()) / whole,
        "samples_per_second": case.examples * case.samples / whole,
    }


def _make_inputs(case: Case, config: Config, workdir: Path, mesh: Mesh) -> None:
    """Write prompts, the policy's architecture and tokenizer, and a reward model of its size."""
    tokenizer = make_tokenizer(_ALPHABET)
    architecture = ARCHITECTURES[case.model] | {"eos_token_id": tokenizer.eos_token_id}
    policy, reward = workdir / "policy", workdir / "reward"
    policy.mkdir(parents=True)
    tokenizer.save_pretrained(policy)
    (policy / "config.json").write_text(json.dumps(architecture), encoding="utf-8")
    settings = ModelConfig(params_dtype="bfloat16")
    decoder = make_decoder(dataclasses.replace(case, kind="reward"), settings)
    with jax.set_mesh(mesh):
        save_model(draw_params(decoder, mesh, seed=1), decoder, reward, source=policy)
    letters = case.fixed_lengths[0] - 2  # the template adds a token before and one after
    prompts = []
    for number in range(case.examples * _ROUNDS):
        text = "".join(_ALPHABET[(number // 26**place) % 26] for place in range(letters))
        turns = (Turn("user", text),)
        record = [{"role": turn.role, "content": turn.content} for turn in turns]
        prompts.append({"prompt": record, "prompt_id": make_prompt_id(turns)})
    write_records(workdir / "prompts.jsonl", prompts)


def _make_config(case: Case, config: Config, workdir: Path) -> Config:
    prompt_length, max_tokens = case.fixed_lengths
    change = dataclasses.replace
    return change(
        config,
        task="online",
        workdir=str(workdir / "run"),
        model=change(config.model, path=str(workdir / "policy"), random_init=True),
        reward=change(config.reward, kind="model", path=str(workdir / "reward")),
        data=change(config.data, train=str(workdir / "prompts.jsonl"), eval=""),
        rounds=change(
            config.rounds,
            total_prompts=case.examples * _ROUNDS,
            prompts_per_round=case.examples,
        ),
        sampling=change(
            config.sampling,
            num_samples_per_prompt=case.samples,
            max_prompt_length=prompt_length,
            max_tokens=max_tokens,
        ),
        loss={"name": case.loss},
        train=change(config.train, max_length=prompt_length + max_tokens, eval_every=0),
    )
