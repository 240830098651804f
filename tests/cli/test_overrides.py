from ml_collections import ConfigDict

from halos_jax import config as config_lib
from halos_jax.cli import overrides
from halos_jax.config import freeze


def sft_config() -> ConfigDict:
    config = config_lib.default()
    config.task = "sft"
    config.model.path = "model"
    config.data.train = "train.jsonl"
    return config


def test_the_presets_own_path_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/u")
    given = ["main.py", "--config=~/x.py:arg", "--other=~/y"]
    assert overrides.split_overrides(given)[0] == [
        "main.py",
        "--config=/home/u/x.py:arg",
        "--other=~/y",
    ]


def test_split_overrides_takes_both_forms_and_leaves_the_rest():
    rest, found = overrides.split_overrides(
        [
            "main.py",
            "--config=configs/x.py",
            "--config.train.batch_size=8",
            "--config.workdir",
            "runs/a=b",
            "-config.mesh.data",
            "-1",
            "--config.data.eval=",
            "--config.progress",
            "--verbosity=1",
        ]
    )
    assert rest == ["main.py", "--config=configs/x.py", "--verbosity=1"]
    assert found == [
        ("train.batch_size", "8"),
        ("workdir", "runs/a=b"),
        ("mesh.data", "-1"),
        ("data.eval", ""),
        ("progress", None),
    ]


def test_apply_overrides_parses_by_the_schema():
    config = sft_config()
    errors = overrides.apply_overrides(
        config,
        [
            ("train.batch_size", "8"),
            ("optimizer.learning_rate", "1"),
            ("progress", "false"),
            ("sampling.stop", "('a','b')"),
            ("model.path", "123"),
            ("loss.name", "sft"),
            ("loss.beta", "1e-1"),
            ("pipeline.overrides.sft.train.epochs", "2"),
            ("checkpoint.keep", 3),  # a value that is no text, as a program gives it
        ],
    )
    frozen = freeze(config, errors=errors)
    assert frozen.train.batch_size == 8
    assert frozen.optimizer.learning_rate == 1.0
    assert frozen.progress is False
    assert frozen.sampling.stop == ("a", "b")
    assert frozen.model.path == "123"
    assert dict(frozen.loss) == {"name": "sft", "beta": 0.1}
    assert frozen.checkpoint.keep == 3


def test_apply_overrides_reports_every_error():
    config = sft_config()
    before = config.to_dict()
    lines = overrides.apply_overrides(
        config,
        [
            ("train.batch_size", "8.5"),
            ("train.batchsize", "8"),
            ("train", "8"),
            ("progress", None),
            ("checkpoint.keep", "x"),
            ("checkpoint.every", 1.5),
        ],
    )
    assert [line.partition(":")[0] for line in lines] == [
        "train.batch_size",
        "train.batchsize",
        "train",
        "progress",
        "checkpoint.keep",
        "checkpoint.every",
    ]
    assert "did you mean 'train.batch_size'?" in lines[1]
    assert "--config.progress=VALUE" in lines[3]
    assert config.to_dict() == before
