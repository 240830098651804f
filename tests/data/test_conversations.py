"""Conversations against the template itself: each answer behind the very tokens of its prompt."""

import logging

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from halos_jax.data.chat.renderer import make_renderer
from halos_jax.data.conversations import make_target_items
from halos_jax.data.lengths import Lengths
from halos_jax.types import FINISH_LENGTH, TARGET, Completion, Demonstration, Prompt, Turn

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' </s>' }}"
    "{% else %}{{ '<s>[INST] ' + m['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
# Past answers are shown without their thoughts.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and not "
    "loop.last %}{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
LONG = Lengths(10_000, 10_000)


def make_tokenizer(template):
    """A byte-level tokenizer without any merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def talk(*contents, **fields):
    """Make the demonstration of a user and an assistant who speak in turn."""
    roles = ("user", "assistant") * len(contents)
    turns = tuple(Turn(role, content) for role, content in zip(roles, contents, strict=False))
    return Demonstration(Prompt("p", turns[:1]), Completion(turns[1:], **fields))


def spell(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def find_answers(item):
    """Return (all tokens before it, its tokens) of each run of targets."""
    whole = np.concatenate([item.prompt_ids, item.responses[0]])
    mask = item.masks[0] if item.masks else np.ones(len(item.responses[0]), bool)
    edges = np.flatnonzero(np.diff(np.r_[False, mask, False])) + len(item.prompt_ids)
    return [
        (tuple(whole[:start]), tuple(whole[start:end]))
        for start, end in zip(edges[::2], edges[1::2], strict=True)
    ]


@pytest.mark.parametrize("template", [CHATML, LLAMA2, None])
def test_every_answer_stands_behind_the_tokens_of_its_prompt(template):
    renderer = make_renderer(make_tokenizer(template))
    talked = talk("q1", "a one", "q\n2", " a two ", "q3", "a three")
    (item,) = make_target_items([talked], renderer, LONG)
    turns = talked.prompt.turns + talked.completion.turns
    expected = [
        (renderer.render_prompt(turns[:n], 10_000), renderer.render_response(turns[n].content))
        for n in (1, 3, 5)
    ]
    assert find_answers(item) == expected
    assert item.roles == (TARGET,) and item.num_targets == (sum(len(a) for _, a in expected),)
    # In the template's own text of the conversation, up to what it puts behind the last turn.
    text = spell(renderer.tokenizer, np.concatenate([item.prompt_ids, item.responses[0]]))
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    whole = renderer.tokenizer.apply_chat_template(
        messages, chat_template=renderer.template, tokenize=False
    )
    assert whole.rstrip() == text.rstrip()


def test_the_mask_is_that_of_a_hand_made_conversation():
    renderer = make_renderer(make_tokenizer(CHATML))
    (item,) = make_target_items([talk("q", "ab", "r", "c")], renderer, LONG)
    pieces = [
        ("ab", True),
        ("<|im_end|>", True),
        ("\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n", False),
        ("c<|im_end|>", True),
    ]
    ids = [renderer.tokenizer(piece).input_ids for piece, _ in pieces]
    np.testing.assert_array_equal(item.responses[0], np.concatenate(ids))
    expected = [target for part, (_, target) in zip(ids, pieces, strict=True) for _ in part]
    np.testing.assert_array_equal(item.masks[0], expected)


def test_turns_that_the_template_rewrites_start_another_sequence():
    renderer = make_renderer(make_tokenizer(FORGETFUL))
    thought = "<think>hm</think>a"
    items = make_target_items([talk("q", thought, "r", "plain", "s", "end")], renderer, LONG)
    answers = [find_answers(item) for item in items]
    assert [len(found) for found in answers] == [1, 2]
    shown = [spell(renderer.tokenizer, answer) for found in answers for _, answer in found]
    assert shown == [f"{thought}<|im_end|>", "plain<|im_end|>", "end<|im_end|>"]
    assert "hm" not in spell(renderer.tokenizer, answers[1][-1][0])


def test_single_answers_have_no_mask():
    renderer = make_renderer(make_tokenizer(CHATML))
    sampled = talk("q", "?", ids=(7, 8))
    first, second = make_target_items([talk("q", ""), sampled], renderer, LONG)
    assert first.masks == second.masks == ()
    assert spell(renderer.tokenizer, first.responses[0]) == "<|im_end|>"
    assert list(second.responses[0]) == [7, 8]
    np.testing.assert_array_equal(first.prompt_ids, second.prompt_ids)


def test_an_answer_that_does_not_fit_starts_another_sequence():
    renderer = make_renderer(make_tokenizer(CHATML))
    talked = talk("q1", "a" * 30, "q2", "b" * 30)
    (whole,) = make_target_items([talked], renderer, LONG)
    assert len(make_target_items([talked], renderer, Lengths(60, whole.num_tokens))) == 1
    first, second = make_target_items([talked], renderer, Lengths(60, whole.num_tokens - 1))
    assert spell(renderer.tokenizer, first.responses[0]) == "a" * 30 + "<|im_end|>"
    assert spell(renderer.tokenizer, second.responses[0]) == "b" * 30 + "<|im_end|>"
    turns = talked.prompt.turns + talked.completion.turns
    assert tuple(second.prompt_ids) == renderer.render_prompt(turns[:3], 60)
    with pytest.raises(ValueError, match=r"leaves none for its response; raise it, or lower"):
        make_target_items([talked], renderer, Lengths(60, 10))


def test_truncated_answers_are_masked_where_asked_for(caplog):
    renderer = make_renderer(make_tokenizer(CHATML))
    cut = talk("q", "a", "r", "b", finish_reason=FINISH_LENGTH)
    (item,) = make_target_items([cut], renderer, LONG)
    assert [spell(renderer.tokenizer, answer) for _, answer in find_answers(item)] == [
        "a<|im_end|>",
        "b",
    ]
    masked = Lengths(10_000, 10_000, mask_truncated=True)
    with caplog.at_level(logging.INFO):
        items = make_target_items(
            [cut, talk("q", "a", finish_reason=FINISH_LENGTH)], renderer, masked
        )
    assert [find_answers(one)[0][1] for one in items] == [find_answers(item)[0][1]]
    assert items[0].num_targets == (2,)
    assert "1 of 2 demonstrations left out: truncated" in caplog.text
    short = Lengths(40, 45, mask_truncated=True)
    assert make_target_items([talk("q", "a" * 60)], renderer, short) == []
    (kept,) = make_target_items([talk("q", "a" * 60)], renderer, Lengths(40, 45))
    assert kept.num_tokens == 45


def test_of_a_plain_text_every_token_is_learned_but_the_first():
    tokenizer = make_tokenizer(CHATML)
    text = "<|im_start|>user\nhi<|im_end|>"
    texts = (text, "ab</s>")
    found = [Demonstration(Prompt("p", ()), Completion((Turn("", one),))) for one in texts]
    found.insert(1, talk("q", "a"))
    first, chat, last = make_target_items(found, make_renderer(tokenizer), LONG)
    whole = [*first.prompt_ids, *first.responses[0]]
    assert spell(tokenizer, whole) == text + "</s>" and len(first.prompt_ids) == 1
    assert whole[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert first.masks == () and first.roles == (TARGET,)
    assert spell(tokenizer, [*last.prompt_ids, *last.responses[0]]) == "ab</s>"
    assert spell(tokenizer, chat.responses[0]) == "a<|im_end|>"
    [cut] = make_target_items(found[:1], make_renderer(tokenizer), Lengths(10, 5))
    assert len(cut.prompt_ids) + len(cut.responses[0]) == 5
