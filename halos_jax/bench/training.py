"""Cases of optimizer steps and of forward passes, on the trainer's own path."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
from jax.sharding import Mesh

from halos_jax import sharding
from halos_jax.bench.ceilings import Ceilings
from halos_jax.bench.workloads import Case, make_decoder, make_items
from halos_jax.config import Config
from halos_jax.losses import get_loss
from halos_jax.models.spec import DecoderConfig, init_params, params_shardings
from halos_jax.training import loop as training
from halos_jax.training.pace import count_forward_flops
from halos_jax.types import Item, Params

_WARM_UP = 2  # steps before the clock runs: one with compilation, one with everything warm


def run_training_case(case: Case, config: Config, mesh: Mesh, ceilings: Ceilings) -> dict[str, Any]:
    """Time optimizer steps, each with the forward pass of the reference if the loss has one; return
    the measurement."""
    steps = config.bench.steps
    decoder = make_decoder(case, config.model)
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, batch_size=case.examples)
    )
    loss = get_loss({"name": case.loss})
    trainer = training.make_trainer(config, decoder, loss, mesh, total_steps=1000)
    items = make_items(
        case, steps=steps + _WARM_UP, vocab_size=decoder.vocab_size, sampling=config.sampling
    )
    dataset = training.make_dataset(trainer, items, seed=0)
    reference = draw_params(decoder, mesh, seed=1) if loss.reference else None
    state = training.start_state(trainer, draw_params(decoder, mesh, seed=0))

    started, compile_seconds, memory = 0.0, 0.0, None
    train_step: Callable[..., Any] = trainer.train_step
    for number, batch in enumerate(training.stream_batches(mesh, dataset)):
        if number == 0:
            start = time.perf_counter()
            jitted = cast(jax.stages.Wrapped, trainer.train_step)
            train_step = compiled = jitted.lower(state, None, batch).compile()
            compile_seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
        if number == _WARM_UP:
            jax.block_until_ready(state)
            started = time.perf_counter()
        if reference is not None:
            logps = jax.device_put(
                trainer.logps(reference, None, batch), batch.reference_logps.sharding
            )
            batch = dataclasses.replace(batch, reference_logps=logps)
        state, metrics = train_step(state, None, batch)
    jax.block_until_ready((state, metrics))
    seconds = time.perf_counter() - started

    timed = _list_timed(dataset)
    # The backward pass is two forward passes, the reference is one.
    flops = (4 if loss.reference else 3) * count_forward_flops(timed, decoder)
    return {
        **report_rates(timed, seconds, flops, ceilings, mesh),
        "seconds_per_step": seconds / steps,
        "compile_seconds": compile_seconds,
        "program_gib": _sum_memory(memory) / 2**30,
        "fill": dataset.plan.fill,
    }


def run_forward_case(case: Case, config: Config, mesh: Mesh, ceilings: Ceilings) -> dict[str, Any]:
    """Time packed forward passes: a reference's log-probs, or a reward model's scores."""
    steps = config.bench.steps
    decoder = make_decoder(case, config.model)
    decoder = dataclasses.replace(decoder, params_dtype=decoder.compute_dtype, remat="none")
    config = dataclasses.replace(
        config, train=dataclasses.replace(config.train, batch_size=case.examples)
    )
    loss = get_loss({"name": "bradley-terry" if decoder.num_labels else "dpo"})
    trainer = training.make_trainer(config, decoder, loss, mesh, total_steps=1000)
    items = make_items(case, steps=steps + _WARM_UP, vocab_size=decoder.vocab_size)
    dataset = training.make_dataset(trainer, items, seed=0)
    params = draw_params(decoder, mesh, seed=0)
    run = trainer.eval_step if decoder.num_labels else trainer.logps

    started, result = 0.0, None
    start = time.perf_counter()
    for number, batch in enumerate(training.stream_batches(mesh, dataset)):
        if number == _WARM_UP:
            jax.block_until_ready(result)
            started = time.perf_counter()
        result = run(params, None, batch)
        if number == 0:
            jax.block_until_ready(result)
            compile_seconds = time.perf_counter() - start
    jax.block_until_ready(result)
    seconds = time.perf_counter() - started

    timed = _list_timed(dataset)
    flops = count_forward_flops(timed, decoder)
    return {
        **report_rates(timed, seconds, flops, ceilings, mesh),
        "compile_seconds": compile_seconds,
        "fill": dataset.plan.fill,
    }


def _list_timed(dataset: training.Dataset) -> list[Item]:
    """Return the items of the steps that the clock saw."""
    rows = itertools.chain.from_iterable(dataset.plan.steps[_WARM_UP:])
    return [dataset.items[index] for row in rows for index in row]


def draw_params(decoder: DecoderConfig, mesh: Mesh, *, seed: int) -> Params:
    """Draw params straight into their shards."""
    shardings = params_shardings(decoder, mesh)
    draw = jax.jit(init_params, static_argnums=1, out_shardings=shardings)
    params: Params = draw(jax.random.key(seed), decoder)
    return params


def report_rates(
    items: Sequence[Item], seconds: float, flops: float, ceilings: Ceilings, mesh: Mesh
) -> dict[str, float]:
    """Return what a number of examples in a time means."""
    return {
        "examples_per_second": len(items) / seconds,
        "tokens_per_second": sum(item.num_tokens for item in items) / seconds,
        "of_matmul_ceiling": flops / seconds / (ceilings.flops * mesh.size),
        "rows": sharding.num_row_shards(mesh),
    }


def _sum_memory(memory: Any) -> int:
    """Return the bytes a device needs for a program: arguments, results and temporaries."""
    if memory is None:
        return 0
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
