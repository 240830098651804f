import json

import pytest

from halos_jax.rounds import evaluation
from halos_jax.trackers import samples
from halos_jax.trackers.samples import read_samples, shorten
from halos_jax.workdir.manifests import round_folder

EVALUATED = {"round": 2, "reward_eval": 0.5}


@pytest.fixture
def workdir(tmp_path):
    folder = round_folder(tmp_path, 2)
    folder.mkdir(parents=True)
    turns = [{"role": "system", "content": "Sort."}, {"role": "user", "content": "ba"}]
    rows = [{"prompt": turns, "output": f"answer {n}", "reward": n / 4} for n in range(3)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / evaluation.EVAL).write_text(text)
    return tmp_path


def test_the_first_samples_of_the_evaluated_round_are_a_table(workdir):
    found = read_samples(workdir, EVALUATED, 2)
    assert found.columns == ("prompt", "response", "reward")
    prompt = "system: Sort.\nuser: ba"
    assert found.rows == ((prompt, "answer 0", 0.0), (prompt, "answer 1", 0.25))
    assert samples.FILE == evaluation.EVAL


def test_other_metrics_have_no_table(workdir):
    assert read_samples(workdir, EVALUATED, 0) is None
    assert read_samples(workdir, {"round": 2, "loss/eval": 0.5}, 2) is None
    assert read_samples(workdir, {"round": 1, "reward_eval": 0.5}, 2) is None  # without a file
    assert read_samples(workdir, {"reward_eval": 0.5}, 2) is None


def test_a_long_text_keeps_its_ends():
    assert shorten("a" * 2000) == "a" * 2000
    text = "a" * 1000 + "b" * 500 + "c" * 1000
    assert shorten(text) == "a" * 1000 + " [... 500 characters ...] " + "c" * 1000
