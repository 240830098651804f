import dataclasses
import json
from types import SimpleNamespace

import pytest

from halos_jax.config import BranchConfig, Config, ConfigError, DataConfig, RoundsConfig
from halos_jax.data import datasets
from halos_jax.data.records import formats
from halos_jax.data.selection import select_train
from halos_jax.rounds import order
from halos_jax.storage import WorkdirError
from halos_jax.types import (
    FINISH_STOP,
    Completion,
    Judgement,
    Preference,
    Prompt,
    Sample,
    Turn,
)
from halos_jax.workdir import manifests
from halos_jax.workdir.intact import PROMPTS


@pytest.fixture
def config(tmp_path):
    return Config(seed=3, data=DataConfig(train=str(tmp_path / "t.jsonl")))


def write(config, numbers, text="q"):
    lines = [json.dumps({"prompt_id": f"p{n}", "prompt": f"{text}{n}"}) for n in numbers]
    with open(config.data.train, "w") as stream:
        stream.write("\n".join(lines) + "\n")


def load(config, workdir):
    """Load the order as a run does, and write it down; return the ids and the groups."""
    found = order.load_order(config, workdir)
    workdir.mkdir(exist_ok=True)
    order.save_order(found, workdir)
    return [prompt.prompt_id for prompt in found.prompts], found


def test_a_new_run_has_the_order_of_its_seed(config, tmp_path):
    write(config, range(9))
    ids, found = load(config, tmp_path / "run")
    assert found.prompts == datasets.order_prompts(datasets.load_prompts(config.data.train), 3)
    assert (found.groups, found.at_start, found.growth) == ((9,), 9, {})
    assert order.count_known(tmp_path / "run") == 9 and order.count_known(tmp_path) is None
    assert load(config, tmp_path / "run")[0] == ids
    write(config, reversed(range(9)))  # in a file they may come in any order
    again, found = load(config, tmp_path / "run")
    assert again == ids and not found.is_new


def test_what_is_added_comes_behind_what_was_known(config, tmp_path):
    write(config, range(9))
    first, _ = load(config, tmp_path / "run")
    write(config, range(14))
    second, found = load(config, tmp_path / "run")
    assert second[:9] == first and sorted(second) == sorted(f"p{n}" for n in range(14))
    assert (found.groups, found.at_start) == ((9, 5), 9)
    assert found.growth == {"data.train": ["9 prompts", "14 prompts"]}
    assert second != [one.prompt_id for one in datasets.order_prompts(found.prompts, 3)]
    write(config, range(16))
    third, found = load(config, tmp_path / "run")
    assert third[:14] == second and found.groups == (9, 5, 2)
    again, found = load(config, tmp_path / "run")
    assert again == third and found.groups == (9, 5, 2) and not found.is_new and not found.growth


def test_what_was_known_must_be_there_as_it_was(config, tmp_path):
    write(config, range(9))
    load(config, tmp_path / "run")
    write(config, range(2, 12))
    with pytest.raises(ConfigError, match=r"of the 9 prompts .* 2 are gone \(the first is p[01]\)"):
        order.load_order(config, tmp_path / "run")
    write(config, range(9), text="other ")
    with pytest.raises(ConfigError, match=r"data\.train: .* 9 have another text .* more of them"):
        order.load_order(config, tmp_path / "run")
    (tmp_path / "run" / PROMPTS).write_text("{}")
    with pytest.raises(WorkdirError, match=r"prompts\.json is not as the run wrote it"):
        order.load_order(config, tmp_path / "run")


def test_a_limit_that_grows_keeps_what_was_chosen(config, tmp_path):
    def limit(count):
        return dataclasses.replace(config, data=dataclasses.replace(config.data, max_train=count))

    write(config, range(20))
    first, _ = load(limit(4), tmp_path / "run")
    chosen = select_train(limit(4).data, 3)
    assert sorted(first) == sorted(
        one.prompt_id for one in datasets.load_prompts(config.data.train, chosen)
    )
    write(config, range(30))
    assert load(limit(4), tmp_path / "run")[0] == first
    second, found = load(limit(7), tmp_path / "run")
    assert second[:4] == first and found.groups == (4, 3)
    third, found = load(limit(0), tmp_path / "run")
    assert third[:7] == second and found.groups == (4, 3, 23)


def hold_out(config, count):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, holdout=count))


def test_what_is_held_out_is_not_in_the_order(config, tmp_path):
    write(config, range(20))
    every, _ = load(config, tmp_path / "all")
    watched = hold_out(config, 6)
    ids, found = load(watched, tmp_path / "run")
    held = [prompt.prompt_id for prompt in found.held_out]
    assert len(held) == 6 and ids == [one for one in every if one not in held]
    assert found.groups == (14,) and order.count_known(tmp_path / "run") == 14
    # Another seed orders and limits the others otherwise, and holds out the same.
    other = dataclasses.replace(watched, seed=4)
    data = dataclasses.replace(other.data, max_train=5)
    few = order.start_order(dataclasses.replace(other, data=data))
    assert [prompt.prompt_id for prompt in few.held_out] == held
    assert len(few.prompts) == 5 and not {prompt.prompt_id for prompt in few.prompts} & set(held)
    with pytest.raises(ConfigError, match=r"data\.holdout: got 20, but data\.train has 20"):
        order.start_order(hold_out(config, 20))


def test_data_that_grow_move_nothing_between_training_and_held_out(config, tmp_path, caplog):
    watched, run = hold_out(config, 6), tmp_path / "run"
    write(config, range(20))
    first, before = load(watched, run)
    write(config, range(200))
    second, after = load(watched, run)
    assert after.held_out == before.held_out and second[:14] == first
    assert after.groups == (14, 180) and len(set(second)) == 194
    # A new run of the data would hold out others, which this one trains on.
    anew = order.start_order(watched)
    assert {one.prompt_id for one in anew.held_out} & set(second)
    again, found = load(watched, run)
    assert again == second and not found.is_new and found.held_out == before.held_out
    # What repeats a held-out prompt under another id is not trained on.
    twin = before.held_out[0]
    with open(config.data.train, "a") as stream:
        stream.write(json.dumps({"prompt_id": "twin", "prompt": twin.turns[0].content}) + "\n")
    caplog.clear()
    assert load(watched, run)[0] == second
    assert "1 added prompts repeat one that is held out" in caplog.text


def test_a_held_out_prompt_must_be_there_as_it_was(config, tmp_path):
    watched = hold_out(config, 2)
    write(config, range(9))
    _, found = load(watched, tmp_path / "run")
    gone = int(found.held_out[0].prompt_id[1:])
    write(config, [number for number in range(9) if number != gone])
    with pytest.raises(ConfigError, match=f"1 are gone \\(the first is p{gone}\\)"):
        order.load_order(watched, tmp_path / "run")


def spread(prompts, passes, needed=1000, seed=0):
    rounds = RoundsConfig(passes=passes)
    return order.spread_passes(prompts, Config(seed=seed, rounds=rounds), needed)


FIFTY = [Prompt(f"p{n}", (Turn("user", f"q{n}"),), {"answer": n}) for n in range(50)]


def test_every_pass_has_every_prompt_once_in_an_order_of_its_own():
    first, found = FIFTY, spread(FIFTY, 3)
    assert spread(FIFTY, 1) == first and found[:50] == first and len(found) == 150
    orders = []
    for number in (1, 2, 3):
        one = found[50 * (number - 1) : 50 * number]
        assert {prompt.pass_number for prompt in one} == {number}
        ids = [order.find_source_id(prompt.prompt_id, number) for prompt in one]
        assert sorted(ids) == sorted(prompt.prompt_id for prompt in first)
        assert {prompt.extra["answer"] for prompt in one} == set(range(50))
        orders.append(ids)
    assert len({tuple(ids) for ids in orders}) == 3
    assert len({prompt.prompt_id for prompt in found}) == 150, "ids are unique in the run"
    assert found[50].prompt_id.endswith("#2") and found[149].prompt_id.endswith("#3")
    assert spread(FIFTY, 3) == found and spread(FIFTY, 3, seed=1)[50:] != found[50:]
    assert spread(FIFTY, 9)[:150] == found, "more passes only add to them"


@pytest.mark.parametrize(("needed", "count"), [(1, 50), (50, 50), (51, 100), (149, 150)])
def test_no_more_passes_are_laid_out_than_the_budget_reaches(needed, count):
    assert len(spread(FIFTY, 3, needed)) == count


def test_the_id_of_a_later_pass_must_not_be_that_of_a_prompt():
    prompts = [*FIFTY, dataclasses.replace(FIFTY[0], prompt_id="p7#2")]
    with pytest.raises(ConfigError, match=r"rounds\.passes: got 2, but 'p7#2', the id that prompt"):
        spread(prompts, 2)
    assert len(spread(prompts, 2, needed=51)) == 51


def test_prompts_are_not_added_once_the_second_pass_has_begun(config, tmp_path):
    write(config, range(9))
    load(config, tmp_path / "run")
    write(config, range(12))
    found = order.load_order(config, tmp_path / "run")
    order.refuse_late(found, found.prompts, 9)
    with pytest.raises(ConfigError, match=r"data\.train: 3 prompts were added to the 9"):
        order.refuse_late(found, found.prompts, 10)
    usable = [one for one in found.prompts if one.prompt_id not in ("p0", "p1")]
    with pytest.raises(ConfigError, match="added to the 7 that"):
        order.refuse_late(found, usable, 8)
    order.save_order(found, tmp_path / "run")
    known = order.load_order(config, tmp_path / "run")
    order.refuse_late(known, known.prompts, 30)


def test_the_pass_of_a_prompt_survives_its_file_where_it_is_not_the_first():
    answer = Completion((Turn("assistant", "a"),))
    for one, write in (
        (Preference(FIFTY[4], answer, answer), formats.preference_to_record),
        (Judgement(FIFTY[4], answer, desirable=True), formats.judgement_to_record),
        (Sample(FIFTY[4], 0, "a", (1,), (2,), FINISH_STOP), formats.sample_to_record),
    ):
        assert "prompt_pass" not in write(one)
        later = dataclasses.replace(one, prompt=spread(FIFTY[4:5], 3)[2])
        record = write(later)
        assert (record["prompt_id"], record["prompt_pass"]) == ("p4#3", 3)
        assert formats.feedback_from_record(record) == later


def test_a_branch_leaves_out_what_its_start_was_trained_on(config, tmp_path, monkeypatch, caplog):
    write(config, range(9))
    first, second = tmp_path / "first", tmp_path / "second"
    ids, found = load(config, first)
    order.save_order(dataclasses.replace(found, left_out=[["old", "0"]]), first)
    for round, used in enumerate([ids[1:3], [*ids[3:5], f"{ids[1]}#2"], ids[5:7]], 1):
        folder = manifests.round_folder(first, round)
        folder.mkdir(parents=True)
        records = [{"prompt_id": one, "prompt_pass": 1 + ("#" in one)} for one in used]
        lines = [json.dumps(one) + "\n" for one in records for _ in range(2)]
        (folder / "samples.jsonl").write_text("".join(lines))
    branch = SimpleNamespace(workdir=first, position=SimpleNamespace(round=2))
    monkeypatch.setattr(order, "find_branch", lambda config: branch)
    settings = BranchConfig(workdir=str(first))
    config = dataclasses.replace(config, branch=settings, workdir=str(second))
    assert [name for name, _ in order.read_used(branch)] == ["old", *ids[1:5]]
    left, found = load(config, second)
    assert left == [ids[0], *ids[5:]]
    # A resume does not ask the first run again, and does not take what is left out for new.
    monkeypatch.setattr(order, "find_branch", None)
    write(config, range(10))
    again, _ = load(config, second)
    assert again == [*left, "p9"]
    order.warn_of_trained(found, list(found.prompts))
    assert not caplog.messages
    every = datasets.load_prompts(config.data.train)
    order.warn_of_trained(found, every)
    assert "trained on 4 of the 10 held-out and test prompts" in caplog.text


def test_a_branch_says_what_it_leaves_out_and_must_leave_some(
    config, tmp_path, monkeypatch, caplog
):
    """A run with `rounds.passes` has had every prompt once its second pass begins."""
    caplog.set_level("INFO", order.__name__)
    write(config, range(4))
    ids, _ = load(config, tmp_path / "first")
    folder = manifests.round_folder(tmp_path / "first", 1)
    folder.mkdir(parents=True)
    records = [{"prompt_id": one} for one in ids[:3]]
    (folder / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    branch = SimpleNamespace(workdir=tmp_path / "first", position=SimpleNamespace(round=1))
    monkeypatch.setattr(order, "find_branch", lambda config: branch)
    config = dataclasses.replace(
        config,
        branch=BranchConfig(workdir=str(tmp_path / "first"), round=1),
        rounds=RoundsConfig(passes=3),
        workdir=str(tmp_path / "second"),
    )
    assert [one.prompt_id for one in order.start_order(config).prompts] == ids[3:]
    assert "3 of 4 prompts are left out: the policy was trained on them" in caplog.text
    with (folder / "samples.jsonl").open("a") as stream:
        stream.write(json.dumps({"prompt_id": f"{ids[3]}#2", "prompt_pass": 2}) + "\n")
    with pytest.raises(ConfigError, match=r"branch\.workdir: got .* all 4 prompts .*; add prompts"):
        order.start_order(config)
    data = dataclasses.replace(config.data, max_train=2)
    with pytest.raises(ConfigError, match=r"all 2 prompts .*; raise --config\.data\.max_train"):
        order.start_order(dataclasses.replace(config, data=data))
    (tmp_path / "first" / PROMPTS).unlink()
    assert len(order.start_order(config).prompts) == 4
    assert "prompts.json is missing, so the 4 prompts that the policy was trained on" in caplog.text
