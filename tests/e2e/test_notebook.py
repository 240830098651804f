"""The notebooks run from their first cell to their last: the quickstart's on less data."""

import contextlib
import io
import json
import logging
import os
import re
import sys
from pathlib import Path

import matplotlib.pyplot
import pytest

import halos_jax

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Run in an empty folder; of the quickstart's preset, take fewer records and samples."""
    load = halos_jax.load_preset

    def load_preset(path):
        config = load(str((ROOT / "colabs" / path).resolve()))
        sizes = {"num_sft": 64, "num_pairs": 64, "num_prompts": 36, "num_eval": 48}
        config.toy.update(sizes)
        config.rounds.total_prompts, config.rounds.prompts_per_round = 16, 4
        config.sampling.slots = 64
        with config.unlocked():
            for task in ("sft", "reward_model"):
                config.pipeline.overrides[task]["train"] = {"batch_size": 64, "epochs": 1}
        return config

    monkeypatch.setattr(halos_jax, "load_preset", load_preset)
    monkeypatch.chdir(tmp_path)
    os.makedirs("colabs", exist_ok=True)
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield tmp_path
    root.handlers[:], root.level = before


def read_cells():
    notebook = json.loads((ROOT / "colabs" / "quickstart.ipynb").read_text())
    cells = ["".join(one["source"]) for one in notebook["cells"] if one["cell_type"] == "code"]
    return [cell for cell in cells if not cell.startswith("%pip")]


def test_the_notebook_asks_for_what_there_is():
    text = "\n".join(read_cells())
    compile(text, "quickstart.ipynb", "exec")
    used = set(re.findall(r"\bhalos_jax\.([a-z]\w+)\(", text))
    assert used <= set(halos_jax.__all__) and {"run", "load_policy", "sample", "train"} <= used


@pytest.mark.slow
def test_the_notebook_runs(small, capsys):
    names = {}
    for cell in read_cells():
        exec(cell, names)
    shown = capsys.readouterr().out
    assert names["metrics"]["reward_eval"] >= 0 and "task reward_model: " in shown
    assert "score_by_rule" in shown
    # A line for each of ten prompts: the question, the answer before, the answer after.
    assert len(re.findall(r"(?m)^ *[a-z]+ \|[^|]*\|[^|\n]*$", shown)) == 10
    assert len(names["samples"]) == 4 * len(names["prompts"]) == 4 * 32
    assert names["pairs"]
    assert all(one.chosen.reward > one.rejected.reward for one in names["pairs"])


@pytest.fixture
def in_colabs(monkeypatch):
    """Run where a notebook runs, with figures that are drawn into memory."""
    matplotlib.use("Agg")
    monkeypatch.chdir(ROOT / "colabs")
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield
    matplotlib.pyplot.close("all")


def test_the_notebook_of_the_study_shows_what_its_results_say(in_colabs):
    notebook = json.loads((ROOT / "colabs" / "gsm8k_study.ipynb").read_text())
    names = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or source.startswith("%pip"):
            continue
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(source, names)
        shown = [one for one in cell["outputs"] if one["output_type"] == "stream"]
        assert printed.getvalue() == "".join(line for one in shown for line in one["text"]), source
    assert len(names["results"]) >= 10
