"""Re-scoring: a few of a round's samples, by the trainer's forward pass.

    rounds/0003/rescored.jsonl   {"prompt_id", "sample_id", "sampled": [...], "rescored": [...]}

Sampler and trainer compute the same log-probabilities (nats, temperature 1, all tokens) by other
programs: one token at a time with a cache, or packed rows. What differs is rounding; a wrong
weight, position or mask differs by far more. Which samples these are depends on (seed, round,
prompt id) alone, so a resumed run re-scores the same ones.
"""

import dataclasses
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from halos_jax import sharding
from halos_jax.config import Config
from halos_jax.data.records.formats import digest, write_records
from halos_jax.devices import explain_memory
from halos_jax.packing.layout import LayoutMemory
from halos_jax.rounds.context import NOTHING, Run, StageResult
from halos_jax.rounds.proof.origin import OriginError
from halos_jax.rounds.watch import watched as watching
from halos_jax.sampling.responses import keeps_logps
from halos_jax.training.followers import take_policy
from halos_jax.types import Params, Prompt, Sample, TrainState
from halos_jax.workdir.manifests import round_folder

logger = logging.getLogger(__name__)

FILE = "rescored.jsonl"
# Bounds on the mean and on the largest absolute difference (nats a token), by what products of
# matrices are rounded to. On a CPU, models of 4 to 16 layers gave means of 6e-7 to 2e-6, and of
# 0.009 to 0.03 in bfloat16; one layer's MLP 1 % off 1e-3 to 5e-3, and in bfloat16 nothing to see.
BOUNDS: Mapping[str, tuple[float, float]] = {"float32": (1e-4, 1e-2), "bfloat16": (5e-2, 2.0)}
_PRECISION, _EXACT = "jax_default_matmul_precision", ("highest", "float32")


@dataclasses.dataclass(frozen=True)
class Difference:
    """What re-scoring found: over all tokens, absolute differences in nats.

    `place` is where the largest one is, in words.
    """

    mean: float
    largest: float
    tokens: int
    place: str

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics of the round."""
        return {
            "rescore_mean": self.mean,
            "rescore_max": self.largest,
            "rescore_tokens": float(self.tokens),
        }


def choose_prompts(config: Config, prompts: Iterable[Prompt], round: int) -> frozenset[str]:
    """Return the ids of the prompts of which all samples are re-scored.

    They have `rounds.rescore_samples` samples at most, but one prompt is chosen at least. They are
    the first of those that `watch.watched.choose_watched` takes.
    """
    per_prompt, count = config.sampling.num_samples_per_prompt, config.rounds.rescore_samples
    names = sorted(
        {prompt.prompt_id for prompt in prompts},
        key=lambda name: digest("watch", config.seed, round, name),
    )
    return frozenset(names[: max(count // per_prompt, 1)] if count else ())


def drop_logps(config: Config, samples: Iterable[Sample]) -> list[Sample]:
    """Return samples as samples.jsonl has them: with `logps` only if the config keeps them."""
    return [
        one
        if one.logps is None or keeps_logps(config.sampling, one.drawn)
        else dataclasses.replace(one, logps=None)
        for one in samples
    ]


def rescore(
    run: Run, params: Params, samples: Sequence[Sample], chosen: Collection[str], *, round: int
) -> tuple[list[dict[str, Any]], Difference | None]:
    """Re-score the samples of the chosen prompts; return the rows of the file, and what differs.

    Args:
      params: the policy that drew the samples, as it is trained.
      samples: the round's; those of the chosen prompts with `logps`.
    """
    picked = [one for one in samples if one.prompt.prompt_id in chosen and one.logps is not None]
    most = run.config.train.tokens_per_device
    picked = [one for one in picked if len(one.prompt_ids) + len(one.response_ids) <= most]
    if not picked:
        if chosen:
            logger.info(
                "round %d: none of its samples is re-scored: they are of an earlier version, or "
                "longer than train.tokens_per_device=%d",
                round,
                most,
            )
        return [], None
    # The layout of the signs' passes, whose program serves here too; what that will be is not
    # changed: a run that is resumed behind this place knows nothing of it.
    layouts = LayoutMemory()
    layouts.load(run.trainer.layouts.to_record())
    aside = dataclasses.replace(run, trainer=dataclasses.replace(run.trainer, layouts=layouts))
    watching.plan_watched(aside, watching.choose_watched(run.config, samples, round))
    found = watching.compute_tokens(aside, picked, params, label=f"re-score {round}")
    rows = [
        {
            "prompt_id": one.prompt.prompt_id,
            "sample_id": one.sample_id,
            "sampled": list(one.logps or ()),
            "rescored": logps.tolist(),
        }
        for one, logps in zip(picked, found, strict=True)
    ]
    return rows, compare(rows)


def compare(rows: Sequence[Mapping[str, Any]]) -> Difference:
    """Return the differences of the log-probabilities in the rows of rescored.jsonl."""
    gaps = [
        np.abs(np.asarray(row["sampled"], np.float64) - np.asarray(row["rescored"], np.float64))
        for row in rows
    ]
    worst = max(range(len(rows)), key=lambda at: gaps[at].max())
    token, row = int(gaps[worst].argmax()), rows[worst]
    joined = np.concatenate(gaps)
    return Difference(
        float(joined.mean()),
        float(joined.max()),
        joined.size,
        f"token {token} of sample {row['sample_id']} of prompt {row['prompt_id']}, "
        f"{row['sampled'][token]:.4f} by the sampler and {row['rescored'][token]:.4f} by the "
        "trainer",
    )


def find_bounds(config: Config) -> tuple[float, float]:
    """Return the bounds on the mean and on the largest difference (nats a token)."""
    usual = BOUNDS[find_rounding(config)]
    asked = (config.rounds.rescore_mean, config.rounds.rescore_max)
    mean, largest = (
        default if isinstance(one, str) else one for one, default in zip(asked, usual, strict=True)
    )
    return mean, largest


def find_rounding(config: Config) -> str:
    """Return the dtype that products of matrices are rounded like.

    A GPU multiplies float32 as TF32 and a TPU as bfloat16, unless jax is told otherwise.
    """
    is_exact = jax.default_backend() == "cpu" or getattr(jax.config, _PRECISION, None) in _EXACT
    return config.model.compute_dtype if is_exact else "bfloat16"


def check(config: Config, found: Difference, round: int) -> None:
    """Raise OriginError if the samples are not the policy's, by what re-scoring found."""
    mean, largest = find_bounds(config)
    if found.mean <= mean and found.largest <= largest:  # not so for NaN, either
        return
    raise OriginError(
        f"round {round}: the sampler's log-probabilities are not the trainer's: they differ by "
        f"{found.mean:.3g} nats a token on average and {found.largest:.3g} at most ({found.place}; "
        f"{found.tokens} tokens), allowed: rounds.rescore_mean={mean:g} and "
        f"rounds.rescore_max={largest:g} in {find_rounding(config)}; the samples are kept, "
        f"and those that were re-scored are in {FILE}; if this is only rounding (experts that "
        "tip over, a very deep model), raise the bounds on the same command line; else try "
        "--config.model.attention=xla, and report it"
    )


@dataclasses.dataclass(frozen=True)
class Rescoring:
    """The re-scoring of a round: of which prompts, and what does it once these are sampled."""

    prompts: frozenset[str] = frozenset()
    run: Callable[[Sequence[Sample]], StageResult] = lambda samples: NOTHING

    def add_to(self, done: StageResult, samples: Sequence[Sample]) -> StageResult:
        """Return the result of sampling with that of re-scoring `samples`."""
        more = self.run(samples)
        return StageResult({**done.files, **more.files}, {**done.metrics, **more.metrics})


NO_RESCORING = Rescoring()


def make_rescoring(run: Run, state: TrainState, prompts: Iterable[Prompt], round: int) -> Rescoring:
    """Return the re-scoring of a round's samples, which the policy of `state` draws.

    It writes rescored.jsonl and the metrics, and raises OriginError as `check` does.
    """
    chosen = choose_prompts(run.config, prompts, round)
    folder = round_folder(run.workdir, round)

    def do(samples: Sequence[Sample]) -> StageResult:
        with explain_memory("rescore", f"re-scoring samples of round {round}", run.config):
            rows, found = rescore(run, take_policy(state.params), samples, chosen, round=round)
        if found is None:
            return NOTHING
        if run.workspace.is_writer:
            write_records(folder / FILE, rows)
        sharding.wait_for_all(f"wrote {FILE}")
        run.writer.write(int(state.step), {"round": round, **found.metrics})
        run.writer.flush()  # before the manifest says that the stage is done, or the run stops
        check(run.config, found, round)
        return StageResult({FILE: len(rows)}, found.metrics)

    return Rescoring(chosen, do)
