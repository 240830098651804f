"""What a run reads, task by task, and what of it may not change while it goes on."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from halos_jax import storage
from halos_jax.config import Config, ConfigError, DataConfig, LoraConfig, ModelConfig
from halos_jax.config.rewards import JudgeConfig, RewardConfig, ScorerConfig
from halos_jax.config.sections import EvalConfig, SamplingConfig
from halos_jax.tasks import inputs
from halos_jax.workdir.ledger import open_ledger, read_ledger
from tests.reward_parts import with_parts

MODEL = {
    "config.json": "{}",
    "model.safetensors": "weights",
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "README.md": "hello",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder with models, data, a template, a prompt of a judge and a reward function."""
    for name in ("policy", "reward", "adapter"):
        (tmp_path / name).mkdir()
        for file, text in MODEL.items():
            (tmp_path / name / file).write_text(text)
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    for name in ("own.jinja", "rubric.jinja"):
        (tmp_path / name).write_text("{{ text }}")
    (tmp_path / "my_rewards.py").write_text("def score(prompt, response):\n    return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def make_config(folder, task="online", **changes) -> Config:
    config = Config(
        task=task,
        workdir=str(folder / "run"),
        model=ModelConfig(path=str(folder / "policy"), chat_template=str(folder / "own.jinja")),
        lora=LoraConfig(path=str(folder / "adapter")),
        data=DataConfig(train=str(folder / "train.jsonl"), eval=str(folder / "eval.jsonl")),
        reward=RewardConfig(path=str(folder / "reward"), function="my_rewards:score"),
        eval=EvalConfig(on="feedback", reference=str(folder / "policy")),
    )
    return dataclasses.replace(config, **changes)


def start(config, *, is_begun=True, **options):
    """Start a run in the folder's workdir; return what has grown."""
    Path(config.workdir).mkdir(exist_ok=True)
    return inputs.check_inputs(open_ledger(config.workdir), config, is_begun=is_begun, **options)


def recorded(folder):
    return json.loads((folder / "run" / "inputs.json").read_text())


def test_an_untouched_run_has_nothing_to_say_and_writes_nothing(folder, caplog):
    config = make_config(folder)
    assert start(config, is_begun=False) == []
    found = recorded(folder)
    names = [name for name in MODEL if name != "README.md"]
    assert [entry["name"] for entry in found["model.path"]] == sorted(names)
    assert set(found) == {
        "model.path",
        "model.chat_template",
        "lora.path",
        "reward.path",
        "data.train",
        "data.eval",
    }
    before = (folder / "run" / "ledger.jsonl").read_bytes()
    (folder / "policy" / "README.md").write_text("changed")
    (folder / "policy" / "config.json").touch()
    assert start(config) == [] and not caplog.records
    assert (folder / "run" / "ledger.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("field", "file"),
    [
        ("model.path", "policy/model.safetensors"),
        ("model.path", "policy/tokenizer_config.json"),
        ("model.chat_template", "own.jinja"),
        ("lora.path", "adapter/model.safetensors"),
        ("reward.path", "reward/model.safetensors"),
        ("reward.path", "reward/config.json"),
        ("data.train", "train.jsonl"),
        ("data.eval", "eval.jsonl"),
    ],
)
def test_a_change_is_refused_by_field_and_file(folder, field, file):
    config = make_config(folder)
    start(config, is_begun=False)
    before = (folder / file).read_text()
    for text, said in (("{ }", "holds something else"), (before + "\n", "has grown")):
        (folder / file).write_text(text)
        with pytest.raises(ConfigError, match=rf"- {field}: .*{file} {said}.*\n.*put the files"):
            start(config)
    (folder / file).unlink()
    with pytest.raises(ConfigError, match=rf"{field}: .*{file} is missing"):
        start(config)
    (folder / file).write_text(before)
    start(config)


def test_all_changes_are_listed_together(folder):
    config = make_config(folder)
    start(config, is_begun=False)
    (folder / "train.jsonl").write_text("{}\n")
    (folder / "policy" / "model.safetensors").unlink()
    (folder / "reward" / "added_tokens.json").write_text("{}")
    with pytest.raises(ConfigError, match="have changed since it was started:\n") as error:
        start(config)
    assert len(str(error.value).splitlines()) == 5
    assert "reward/added_tokens.json was not there" in str(error.value)


def test_a_run_that_has_left_nothing_takes_what_there_is(folder):
    config = make_config(folder)
    start(config, is_begun=False)
    (folder / "train.jsonl").write_text('{"prompt": "mended"}\n')
    start(config, is_begun=False)
    assert recorded(folder)["data.train"][0]["size"] == len('{"prompt": "mended"}\n')
    start(config)


def test_what_may_grow_is_returned_and_recorded(folder):
    config = make_config(folder)
    start(config, is_begun=False)
    (folder / "train.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n')
    for _ in range(2):  # a start may be killed before the growth is noted
        (grown,) = start(config, may_grow=("data.train",))
        assert (grown.field, grown.verdict) == ("data.train", "grown")
    inputs.record_growth(open_ledger(config.workdir), config, [grown])
    assert start(config) == []
    (folder / "train.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(ConfigError, match=r"data\.train: .*something else"):
        start(config, may_grow=("data.train",))


@pytest.mark.parametrize(
    "edit",
    [
        lambda lines: ["{}", *lines],
        lambda lines: [lines[0], "{}", *lines[1:]],
        lambda lines: [lines[0] + " ", *lines[1:]],
    ],
    ids=["at the start", "between", "in a line"],
)
def test_records_added_elsewhere_than_at_the_end_are_refused_with_a_way_on(folder, edit):
    config, file = make_config(folder), folder / "train.jsonl"
    start(config, is_begun=False)
    lines = file.read_text().splitlines()
    file.write_text("\n".join(edit(lines)) + "\n")
    with pytest.raises(ConfigError) as error:
        start(config, may_grow=("data.train",))
    assert (
        f"data.train: {file} holds something else than it did, and more, not only at its end"
        in str(error.value)
    )
    assert "to the end of their file or into a file of their own" in str(error.value)
    with pytest.raises(ConfigError) as error:  # a task whose data may not grow
        start(config)
    assert "not only at its end" in str(error.value)
    assert "file of their own" not in str(error.value)
    file.write_text("\n".join(lines) + "\n")
    (folder / "more.jsonl").write_text("{}\n")  # the way on
    plain = {"task": "online", "workdir": "run", "data": {"train": str(file)}}
    (folder / "run" / "config.json").write_text(json.dumps(plain))
    both = DataConfig(train=f"{file},{folder / 'more.jsonl'}", eval=config.data.eval)
    more = make_config(folder, data=both)
    with pytest.raises(ConfigError, match=r"more\.jsonl was not there"):
        start(more)  # of a task whose data may not grow
    (grown,) = start(more, may_grow=("data.train",))
    assert (grown.path, grown.verdict) == (folder / "more.jsonl", "new")


def test_sources_of_several_files_and_folders(folder):
    (folder / "many").mkdir()
    for name in ("x.jsonl", "y.jsonl"):
        (folder / "many" / name).write_text("{}\n")
    train = f"{folder / 'train.jsonl'}, {folder / 'many'}@train,{folder}/ev*.jsonl,name@split"
    config = make_config(folder, "sft", data=DataConfig(train=train))
    start(config, is_begun=False)
    names = [entry["name"] for entry in recorded(folder)["data.train"]]
    assert names == ["0:", "1:x.jsonl", "1:y.jsonl", "2:eval.jsonl"]
    (folder / "many" / "z.jsonl").write_text("{}\n")
    (folder / "eval.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError) as error:
        start(config)
    assert "many/z.jsonl was not there" in str(error.value)
    assert "eval.jsonl holds something else" in str(error.value)


@pytest.fixture
def hub(folder, monkeypatch):
    """Return a function that puts rows at "org/set@train", of a new revision each time."""
    import datasets

    revisions = []

    def put(*rows):
        path = folder / f"cache-{len(revisions)}" / "set-train.arrow"
        path.parent.mkdir()
        path.write_text("\n".join(rows))
        revisions.append(SimpleNamespace(cache_files=[{"filename": str(path)}]))

    monkeypatch.setattr(datasets, "load_dataset", lambda **arguments: revisions[-1])
    return put


def test_a_data_set_of_the_hub_may_not_change_but_in_its_revision(folder, hub):
    config = make_config(
        folder, "sft", data=DataConfig(train=f"{folder}/train.jsonl,org/set@train")
    )
    hub("a", "b")
    start(config, is_begun=False)
    names = [entry["name"] for entry in recorded(folder)["data.train"]]
    assert names == ["0:", "1:set-train.arrow"]
    hub("a", "b")  # another revision of the same records: a new README, say
    assert start(config) == []
    hub("a", "c")
    with pytest.raises(ConfigError, match=r"data\.train: .*set-train\.arrow holds something else"):
        start(config)


def test_a_run_that_knows_no_data_set_of_the_hub_records_it_from_here_on(folder, hub):
    hub("a")
    config = make_config(
        folder, "sft", data=DataConfig(train=f"{folder}/train.jsonl,org/set@train")
    )
    start(config, is_begun=False)
    known, path = recorded(folder), folder / "run" / "inputs.json"
    known["data.train"].pop()
    ledger = open_ledger(folder / "run")
    storage.write_json_atomic(path, known, note=ledger.note_file)
    assert start(config) == []
    hub("b")
    with pytest.raises(ConfigError, match="holds something else"):
        start(config)


def test_what_no_reader_takes_may_be_added(folder):
    (folder / "many").mkdir()
    (folder / "many" / "x.jsonl").write_text("{}\n")
    config = make_config(folder, data=DataConfig(train=str(folder / "many")))
    start(config, is_begun=False)
    for name in ("policy/notes.txt", "policy/eval_results.json", "many/README.md", "many/.x.json"):
        (folder / name).write_text("mine")
    assert start(config) == []


def test_what_an_older_version_has_recorded_and_nobody_reads_is_not_missed(folder):
    (folder / "many").mkdir()
    for name in ("many/x.jsonl", "many/y.txt", "z.txt"):
        (folder / name).write_text("{}\n")
    train = f"{folder / 'many'},{folder}/z.*"
    config = make_config(folder, data=DataConfig(train=train))
    start(config, is_begun=False)
    known = recorded(folder)
    known["model.path"].append({"name": "notes.txt", "path": "notes.txt", "size": 1})
    known["data.train"].append({"name": "0:y.txt", "path": "many/y.txt", "size": 1})
    ledger, path = open_ledger(folder / "run"), folder / "run" / "inputs.json"
    storage.write_json_atomic(path, known, note=ledger.note_file)
    assert start(config) == []
    (folder / "z.txt").unlink()  # a pattern takes what it says
    with pytest.raises(ConfigError, match=r"data\.train: .*z\.txt is missing"):
        start(config)


def test_a_workdir_among_the_data_is_left_out_or_refused(folder):
    """A split takes the files of its name; a folder without one would take the run's own too."""
    (folder / "many").mkdir()
    (folder / "many" / "train.jsonl").write_text("{}\n")
    config = make_config(folder, workdir=str(folder / "many" / "run"))
    split = dataclasses.replace(config, data=DataConfig(train=f"{folder / 'many'}@train"))
    start(split, is_begun=False)
    (folder / "many" / "run" / "metrics.jsonl").write_text("{}\n")
    assert start(split) == []
    found = inputs.list_inputs(split)["data.train"]
    assert found == [("0:train.jsonl", folder / "many" / "train.jsonl")]
    named = dataclasses.replace(split, workdir=str(folder / "many" / "train-run"))
    whole = dataclasses.replace(config, data=DataConfig(train=str(folder / "many")))
    for refused in (whole, named):
        Path(refused.workdir).mkdir(exist_ok=True)
        (Path(refused.workdir) / "config.json").write_text("{}")
        with pytest.raises(ConfigError, match=r"workdir: got .*lies in data\.train=.*own files"):
            start(refused, is_begun=False)


def test_the_users_code_may_change_and_that_is_said_once(folder, caplog):
    reward = RewardConfig(kind="function", function="my_rewards:score", rules=("my_rewards:other",))
    start(config := make_config(folder, reward=reward), is_begun=False)
    for more, said in (("", "holds something else than it did when"), ("#\n", "has grown since")):
        (folder / "my_rewards.py").write_text(f"def score(prompt, answer):\n    return 2\n{more}")
        start(config)
        start(config)
        fields = [line.partition(": ")[0] for line in caplog.messages]
        assert fields == ["reward.function", "reward.rules"], "once"
        assert f"my_rewards.py {said} the run was started" in caplog.text
        caplog.clear()


def test_a_judges_templates_are_read_where_a_judge_is_asked(folder):
    judge = JudgeConfig(rubric=str(folder / "rubric.jinja"))
    parts = {"one": {"kind": "judge", "judge": {"rubric": str(folder / "rubric.jinja")}}}
    for reward, field in (
        (RewardConfig(kind="judge", judge=judge), "reward.judge.rubric"),
        (with_parts(RewardConfig(), parts), "reward.parts.one.judge.rubric"),
    ):
        found = inputs.list_inputs(make_config(folder, reward=reward))
        assert found[field] == [("", folder / "rubric.jinja")]
    found = inputs.list_inputs(make_config(folder, reward=RewardConfig(judge=judge)))
    assert "reward.judge.rubric" not in found


@pytest.mark.parametrize(
    ("task", "changes", "fields"),
    [
        ("sft", {}, {"model.path", "lora.path", "data.train", "data.eval"}),
        ("align", {}, {"model.path", "lora.path", "data.train", "data.eval"}),
        ("sample", {}, {"model.path", "data.train"}),
        (
            "sample",
            {"sampling": SamplingConfig(best_of=True)},
            {"model.path", "data.train", "reward.path"},
        ),
        ("label", {}, {"model.path", "data.train", "reward.path"}),
        ("eval", {}, {"model.path", "data.eval", "eval.reference"}),
        (
            "eval",
            {"eval": EvalConfig(on="samples")},
            {"model.path", "data.eval", "reward.path"},
        ),
        (
            "eval",
            {"eval": EvalConfig(scorers={"gold": ScorerConfig(path="reward")})},
            {"model.path", "data.eval", "reward.path", "eval.scorers.gold.path"},
        ),
        ("export", {}, {"model.path"}),
    ],
)
def test_each_task_looks_at_what_it_reads(folder, task, changes, fields):
    found = inputs.list_inputs(make_config(folder, task, **changes))
    assert found.keys() == fields | {"model.chat_template"}
    weights = ("model.safetensors", folder / "policy" / "model.safetensors")
    assert (weights in found["model.path"]) == (task != "label")


def test_a_checkpoint_stands_for_its_policy(folder):
    config, record = make_config(folder, "export"), folder / "metadata"
    record.write_text("{}")
    start(config, is_begun=False, policy=record)
    (folder / "policy" / "model.safetensors").write_text("another")
    start(config, policy=record)
    record.write_text('{"other": 1}')
    with pytest.raises(ConfigError, match=r"model\.path: .*metadata holds something else"):
        start(config, policy=record)


def test_a_run_as_a_model_is_what_it_has_exported(folder):
    (folder / "config.json").write_text(json.dumps({"task": "sft", "workdir": "x"}))
    config = make_config(folder, reward=RewardConfig(path=str(folder)))
    assert inputs.list_inputs(config)["reward.path"] == []
    (folder / "reward").rename(folder / "final")
    assert ("model.safetensors", folder / "final" / "model.safetensors") in inputs.list_inputs(
        config
    )["reward.path"]


def test_other_processes_leave_it_to_the_first(folder):
    config = make_config(folder)
    (folder / "run").mkdir()
    assert inputs.check_inputs(read_ledger(folder / "run"), config, is_begun=True) == []
    assert not (folder / "run" / "inputs.json").exists()


def test_an_online_run_looks_at_its_test_and_at_what_scores_it(folder):
    judge = JudgeConfig(rubric=str(folder / "rubric.jinja"))
    own = ScorerConfig(kind="function", function="my_rewards:other")
    scorers = {"own": own, "asked": ScorerConfig(kind="judge", path="unread", judge=judge)}
    data = DataConfig(train=str(folder / "train.jsonl"), test=str(folder / "eval.jsonl"))
    config = make_config(folder, data=data, eval=EvalConfig(scorers=scorers))
    found = inputs.list_inputs(config)
    assert found["data.test"] == [("0:", folder / "eval.jsonl")]
    assert found["eval.scorers.asked.judge.rubric"] == [("", folder / "rubric.jinja")]
    assert "eval.scorers.asked.path" not in found
    start(config, is_begun=False)
    assert [one["name"] for one in recorded(folder)["eval.scorers.own.function"]] == ["my_rewards"]
    unused = inputs.list_inputs(dataclasses.replace(config, task="label"))
    assert not [field for field in unused if field.startswith("eval.")]
