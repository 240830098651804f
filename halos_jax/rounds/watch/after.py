"""Staleness, measured at the end of a round's training on its own watched responses."""

import logging
import time

from halos_jax.devices import explain_memory
from halos_jax.rounds.context import Run, StageResult
from halos_jax.rounds.pending import open_stage
from halos_jax.rounds.stages import read_scored
from halos_jax.rounds.watch import watched as watching
from halos_jax.rounds.watch.replayed import measure_replayed
from halos_jax.signs.staleness import measure_staleness
from halos_jax.training.followers import take_policy
from halos_jax.types import TrainState
from halos_jax.workdir.manifests import round_folder

logger = logging.getLogger(__name__)


def add_staleness(run: Run, state: TrainState, evaluation: StageResult, round: int) -> StageResult:
    """Return the result of a round's last stage with the signs of staleness.

    The policy now is the one that the next round samples from: no moving average of it.
    """
    if not (round and run.config.rounds.watch_samples):
        return evaluation
    began, folder = time.monotonic(), round_folder(run.workdir, round)
    watched = watching.choose_watched(run.config, read_scored(folder), round)
    if not watched:
        return evaluation
    run.stop.check()
    label = f"staleness {round}"
    explained = explain_memory("signs", f"the staleness of round {round}", run.config)
    with open_stage(run, round, "staleness"), explained:
        policy = take_policy(state.params)
        sums = watching.compute_sums(run, watched, policy, label=label)
        ages = measure_replayed(run, policy, round)
    drawn = [one.sum_logps for one in watched if one.sum_logps is not None]
    signs = measure_staleness(
        [now - old for now, old in zip(sums, drawn, strict=True)],
        [len(one.response_ids) for one in watched],
        [one.prompt.prompt_id for one in watched],
        is_exact=watching.is_exact(run.config.sampling),
    )
    metrics = watching.name_metrics({**signs, **ages})
    run.writer.write(int(state.step), {"round": round, **metrics})
    run.writer.flush()  # before the manifest says that the stage is done
    logger.debug("round %d: staleness in %.2f s", round, time.monotonic() - began)
    return evaluation._replace(metrics={**evaluation.metrics, **metrics})
