"""The notebooks run from their first cell to their last, on a tiny model and little data.

Each has one cell of parameters, tagged as papermill wants it; a test puts its own behind it.
"""

import contextlib
import io
import json
import logging
import re
import sys
from pathlib import Path

import matplotlib.pyplot
import pytest

import halos_jax
from halos_jax.losses import registry

ROOT = Path(__file__).parents[2]
STUDY = "gsm8k_study"
# What a test sets in the place of a notebook's parameters.
SAMPLED = {"PROMPTS_PER_ROUND": 4, "HELD_OUT": 4, "ROUNDS": 1}
SMALL = {"SFT_EXAMPLES": 32, **SAMPLED}
TOY = {**SMALL, "REWARD_PAIRS": 32}
PARAMETERS = {
    "quickstart": TOY,
    "one_round": TOY,
    "your_own": SMALL,
    "real_model": {**SAMPLED, "SAMPLES": 3, "MAX_TOKENS": 8, "DTYPE": "float32"},
    "tpu_start": {"SFT_EXAMPLES": 32, "PROMPTS": 4, "HELD_OUT": 4},
}
NAMES = sorted(PARAMETERS)


def read_notebook(name):
    return json.loads((ROOT / "colabs" / f"{name}.ipynb").read_text(encoding="utf-8"))


def read_cells(name, tag=None):
    """Return the code cells of a notebook, or those with a tag."""
    cells = [one for one in read_notebook(name)["cells"] if one["cell_type"] == "code"]
    return [one for one in cells if tag is None or tag in one["metadata"].get("tags", ())]


def read_source(cell):
    """Return a cell as plain Python: its magics as the calls that IPython makes of them."""
    source = "".join(cell["source"])
    if source.startswith("%%writefile "):
        head, _, text = source.partition("\n")
        name = head.removeprefix("%%writefile ")
        return f"__import__('pathlib').Path({name!r}).write_text({text!r})"
    return re.sub(r"(?m)^( *)%pip (.*)$", r"\1get_ipython().run_line_magic('pip', f'\2')", source)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_asks_for_what_there_is(name):
    text = "\n".join(map(read_source, read_cells(name)))
    compile(text, f"{name}.ipynb", "exec")
    assert set(re.findall(r"\bhalos_jax\.([A-Za-z]\w+)\(", text)) <= set(halos_jax.__all__)
    (parameters,) = read_cells(name, "parameters")
    names = {}
    exec(read_source(parameters), names)
    assert PARAMETERS[name].keys() <= names.keys() and names["WORKDIR"]


@pytest.mark.parametrize("name", [name for name in NAMES if name != "real_model"])
def test_the_outputs_that_are_stored_are_those_of_one_whole_run(name):
    cells = read_cells(name)
    assert [one["execution_count"] for one in cells] == list(range(1, len(cells) + 1))
    outputs = [output for one in cells for output in one["outputs"]]
    assert "error" not in {one["output_type"] for one in outputs}
    pictures = [one for one in outputs if "image/png" in one.get("data", {})]
    assert pictures or name == "tpu_start"
    text = json.dumps(read_notebook(name))
    assert len(text) < 400_000 and not re.search(r"/root\b|/home\b|/tmp\b|/work\b", text)


@pytest.mark.parametrize("name", NAMES)
def test_links_of_a_notebook_lead_somewhere(name):
    texts = [one["source"] for one in read_notebook(name)["cells"] if one["cell_type"] != "code"]
    text = "\n".join(map("".join, texts))
    assert all((ROOT / "colabs" / to).exists() for to in re.findall(r"\]\(([^)#]+)\)", text))
    files = re.findall(r"`((?:halos_jax|configs|launch)/[\w/.]+)`", text)
    assert all((ROOT / file).exists() for file in files)


@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_the_first_cell_installs_the_package_where_it_is_missing(backend, monkeypatch):
    asked = []

    class Shell:
        def run_line_magic(self, *words):
            asked.append(words)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setenv("HALOS_JAX_SOURCE", "git+https://HOST/halos_jax")
    monkeypatch.delenv("TPU_ACCELERATOR_TYPE", raising=False)
    if backend == "tpu":
        monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5e-8")
    sources = {read_source(*read_cells(name, "install")) for name in NAMES}
    (source,) = sources  # the same in all of them
    exec(source, {"get_ipython": Shell})
    wanted = f'install -q "halos_jax[{backend},notebooks] @ git+https://HOST/halos_jax"'
    assert asked == [("pip", wanted)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return the folder that the notebooks run in: one uses what another has left, as for users."""
    return tmp_path_factory.mktemp("notebooks")


def spare(config):
    """Leave out programs that only watch a run; the quickstart, which draws KL, has them."""
    config.rounds.watch_samples = config.rounds.rescore_samples = 0
    return config


@pytest.fixture
def unwatched(monkeypatch):
    """Let configs begin without the programs that watch a run, which take long to compile."""
    for name in ("load_preset", "default_config"):
        make = getattr(halos_jax, name)
        monkeypatch.setattr(halos_jax, name, lambda *given, make=make: spare(make(*given)))


@pytest.fixture
def in_folder(monkeypatch, folder):
    """Run in that folder, from which a notebook imports, with figures drawn into memory.

    A loss that a notebook registers is gone after it.
    """
    matplotlib.use("Agg")
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield folder
    root.handlers[:], root.level = before
    matplotlib.pyplot.close("all")


def run_notebook(name, **parameters):
    """Run all cells of a notebook; return its names."""
    names = {"__name__": "notebook"}
    for cell in read_cells(name):
        exec(compile(read_source(cell), f"{name}.ipynb", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            names.update(PARAMETERS[name] | parameters)
    return names


def test_the_quickstart_runs(in_folder, capsys):
    names = run_notebook("quickstart")
    assert [one["round"] for one in halos_jax.read_rounds("runs/notebook/turned")] == [0, 1]
    assert names["turned"].optimizer.learning_rate == 2e-4 != names["config"].optimizer
    assert {"report.html"} <= {one.name for one in Path("runs/notebook/online").iterdir()}
    assert Path("runs/notebook/comparison.html").stat().st_size > 10_000
    shown = capsys.readouterr().out
    # A line for a prompt: the question, the answer before, the answer after.
    assert "score_by_rule" in shown and re.search(r"(?m)^ *[a-z]+ \|[^|]*\|[^|\n]*$", shown)
    assert len(names["plt"].get_fignums()) == 2


def test_a_round_by_hand_runs(in_folder):
    names = run_notebook("one_round")
    assert len(names["scored"]) == 4 * len(names["prompts"]) == 4 * 4
    pairs = names["pairs"]
    assert pairs and all(one.chosen.reward > one.rejected.reward for one in pairs)
    assert names["trained"].history[0]["loss/train"] == pytest.approx(0.6931, abs=1e-3)
    assert Path("runs/notebook/by_hand/config.json").is_file()


def test_data_reward_and_loss_of_ones_own_run(in_folder, unwatched, capsys):
    names = run_notebook("your_own")
    before, after = names["rounds"]
    assert {"reward_eval", "reward_eval/exact"} <= before.keys() and after["steps_done"] >= 1
    shown = capsys.readouterr().out
    assert "loss.bta" in shown and "own_reward" in shown  # the mistakes of the last cell
    assert not Path("runs/own/mistaken").exists()


def test_a_model_of_ones_own_runs(in_folder, unwatched, toy):
    names = run_notebook("real_model", MODEL=str(toy / "policy"))
    assert [one["round"] for one in names["rounds"]] == [0, 1]
    assert names["rounds"][1]["steps_done"] >= 1 and "reward_eval/brief" in names["rounds"][0]
    assert Path("runs/real/online/final/model.safetensors").is_file()


def test_the_start_on_a_tpu_runs_on_all_devices(in_folder, capsys):
    names = run_notebook("tpu_start")
    assert dict(names["policy"].mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    shown = capsys.readouterr().out
    assert "8 x cpu" in shown and "16 samples, " in shown and "'fsdp'" in shown


@pytest.fixture
def in_colabs(monkeypatch):
    """Run where a notebook runs, with figures that are drawn into memory."""
    matplotlib.use("Agg")
    monkeypatch.chdir(ROOT / "colabs")
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield
    matplotlib.pyplot.close("all")


def test_the_notebook_of_the_study_shows_what_its_results_say(in_colabs):
    notebook = read_notebook(STUDY)
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
