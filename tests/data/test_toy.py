import collections
import json
import random

import pytest
from transformers import AutoTokenizer

from halos_jax.config import Config, ToyConfig
from halos_jax.data import toy
from halos_jax.data.chat.loading import load_tokenizer
from halos_jax.data.chat.renderer import make_renderer
from halos_jax.data.datasets import load_demonstrations, load_preferences, load_prompts
from halos_jax.types import Turn

SMALL = ToyConfig(num_sft=2000, num_pairs=600, num_prompts=200, num_eval=50, mistakes=0.4)
SPLITS = ("sft", "pairs", "prompts", "eval")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    toy.make_toy_data(folder, SMALL, 3)
    return folder


def read(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def question(record):
    (turn,) = record["prompt"]
    assert turn["role"] == "user"
    return turn["content"]


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_same_seed_gives_the_same_bytes_even_over_an_interrupted_run(folder, tmp_path):
    (tmp_path / "base.partial").mkdir()
    (tmp_path / "base.partial" / "half").write_text("{")
    (tmp_path / "sft.jsonl").write_text("{")
    toy.make_toy_data(tmp_path, SMALL, 3)
    assert contents(tmp_path) == contents(folder)
    toy.make_toy_data(tmp_path, SMALL, 4)
    other = contents(tmp_path)
    assert all(other[f"{name}.jsonl"] != contents(folder)[f"{name}.jsonl"] for name in SPLITS)


def test_the_task_writes_into_its_workdir(folder, tmp_path):
    config = Config(task="toy_data", workdir=str(tmp_path / "toy_data"), seed=3, toy=SMALL)
    assert toy.run_toy_data(config) == {}
    assert contents(tmp_path / "toy_data") == contents(folder)


def test_counts_and_disjoint_prompts(folder):
    prompts = {name: [question(record) for record in read(folder, name)] for name in SPLITS}
    assert [len(prompts[name]) for name in SPLITS] == [2000, 600, 200, 50]
    everything = [letters for name in SPLITS for letters in prompts[name]]
    assert len(set(everything)) == len(everything)
    for letters in everything:
        assert 4 <= len(letters) <= 6 and set(letters) <= set(SMALL.alphabet)
        assert len(set(letters)) == len(letters) and letters != "".join(sorted(letters))
    assert [question(record) for record in read(folder, "eval_pairs")] == prompts["eval"]


def test_too_many_prompts_are_refused(tmp_path):
    counts = {"num_sft": 5, "num_pairs": 2, "num_prompts": 1, "num_eval": 1}
    config = ToyConfig(**counts, alphabet="abc", min_letters=2, max_letters=3)
    with pytest.raises(ValueError, match=r"found only 8; lower toy\.num_sft"):
        toy.make_toy_data(tmp_path, config, 0)  # 12 exist; ab, ac, bc and abc are sorted
    assert not list(tmp_path.iterdir())


def test_the_share_of_mistakes_is_as_asked(folder):
    rights = [toy.score_by_rule(r["prompt"], r["completion"]) for r in read(folder, "sft")]
    assert abs(sum(rights) / len(rights) - 0.6) < 4 * (0.6 * 0.4 / 2000) ** 0.5
    assert all(toy.score_by_rule(r["prompt"], r["completion"]) for r in read(folder, "eval"))


@pytest.mark.parametrize("mistakes", [0.0, 1.0])
def test_all_or_none_are_mistakes(tmp_path, mistakes):
    config = ToyConfig(num_sft=40, num_pairs=1, num_prompts=1, num_eval=1, mistakes=mistakes)
    toy.make_toy_data(tmp_path, config, 0)
    for record in read(tmp_path, "sft"):
        assert toy.score_by_rule(record["prompt"], record["completion"]) == 1.0 - mistakes


def test_pairs_prefer_the_right_answer_on_either_side(folder):
    records = read(folder, "pairs")
    for record in records + read(folder, "eval_pairs"):
        texts = [record[f"output_{letter}"][0]["content"] for letter in "AB"]
        scores = [toy.score_by_rule(record["prompt"], text) for text in texts]
        assert scores == ([1.0, 0.0] if record["label"] else [0.0, 1.0])
    assert 0.4 < sum(record["label"] for record in records) / len(records) < 0.6


def test_every_kind_of_mistake_is_wrong_in_its_own_way():
    rng = random.Random(0)

    def mistakes(kind):
        return {toy.make_mistake(rng, "dbca", (kind,), "abcde") for _ in range(500)}

    assert mistakes("drop") == {"bcd", "acd", "abd", "abc"}
    assert mistakes("repeat") == {"aabcd", "abbcd", "abccd", "abcdd"}
    assert mistakes("unsorted") == {"dbca"}
    assert mistakes("swap") == {"bacd", "cbad", "dbca", "acbd", "adcb", "abdc"}
    assert len(mistakes("substitute")) == 4 * 4 and "abcd" not in mistakes("substitute")
    with pytest.raises(ValueError, match="'twist', allowed: swap"):
        mistakes("twist")


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("abcd", 1.0),
        ("dbca", 0.0),
        ("abc", 0.0),
        ("abcdd", 0.0),
        (" abcd", 0.0),
        ("abcd<|im_end|>", 0.0),
        ("ABCD", 0.0),
        ("", 0.0),
    ],
)
def test_the_rule(response, score):
    prompt = [{"role": "system", "content": "zz"}, {"role": "user", "content": "dbca"}]
    assert toy.score_by_rule(prompt, response) == score


def test_the_tokenizer_has_one_token_a_character(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    turns = [{"role": "user", "content": "dbca"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert tokenizer.convert_ids_to_tokens(ids) == [toy.BOS, *"dbca", toy.ANSWER]
    whole = [*turns, {"role": "assistant", "content": "abcd"}]
    ids = tokenizer.apply_chat_template(whole, return_dict=False)
    expected = [toy.BOS, *"dbca", toy.ANSWER, *"abcd", toy.END]
    assert tokenizer.convert_ids_to_tokens(ids) == expected
    assert tokenizer.decode(ids, skip_special_tokens=True) == "dbcaabcd"
    assert tokenizer("ab \nc")["input_ids"] == tokenizer.convert_tokens_to_ids(
        ["a", "b", " ", toy.UNKNOWN, "c"]
    )
    assert (tokenizer.eos_token, tokenizer.pad_token) == (toy.END, toy.PAD)


def test_the_config_is_the_tokenizers(folder):
    config = json.loads((folder / "base" / "config.json").read_text())
    tokenizer = load_tokenizer(str(folder / "base"))
    assert config["vocab_size"] == len(tokenizer) == 32
    assert config["eos_token_id"] == tokenizer.eos_token_id
    assert config["num_attention_heads"] * config["head_dim"] == config["hidden_size"]
    assert config["num_attention_heads"] > config["num_key_value_heads"]


def test_the_renderer_reads_the_template(folder):
    renderer = make_renderer(load_tokenizer(str(folder / "base")))
    prompt = renderer.render_prompt([Turn("user", "dbca")], 32)
    response = renderer.render_response("abcd")
    assert len(prompt) == len("dbca") + 2 and len(response) == len("abcd") + 1
    assert renderer.decode_response(response) == "abcd"
    assert renderer.stop_ids == {renderer.tokenizer.eos_token_id}
    assert not renderer.stop_strings


def test_the_files_are_what_the_loaders_read(folder):
    demonstrations = load_demonstrations(str(folder / "sft.jsonl"))
    assert len(demonstrations) == 2000
    lengths = collections.Counter(len(one.prompt.turns[0].content) for one in demonstrations)
    assert set(lengths) == {4, 5, 6} and min(lengths.values()) > 550
    preferences = load_preferences(str(folder / "pairs.jsonl"))
    for preference in preferences:
        letters = preference.prompt.turns[0].content
        assert preference.chosen.turns[0].content == toy.sort_letters(letters)
    assert len(load_prompts(str(folder / "prompts.jsonl"))) == 200
    assert len(load_prompts(str(folder / "eval.jsonl"))) == 50
    assert len(load_demonstrations(str(folder / "eval.jsonl"))) == 50
