"""Each hub data set from rows of its own schema to what is trained on."""

import datasets
import pytest

from halos_jax.data.datasets import load_demonstrations, load_preferences, load_prompts
from halos_jax.data.records.hub import HUB_SETS, read_alpacaeval, register
from halos_jax.types import Turn


def turn(role, content):
    return {"role": role, "content": content}


@pytest.fixture
def offer(monkeypatch):
    """Let `datasets.load_dataset` return these rows, in the types that the library gives."""

    def put(rows):
        table = datasets.Dataset.from_list(rows)
        monkeypatch.setattr(datasets, "load_dataset", lambda **arguments: table)

    return put


def show(preferences):
    """Return (prompt contents, chosen, rejected, rewards) of each preference."""
    return [
        (
            [one.content for one in pair.prompt.turns],
            pair.chosen.turns[0].content,
            pair.rejected.turns[0].content,
            (pair.chosen.reward, pair.rejected.reward),
        )
        for pair in preferences
    ]


NO_REWARDS = (None, None)


def test_alpacaeval(offer):
    row = {"instruction": "q", "output": "a", "generator": "text_davinci_003"}
    offer([row | {"dataset": "helpful_base"}, row | {"instruction": "r", "dataset": "vicuna"}])
    prompts = load_prompts("alpacaeval@test")
    assert [one.turns for one in prompts] == [(Turn("user", "q"),), (Turn("user", "r"),)]
    assert [one.extra["source"] for one in prompts] == ["helpful_base", "vicuna"]
    assert [d.completion.turns[0].content for d in load_demonstrations("alpacaeval@test")] == [
        "a",
        "a",
    ]


SHP = {
    "post_id": "himc90",
    "domain": "askacademia_train",
    "upvote_ratio": 0.99,
    "history": "a question",
    "c_root_id_A": "fwhnqao",
    "c_root_id_B": "fwhnqap",
    "created_at_utc_A": 1593407000,
    "created_at_utc_B": 1593407001,
    "score_A": 2,
    "score_B": 6,
    "human_ref_A": "answer A",
    "human_ref_B": "answer B",
    "labels": 0,
    "seconds_difference": 1.0,
    "score_ratio": 3.0,
}


def test_shp(offer):
    other = {"post_id": "other", "history": "r", "score_A": 9, "labels": 1, "score_ratio": 1.5}
    offer([SHP, SHP | other])
    assert show(load_preferences("shp@test")) == [
        (["a question"], "answer B", "answer A", (6.0, 2.0)),
        (["r"], "answer A", "answer B", (9.0, 6.0)),
    ]
    assert len(load_preferences("shp@train")) == 1  # of a ratio of 2 at least
    offer([SHP] * 8 + [SHP | {"post_id": "p"}] * 2)
    assert len(load_preferences("shp@train")) == 5 + 2
    assert len(load_preferences("shp@validation")) == 10


DIALOGUE = "\n\nHuman: one\n\nAssistant: two: \n\n2\n\nHuman: three\n\nAssistant:"


@pytest.mark.parametrize("name", ["hh", "hh_helpful", "hh_harmless"])
def test_hh(offer, name):
    offer(
        [
            {"chosen": f"{DIALOGUE} good\n", "rejected": f"{DIALOGUE}"},
            {"chosen": f"{DIALOGUE} good", "rejected": "\n\nHuman: z\n\nAssistant: bad"},
            {
                "chosen": f"{DIALOGUE} a\n\nAssistant: b",
                "rejected": f"{DIALOGUE} a\n\nAssistant: c",
            },
        ]
    )
    prompt = ["one", "two: \n\n2", "three"]
    [pair] = load_preferences(f"{name}@train")
    assert show([pair]) == [(prompt, "good", "", NO_REWARDS)]
    assert [one.role for one in pair.prompt.turns] == ["user", "assistant", "user"]


def message(name, parent, role, rank=None, lang="en"):
    return {
        "message_id": name,
        "parent_id": parent,
        "user_id": "u",
        "created_date": "2023-02-05T14:23:50.983374+00:00",
        "text": f"text {name}",
        "role": role,
        "lang": lang,
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "rank": rank,
        "synthetic": False,
        "model_name": None,
        "detoxify": None,
        "message_tree_id": "root",
        "tree_state": "ready_for_export",
        "emojis": {"name": ["+1"], "count": [2]},
        "labels": {"name": ["spam"], "value": [0.0], "count": [3]},
    }


def test_oasst(offer):
    offer(
        [
            message("root", None, "prompter"),
            message("worst", "root", "assistant", 2),
            message("best", "root", "assistant", 0),
            message("middle", "root", "assistant", 1),
            message("unranked", "root", "assistant"),
            message("q", "best", "prompter"),
            message("a", "q", "assistant", 0),
            message("b", "q", "assistant", 1, lang="de"),
            message("c", "q", "assistant", 2),
            message("frage", None, "prompter", lang="de"),
            message("x", "frage", "assistant", 0),
            message("y", "frage", "assistant", 1),
            message("deep", "x", "prompter"),
            message("z0", "deep", "assistant", 0),
            message("z1", "deep", "assistant", 1),
            message("r", "middle", "prompter"),
            message("r1", "r", "assistant", 1),
            message("r0", "r", "assistant", 0),
        ]
    )
    assert show(load_preferences("oasst@test")) == [
        (["text root"], "text best", "text middle", NO_REWARDS),
        (["text root"], "text middle", "text worst", NO_REWARDS),
        (["text root", "text middle", "text r"], "text r0", "text r1", NO_REWARDS),
    ]


CHOSEN = [turn("user", "q"), turn("assistant", "good")]
REJECTED = [turn("user", "q"), turn("assistant", "bad")]


def test_ultrabin(offer):
    row = {"prompt": "q", "prompt_id": "id", "chosen": CHOSEN, "rejected": REJECTED}
    offer([row | {"messages": CHOSEN, "score_chosen": 8.5, "score_rejected": 7.0}])
    assert show(load_preferences("ultrabin@train")) == [(["q"], "good", "bad", (8.5, 7.0))]


@pytest.mark.parametrize("name", ["ultrafeedback_armorm", "ultrafeedback_gemma"])
def test_ultrafeedback_armorm(offer, name):
    answers = ["x", "good", "y", "bad", "z"]
    row = {"prompt_id": "id", "prompt": "q", "all_generated_responses": answers}
    row |= {"all_rm_scores": [0.125, 0.25, 0.125, 0.0625, 0.125]}
    offer([row | {"chosen": CHOSEN, "rejected": REJECTED}])
    assert show(load_preferences(f"{name}@test")) == [(["q"], "good", "bad", (0.25, 0.0625))]


def test_ultrachat(offer):
    messages = [*CHOSEN, turn("user", "r"), turn("assistant", "b")]
    offer([{"prompt": "q", "prompt_id": "id", "messages": messages}])
    [one] = load_demonstrations("ultrachat@train")
    assert one.prompt.turns == (Turn("user", "q"),)
    assert [reply.content for reply in one.completion.turns] == ["good", "r", "b"]
    [prompt] = load_prompts("ultrachat@test")
    assert [reply.content for reply in prompt.turns] == ["q", "good", "r"]


def test_s1k_11(offer):
    row = {"solution": "4", "question": "2+2?", "cot_type": "math", "source_type": "x"}
    row |= {
        "metadata": "{}",
        "deepseek_thinking_trajectory": "hm\n",
        "deepseek_attempt": "It is 4.",
    }
    row |= {"gemini_thinking_trajectory": "g", "gemini_attempt": "h", "deepseek_grade": "Yes"}
    offer([row])
    [one] = load_demonstrations("s1k_11@train")
    assert one.completion.turns[0].content == "<think>\nhm\n</think>\n\nIt is 4."
    assert one.prompt.turns == (Turn("user", "2+2?"),)
    [prompt] = load_prompts("s1k_11@train")
    assert prompt.extra["solution"] == "4"


@pytest.mark.parametrize("better", [0, 1])
def test_safe_rlhf(offer, better):
    row = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": better}
    offer([row | {"prompt_source": "x", "response_0_source": "y", "response_1_source": "z"}])
    expected = ("a", "b") if better == 0 else ("b", "a")
    assert show(load_preferences("safe_rlhf@train")) == [(["q"], *expected, NO_REWARDS)]


def test_wildbench(offer):
    def said(role, content):
        return turn(role, content) | {"language": "English", "redacted": False, "toxic": False}

    row = {
        "id": 1,
        "session_id": "s",
        "conversation_input": [said("user", "a"), said("assistant", "b"), said("user", "c")],
        "references": {"gpt-4": "d"},
        "length": 3,
        "checklist": ["is it right?"],
        "intent": "i",
        "appropriate": "yes",
        "primary_tag": "Math",
        "secondary_tags": [],
    }
    offer([row])
    [prompt] = load_prompts("wildbench@test")
    assert [one.content for one in prompt.turns] == ["a", "b", "c"]
    assert prompt.extra["checklist"] == ["is it right?"]
    [one] = load_demonstrations("wildbench@test")
    assert one.completion.turns[-1] == Turn("assistant", "d")


def test_all_of_halos_data_sets_are_there_and_a_name_is_taken_once():
    named = "alpacaeval shp hh hh_helpful hh_harmless oasst ultrabin ultrafeedback_armorm"
    named += " ultrafeedback_gemma ultrachat s1k_11 safe_rlhf wildbench"
    assert set(named.split()) == HUB_SETS.keys()
    assert HUB_SETS["ultrabin"].splits == {"train": "train_prefs", "test": "test_prefs"}
    assert HUB_SETS["oasst"].splits["test"] == "validation"
    assert HUB_SETS["hh_helpful"].arguments["data_dir"] == "helpful-base"
    with pytest.raises(ValueError, match="'alpacaeval' is registered already"):
        register("alpacaeval", "x")(read_alpacaeval)
