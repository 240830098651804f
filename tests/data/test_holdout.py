"""A part of data.train that stays out of training, whoever asks and however the file lies."""

import json
import random

import pytest

from halos_jax.config import ConfigError, DataConfig
from halos_jax.data import datasets, holdout
from halos_jax.data.selection import select_eval, select_train
from halos_jax.types import Prompt, Turn


def ask(number: int) -> Prompt:
    return Prompt(f"id{number}", (Turn("user", f"q{number}"),))


def show(prompts) -> list[int]:
    return [int(one.turns[0].content[1:]) for one in prompts]


@pytest.fixture
def save(tmp_path):
    def write(records, name="train.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return str(path)

    return write


def test_the_part_depends_on_the_conversations_alone():
    prompts = [ask(number) for number in range(50)]
    rest, held = holdout.split_prompts(prompts, 12)
    assert len(held) == 12 and sorted([*show(rest), *show(held)]) == list(range(50))
    shuffled = random.Random(1).sample(prompts, 50)
    again = holdout.split_prompts(shuffled, 12)
    assert sorted(show(again[1])) == show(held)
    assert show(again[0]) == [n for n in show(shuffled) if n not in show(held)]  # in their order
    # Neither ids nor other fields count; a larger part holds a smaller one.
    renamed = [Prompt(f"x{n}", one.turns, {"answer": n}) for n, one in enumerate(prompts)]
    assert show(holdout.split_prompts(renamed, 12)[1]) == show(held)
    assert set(show(held)) < set(show(holdout.split_prompts(prompts, 13)[1]))


def test_of_a_file_that_has_grown_only_a_share_is_others():
    few, many = [ask(n) for n in range(300)], [ask(n) for n in range(400)]
    before = set(show(holdout.split_prompts(few, 100)[1]))
    after = set(show(holdout.split_prompts(many, 100)[1]))
    # Every one that is gone has made room for one of the new prompts: a quarter, in the mean.
    assert after - before == {n for n in after if n >= 300}
    assert 15 <= len(after - before) <= 35


def test_prompts_with_one_conversation_go_together():
    twins = [*map(ask, range(9)), *(Prompt(f"twin{n}", ask(n).turns) for n in range(9))]
    rest, held = holdout.split_prompts(twins, 4)
    assert len(held) == 8 and not set(show(held)) & set(show(rest))


@pytest.mark.parametrize("count", [3, 4])
def test_something_must_be_left_to_train_on(count):
    with pytest.raises(ConfigError, match=f"data.holdout: got {count}, but data.train has 3 dist"):
        holdout.split_prompts([ask(0), ask(1), ask(2)], count)


KINDS = {
    "prompts": (datasets.load_prompts, lambda n, k: {"prompt": f"q{n}"}),
    "demonstrations": (
        datasets.load_demonstrations,
        lambda n, k: {"prompt": f"q{n}", "completion": f"a{k}"},
    ),
    "best of pairs": (
        datasets.load_demonstrations,
        lambda n, k: {
            "type": "pairwise_feedback",
            "prompt_id": str(n),
            "prompt": [{"role": "user", "content": f"q{n}"}],
            "output_A": [{"role": "assistant", "content": f"a{k}"}],
            "output_B": [{"role": "assistant", "content": "b"}],
            "label": 1,
        },
    ),
    "preferences": (
        datasets.load_preferences,
        lambda n, k: {"prompt": f"q{n}", "chosen": f"a{k}", "rejected": "b"},
    ),
    "judgements": (
        datasets.load_judgements,
        lambda n, k: {"prompt": f"q{n}", "completion": f"a{k}", "label": k == 0},
    ),
    "scored": (
        datasets.load_scored,
        lambda n, k: {
            "prompt_id": str(n),
            "prompt": f"q{n}",
            "sample_id": k,
            "output": f"a{k}",
            "reward": float(k),
        },
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_records_of_a_prompt_are_on_one_side_whatever_they_are(kind, save):
    load, record = KINDS[kind]
    path = save([record(n, k) for k in range(3) for n in range(20)])
    expected = set(show(holdout.split_prompts([ask(n) for n in range(20)], 6)[1]))
    data = DataConfig(train=path, holdout=6)
    sides = {}
    for name, selection in (("rest", select_train(data, 5)), ("held", select_eval(data))):
        found = load(path, selection)
        sides[name] = [(one if kind == "prompts" else one.prompt) for one in found]
    assert set(show(sides["held"])) == expected
    assert set(show(sides["rest"])) == set(range(20)) - expected
    every = load(path)
    assert len(sides["held"]) + len(sides["rest"]) == len(every)


def test_a_limit_takes_of_what_is_left_and_collapsed_spaces_make_one_prompt(save):
    path = save([{"prompt": f"q{n}", "completion": "a"} for n in range(30)])
    held = set(show(holdout.split_prompts([ask(n) for n in range(30)], 10)[1]))
    for seed in (0, 1):
        chosen = select_train(DataConfig(holdout=10, max_train=15), seed)
        found = show(one.prompt for one in datasets.load_demonstrations(path, chosen))
        assert len(found) == 15 and not held & set(found)
    spaced = [{"prompt": f"q {n}", "completion": "a"} for n in range(9)]
    spaced += [{"prompt": f"q  {n}", "completion": "a"} for n in range(9)]
    data = DataConfig(holdout=4, collapse_whitespace=True)
    found = datasets.load_demonstrations(save(spaced), select_eval(data))
    assert len(found) == 8 and len({one.prompt.turns for one in found}) == 4


def test_plain_texts_are_held_out_one_by_one(save):
    texts = [{"text": f"text {n // 2}"} for n in range(40)]  # each of them twice
    path = save([*texts, {"prompt": "q", "completion": "a"}])
    data = DataConfig(train=path, holdout=5)
    found = datasets.load_demonstrations(path, select_eval(data))
    rest = datasets.load_demonstrations(path, select_train(data, 0))
    held, trained = ({one.completion.turns for one in side} for side in (found, rest))
    assert len(held) == 5 and not held & trained and len(held | trained) == 21
    assert len(found) + len(rest) == 41


def test_bad_records_and_unread_fields_are_spoken_of_once(save, caplog):
    caplog.set_level("INFO")
    path = save([{"prompt": f"q{n}", "completion": "a", "meta": n} for n in range(9)])
    data = DataConfig(train=path, holdout=3)
    datasets.load_demonstrations(path, select_train(data, 0))
    assert caplog.text.count("meta") == 1
    assert "the 3 records of 3 prompts are held out (data.holdout)" in caplog.text
    datasets.load_demonstrations(path, select_eval(data))
    assert caplog.text.count("held out") == 1
    assert caplog.text.count("meta") == 1
