import dataclasses

import pytest

from halos_jax import config as config_lib
from halos_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    ExportConfig,
    ModelConfig,
    RewardConfig,
    SamplingConfig,
    freeze,
)
from halos_jax.config.places import expand_homes, find_violations, split_names
from halos_jax.config.rewards import JudgeConfig
from tests.reward_parts import with_parts


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return str(tmp_path)


def test_a_tilde_is_home_wherever_a_path_stands(home):
    judge = JudgeConfig(rubric="~/r.j2", prompt="~/p.j2", cache="~/c.jsonl")
    found = expand_homes(
        Config(
            workdir="~/runs/x",
            model=ModelConfig(path="~/m", tokenizer="~/t", chat_template="~/t.jinja"),
            data=DataConfig(train="~/a.jsonl, b.jsonl,~/c.jsonl", eval="shp@test"),
            reward=with_parts(
                RewardConfig(path="~/r", judge=judge), {"a": {"path": "~/q"}, "b": {}}
            ),
            sampling=SamplingConfig(output="~/s.json"),
            export=ExportConfig(output="~/e"),
        )
    )
    assert found.workdir == f"{home}/runs/x"
    assert (found.model.path, found.model.tokenizer) == (f"{home}/m", f"{home}/t")
    assert found.model.chat_template == f"{home}/t.jinja"
    assert found.data.train == f"{home}/a.jsonl,b.jsonl,{home}/c.jsonl"
    assert found.data.eval == "shp@test"
    assert (found.reward.path, found.reward.parts["a"].path) == (f"{home}/r", f"{home}/q")
    assert found.reward.parts["b"].path == f"{home}/r"
    judge = found.reward.judge
    assert (judge.rubric, judge.prompt) == (f"{home}/r.j2", f"{home}/p.j2")
    assert (judge.cache, found.export.output) == (f"{home}/c.jsonl", f"{home}/e")
    assert found.sampling.output == f"{home}/s.json"


def test_the_config_and_a_pipelines_stages_have_no_tilde(home):
    config = config_lib.default()
    config.task, config.workdir = "pipeline", "~/p"
    config.pipeline.tasks = ("sft", "align")
    config.pipeline.overrides = {
        "sft": {"model": {"path": "~/m"}, "data": {"train": "~/t.jsonl"}},
        "align": {"model": {"path": "{workdir}/sft/final"}, "data": {"train": "x.jsonl"}},
    }
    frozen = freeze(config)
    assert frozen.workdir == f"{home}/p"
    sft, align = config_lib.expand_pipeline(frozen)
    assert (sft.workdir, sft.model.path) == (f"{home}/p/sft", f"{home}/m")
    assert sft.data.train == f"{home}/t.jsonl"
    assert align.model.path == f"{home}/p/sft/final"


def test_a_comma_in_the_name_of_a_file_splits_nothing(tmp_path):
    path = tmp_path / "a,b.jsonl"
    path.touch()
    assert split_names(str(path), "source") == [str(path)]
    assert split_names("x, y@train,", "source") == ["x", "y@train"]
    assert split_names("x,y", "path") == ["x,y"]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"workdir": "gs://bucket/run"},
            "workdir: got 'gs://bucket/run', but gs:// is not supported here; allowed: a path of "
            "this machine's file system; mount it (gcsfuse, s3fs, ...) or copy it, and give the "
            "folder of this machine",
        ),
        ({"workdir": "s3:/bucket/run"}, "workdir: got 's3:/bucket/run', but s3:// is not"),
        ({"workdir": "file:///data/run"}, "write --config.workdir=/data/run"),
        ({"workdir": "myfs://data"}, "but myfs:// is not supported here"),
        (
            {"model": ModelConfig(path="hf://org/name")},
            "model.path: got 'hf://org/name', but hf:// is not supported here; allowed: a path of "
            "this machine's file system or the id of a model; what lies on the Hugging Face hub is "
            "named by its id, 'owner/name'",
        ),
        ({"model": ModelConfig(path="https://huggingface.co/org/name")}, "'owner/name'"),
        ({"model": ModelConfig(tokenizer="s3://b/t")}, "model.tokenizer: got 's3://b/t'"),
        (
            {"data": DataConfig(train="a.jsonl,gs://b/x.jsonl")},
            "data.train: got 'gs://b/x.jsonl', but gs:// is not supported",
        ),
        ({"data": DataConfig(eval="hf://datasets/o/n")}, "'owner/name@split'"),
        ({"sampling": SamplingConfig(output="gs://b/o.json")}, "sampling.output: got"),
        ({"export": ExportConfig(output="s3://b/o")}, "export.output: got"),
        (
            {"reward": with_parts(RewardConfig(), {"a": {"judge": {"cache": "gs://b/c"}}})},
            "reward.parts.a.judge.cache: got 'gs://b/c'",
        ),
    ],
)
def test_other_file_systems_are_refused_by_name(fields, expected):
    (line,) = find_violations(dataclasses.replace(Config(), **fields))
    assert expected in line
    plain = config_lib.to_dict(dataclasses.replace(Config(), **fields))
    with pytest.raises(ConfigError, match="is not supported here"):
        freeze(plain)


def test_the_home_of_nobody_is_no_folder_here(home):
    config = expand_homes(Config(workdir="~no_such_user/run"))
    (line,) = find_violations(config)
    assert line == (
        "workdir: got '~no_such_user/run', but there is no user 'no_such_user' whose home that "
        "could be; allowed: a path; for a folder of that name write './~no_such_user/run'"
    )
    assert list(find_violations(Config(data=DataConfig(train="~backup.jsonl")))) == []


def test_names_with_colons_are_paths():
    config = Config(
        workdir="runs/12:30/a", data=DataConfig(train="org/name:config@train,C:/data/x.jsonl")
    )
    assert list(find_violations(config)) == []
