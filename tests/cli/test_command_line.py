"""Forms of other programs on the command line are answered with the form that they have here."""

import pytest

from halos_jax.cli.command_line import find_field, refuse_arguments, take_check
from halos_jax.config import ConfigError

FLAGS = ("config", "help", "verbosity")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--config=configs/x.py"],
        ["--config", "configs/x.py"],
        ["-config", "configs/x.py", "--noverbosity"],
        ["--help"],
    ],
)
def test_flags_that_there_are_pass(arguments):
    refuse_arguments(arguments, FLAGS)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--lr=1e-5"],
         "--lr: unknown flag; fields are set as --config.optimizer.learning_rate=1e-5"),
        (["--lr", "1e-5"], "set as --config.optimizer.learning_rate=1e-5"),
        (["--model.path=x"], "--model.path: unknown flag; fields are set as --config.model.path=x"),
        (["--loss.beta=0.2"], "fields are set as --config.loss.beta=0.2"),
        (["--workdir", "runs/x"], "fields are set as --config.workdir=runs/x"),
        (["--num_train_epochs=3"], "fields are set as --config.train.epochs=3"),
        (["--bf16"], "fields are set as --config.model.compute_dtype=VALUE"),
        (["--confg=x.py"], "--confg: unknown flag; did you mean --config?"),
        (["--zzz=1"], "--zzz: unknown flag; allowed: --config=FILE.py and --config.field=VALUE"),
        (["configs/x.py"], "got arguments ['configs/x.py']; allowed: --config=configs/x.py"),
        (["configs/bench.py:case=all"], "allowed: --config=configs/bench.py:case=all"),
        (["run"], "got arguments ['run'], allowed: --config=FILE.py and --config.field=VALUE"),
        (["++loss.beta=0.2", "loss=kto"],
         "got arguments ['++loss.beta=0.2', 'loss=kto']: HALOs' Hydra syntax; here "
         "--config.loss.beta=0.2 --config.loss.name=kto; configs/README.md, 'From HALOs'"),
        (["++model.load_from=DIR", "++lr=5e-6", "++model.batch_size=32"],
         "here --config.model.path=DIR --config.optimizer.learning_rate=5e-6 "
         "--config.train.batch_size=32"),
        (["++wandb.project=x", "++loss.beta=1"],
         "here --config.trackers.project=x --config.loss.beta=1; configs/README.md"),
        (["++hydra.zzz=x", "++loss.beta=1"],
         "nothing here is called hydra.zzz; configs/README.md"),
        (["train.batch_size=4"], "no dashes; here --config.train.batch_size=4"),
        (["\N{EN DASH}config.seed=1"], "which begin with a long dash"),
        (["--", "x"], "got arguments ['x']"),
    ],
)  # fmt: skip
def test_what_is_no_flag_says_its_form_here(arguments, expected):
    with pytest.raises(ConfigError) as caught:
        refuse_arguments(["--config=configs/x.py", *arguments], FLAGS)
    assert expected in str(caught.value)


def test_absls_own_check_is_ours():
    given = ["main", "--config=x.py", "--only_check_args"]
    assert take_check(given, [("seed", "1")]) == (
        ["main", "--config=x.py"],
        [("seed", "1"), ("mode", "check")],
    )
    assert take_check(given[:2], []) == (given[:2], [])


def test_all_of_a_line_is_said_together():
    with pytest.raises(ConfigError) as caught:
        refuse_arguments(["--lr=1", "x", "--wd=0"], FLAGS)
    first, second, third = str(caught.value).splitlines()
    assert first.startswith("--lr") and second.startswith("--wd") and "['x']" in third


@pytest.mark.parametrize(
    "name, path",
    [
        ("model.max_length", "train.max_length"),
        ("model.use_peft", "lora.rank"),
        ("loss.humanline", "loss.humanline"),
        ("total_prompts", "rounds.total_prompts"),
        ("config.seed", "seed"),
        ("model.from_checkpoint", ""),
        ("nothing", ""),
    ],
)
def test_names_of_halos(name, path):
    assert find_field(name) == path
