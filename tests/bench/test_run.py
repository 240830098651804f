"""The benchmark task: a line a case, and one error for names that are none."""

import dataclasses
import json
from pathlib import Path

import pytest

from halos_jax.bench import run as bench
from halos_jax.config import ConfigError
from halos_jax.workdir.interrupt import StopSignal


def test_a_line_of_json_a_case(config, capsys):
    names = ("decode_1b",)
    settings = dataclasses.replace(config.bench, cases=names, examples=3)
    config = dataclasses.replace(config, bench=settings)
    bench.run_bench(config, StopSignal())
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kept = [json.loads(line) for line in (Path(config.workdir) / "bench.jsonl").open()]
    assert printed == kept
    (line,) = kept
    assert line["case"] == "decode_1b" and line["tokens_per_second"] > 0
    assert line["matmul_tflops"] > 0 and line["device"]
    assert line["slots"] == 3, "as many as there are samples"


def test_an_unknown_case_is_named_before_anything_runs(config):
    names = ("decode_1b", "decode_2b")
    config = dataclasses.replace(config, bench=dataclasses.replace(config.bench, cases=names))
    with pytest.raises(ConfigError, match=r"bench.cases: got 'decode_2b', allowed: dpo_1b_full"):
        bench.run_bench(config, StopSignal())
    assert not Path(config.workdir).exists()
