import dataclasses
import re
from pathlib import Path

import pytest

from halos_jax.config import Config, DataConfig, ModelConfig, RewardConfig, roles, schema
from halos_jax.config.rewards import PartConfig
from halos_jax.config.roles import find_mark, list_fields, list_places, map_places
from tests.reward_parts import with_parts

PACKAGE = Path(roles.__file__).parent


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("seed", "result"),
        ("train.batch_size", "result"),
        ("train.max_length", "result"),
        ("model.compute_dtype", "result"),
        ("reward.compute_dtype", "result"),
        ("sampling.temperature", "result"),
        ("optimizer.name", "result"),
        ("optimizer.moments_dtype", "result"),
        ("loss.beta", "result"),
        ("reward.arguments.target", "result"),
        ("no.such.field", "result"),
        ("model.remat", "execution"),
        ("mesh.fsdp", "execution"),
        ("sampling.slots", "execution"),
        ("train.tokens_per_device", "execution"),
        ("optimizer.learning_rate", "tuning"),
        ("optimizer.max_grad_norm", "tuning"),
        ("rounds.total_prompts", "growing"),
        ("train.epochs", "growing"),
        ("checkpoint.every", "aside"),
        ("workdir", "aside"),
        ("reward.judge.timeout", "aside"),
        ("reward.parts.kind.judge.timeout", "aside"),
        ("reward.parts.kind.weight", "result"),
    ],
)
def test_the_role_of_a_field(path, role):
    assert find_mark(Config, path).role == role


def test_how_a_run_is_computed_is_one_list():
    assert list_fields(Config, "execution") == [
        "model.attention",
        "model.remat",
        "model.head_remat",
        "model.unroll_layers",
        "model.head_chunk",
        "sampling.slots",
        "sampling.chunk",
        "sampling.shrink",
        "sampling.shard_prompts",
        "train.tokens_per_device",
        "train.row_multiple",
        "mesh.data",
        "mesh.fsdp",
        "mesh.tensor",
        "mesh.distributed",
    ]


def test_what_grows_does_so_in_some_tasks():
    total, most = find_mark(Config, "rounds.total_prompts"), find_mark(Config, "data.max_train")
    assert (total.role_in("online"), total.role_in("sft")) == ("growing", "aside")
    assert (most.role_in("online"), most.role_in("sft")) == ("growing", "result")
    assert most.zero_is_all and not total.zero_is_all


def test_the_dtype_of_an_export_is_the_result_of_one_task():
    dtype = find_mark(Config, "export.dtype")
    assert (dtype.role_in("export"), dtype.role_in("online")) == ("result", "tuning")


def test_places_are_found_wherever_they_stand():
    parts = {"a": {"path": "p", "weight": 2.0, "judge": {"cache": "c"}}, "b": {"kind": "function"}}
    config = Config(
        model=ModelConfig(path="m"),
        data=DataConfig(train="x,y"),
        reward=with_parts(RewardConfig(), parts),
    )
    assert list_places(config) == [
        ("workdir", "runs/default", "path"),
        ("model.path", "m", "model"),
        ("reward.parts.a.path", "p", "model"),
        ("reward.parts.a.judge.cache", "c", "path"),
        ("data.train", "x,y", "source"),
    ]
    changed = map_places(config, lambda path, text, kind: f"{text}!")
    assert (changed.model.path, changed.data.train, changed.data.eval) == ("m!", "x,y!", "")
    a, b = changed.reward.parts["a"], changed.reward.parts["b"]
    assert (a.path, a.weight, a.judge.cache) == ("p!", 2.0, "c!")
    assert b == PartConfig(kind="function")
    assert map_places(config, lambda path, text, kind: text) == config
    assert map_places(Config(), lambda path, text, kind: text) == Config()


def test_every_field_that_names_a_file_or_folder_is_a_place():
    """By the words of its comment: a new one that is forgotten would keep its `~`."""
    found = set()
    for name in ("execution.py", "sections.py", "rewards.py", "settings.py"):
        comment = ""
        for line in (PACKAGE / name).read_text().splitlines():
            field = re.match(r"    (\w+): str = ([^#]*)(#.*)?$", line)
            said = " ".join([comment, (field and field[3]) or ""])
            comment = f"{comment} {line}" if line.strip().startswith("#") else ""
            if field and re.search(r"\b(files?|folder|hub id)\b", said, re.IGNORECASE):
                found.add((name, field[1], field[2].startswith(("place(", "aside(")), said))
    assert len(found) >= 8
    assert [one for one in found if not one[2]] == []


def test_marks_say_nothing_of_defaults():
    leaves = schema.leaf_types(Config)
    for role in ("execution", "aside", "tuning", "growing"):
        assert set(list_fields(Config, role)) <= set(leaves)
    by_name = {field.name: field for field in dataclasses.fields(ModelConfig)}
    assert by_name["path"].default == ""
    assert by_name["remat"].default == "auto"
