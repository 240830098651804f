"""The benchmark task: one JSON line a case, on the console and in workdir/bench.jsonl."""

import dataclasses
import gc
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from halos_jax import sharding
from halos_jax.bench.agreement import run_agreement_case
from halos_jax.bench.ceilings import Ceilings, measure_ceilings
from halos_jax.bench.rounds import run_round_case
from halos_jax.bench.sampling import peak_memory_gib, run_sampling_case
from halos_jax.bench.training import run_forward_case, run_training_case
from halos_jax.bench.workloads import CASES, get_case
from halos_jax.config import Config, ConfigError
from halos_jax.workdir.interrupt import StopSignal

logger = logging.getLogger(__name__)


def check_cases(names: Sequence[str]) -> list[str]:
    """Return an error line for each name that is no case."""
    return [
        f"bench.cases: got {name!r}, allowed: {', '.join(CASES)}; or case=all, case=tiny"
        for name in names
        if name not in CASES
    ]


def run_bench(config: Config, stop: StopSignal) -> dict[str, float]:
    """Run `config.bench.cases` one after the other; print and keep a line of JSON for each.

    Raises:
      ConfigError: for a case that there is not.
    """
    errors = check_cases(config.bench.cases)
    if errors:
        raise ConfigError("\n".join(errors))
    mesh = sharding.make_mesh(config.mesh)
    folder = Path(config.workdir)
    folder.mkdir(parents=True, exist_ok=True)
    ceilings = measure_ceilings(tiny=config.bench.tiny)
    about = {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "jax": jax.__version__,
        "params": config.model.params_dtype,
        "moments": config.optimizer.moments_dtype,
        "matmul_tflops": ceilings.flops / 1e12,
        "copy_gb_per_second": ceilings.bytes / 1e9,
    }
    for name in config.bench.cases:
        stop.check()
        found = _run_case(name, config, mesh, ceilings, stop)
        # The next case may need all of the memory.
        jax.clear_caches()
        gc.collect()
        # Of the process so far, so a case's own where it runs alone.
        line = {"case": name, **found, "peak_gib": peak_memory_gib(), **about}
        text = json.dumps({key: _shorten(value) for key, value in line.items()})
        if jax.process_index() == 0:
            print(text, flush=True)
            with open(folder / "bench.jsonl", "a", encoding="utf-8") as stream:
                stream.write(text + "\n")
    return {}


def _run_case(
    name: str, config: Config, mesh: Mesh, ceilings: Ceilings, stop: StopSignal
) -> dict[str, Any]:
    case = get_case(name, tiny=config.bench.tiny)
    if config.bench.examples:
        case = dataclasses.replace(case, examples=config.bench.examples)
    if case.kind == "round":
        return run_round_case(case, config, mesh, stop)
    run = {
        "train": run_training_case,
        "reference": run_forward_case,
        "reward": run_forward_case,
        "sample": run_sampling_case,
        "agreement": run_agreement_case,
    }[case.kind]
    with jax.set_mesh(mesh):
        return run(case, config, mesh, ceilings)


def _shorten(value: object) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value
