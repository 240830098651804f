"""The prompts of a run: in its order, shown by the template, none of them in both files."""

import dataclasses
import json
from pathlib import Path

import pytest

from halos_jax.config import Config, ConfigError, DataConfig, RoundsConfig
from halos_jax.data.datasets import load_prompts as read
from halos_jax.data.datasets import order_prompts
from halos_jax.data.records.fields import RecordError
from halos_jax.rounds.order import load_order
from halos_jax.rounds.prompts import load_prompts


class Strict:
    template = ""

    def show(self, turns):
        if turns[-1].content == "bad":
            raise RecordError("the chat template refuses it")


def load(config, needed):
    workdir = Path(config.data.train).with_name("run")  # of a run that is new
    return load_prompts(config, Strict(), needed, load_order(config, workdir))


@pytest.fixture
def config(tmp_path):
    def write(name, texts):
        path = tmp_path / name
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        return str(path)

    texts = [f"q{number}" for number in range(6)]
    return Config(data=DataConfig(train=write("t", texts), eval=write("e", ["x", "y"])))


def test_prompts_come_in_the_order_of_the_run(config):
    prompts, held_out, test = load(config, 6)
    assert test == []
    assert prompts == order_prompts(read(config.data.train), config.seed)
    assert [one.turns[0].content for one in held_out] == ["x", "y"]
    data = dataclasses.replace(config.data, eval="")
    assert load(dataclasses.replace(config, data=data), 6) == (prompts, [], [])


def test_a_run_that_goes_beyond_a_pass_samples_from_all_of_its_prompts(config):
    loaded = load(config, 6)

    def count(start, stop, passes):
        one = dataclasses.replace(config, rounds=RoundsConfig(passes=passes))
        return [len(part) for part in loaded.cut(start, stop, one)]

    assert count(2, 5, 1) == count(2, 5, 3) == [3, 2, 0]
    assert count(2, 9, 1) == [4, 2, 0] and count(2, 9, 3) == [6, 2, 0]


def test_a_prompt_in_both_files_is_an_error(config):
    data = dataclasses.replace(config.data, eval=config.data.train)
    with pytest.raises(ConfigError, match=r"data\.eval: 6 of its prompts are in data\.train too"):
        load(dataclasses.replace(config, data=data), 6)


@pytest.mark.parametrize("name", ["train", "eval"])
def test_refused_prompts_are_named_or_left_out(config, name):
    path = getattr(config.data, name)
    with open(path, "a") as stream:
        stream.write('{"prompt": "bad"}\n')
    with pytest.raises(RecordError, match=f"^{path} line [37]: the chat template refuses it"):
        load(config, 7)
    data = dataclasses.replace(config.data, skip_bad=True)
    found = load(dataclasses.replace(config, data=data), 7)
    assert [len(one) for one in found] == [6, 2, 0]


def change(config, **fields):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **fields))


def test_held_out_prompts_may_be_of_the_training_data(config):
    found = load(change(config, eval="", holdout=2), 4)
    assert [len(one) for one in found] == [4, 2, 0]
    assert found.held_out == load_order(change(config, eval="", holdout=2), Path("absent")).held_out
    assert sorted([*found.train, *found.held_out], key=lambda one: one.prompt_id) == sorted(
        read(config.data.train), key=lambda one: one.prompt_id
    )


def test_the_test_is_a_source_of_its_own(config, tmp_path):
    path = tmp_path / "s"
    rows = [{"prompt": f"z{n}", "split": "ab"[n % 2]} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load(change(config, test=str(path), test_split="b", max_test=3), 6)
    texts = [one.turns[0].content for one in found.test]
    assert len(texts) == 3 and set(texts) <= {"z1", "z3", "z5", "z7"}
    assert [len(one) for one in found] == [6, 2, 3]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"test": "train"}, r"data\.test: 6 of its prompts are in data\.train too"),
        ({"test": "eval"}, r"data\.test: 2 of its prompts are in data\.eval too"),
        (
            {"test": "train", "eval": "", "holdout": 5},
            r"data\.test: 1 of its prompts are in",
        ),
    ],
)
def test_a_test_prompt_that_is_trained_on_or_watched_is_an_error(config, fields, message):
    fields = fields | {"test": getattr(config.data, fields["test"])}
    with pytest.raises(ConfigError, match=message):
        load(change(config, **fields), 6)
