"""A template with channels in the style of harmony: the renderer and the template say the same."""

import logging

import pytest

from halos_jax.data.chat.channels import find_lead, take_content
from halos_jax.data.chat.renderer import make_renderer
from halos_jax.data.records.turns import pack
from halos_jax.types import Turn
from tests.data.chat.test_renderer import CHATML, THINKING, make_tokenizer

SPECIAL = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>")
SPECIAL += ("<|endoftext|>", "<s>")
FINAL, ANALYSIS = "<|channel|>final<|message|>", "<|channel|>analysis<|message|>"
HARMONY = (
    "<|start|>system<|message|>Valid channels: analysis, final.<|end|>{% for m in messages %}"
    "{% if m['role'] != 'assistant' %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>"
    "{% else %}{% set last = loop.last and not add_generation_prompt %}"
    "{% if last and m.thinking is defined %}<|start|>assistant" + ANALYSIS + "{{ m.thinking }}"
    "<|end|>{% endif %}<|start|>assistant" + FINAL + "{{ m['content'] }}"
    "{{ '<|return|>' if last else '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
QUESTION = (Turn("user", "what is two plus two?"),)


@pytest.fixture(scope="module")
def renderer():
    tokenizer = make_tokenizer(HARMONY, special=SPECIAL, eos="<|return|>")
    ends = [tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("endoftext", "call")]
    return make_renderer(tokenizer, ends)


def encode(renderer, text):
    return tuple(renderer.tokenizer(text, add_special_tokens=False)["input_ids"])


def test_the_lead_is_what_has_a_special_token():
    assert find_lead([7, 1, 8], {1, 2}) == (7, 1, 8)
    assert find_lead([7, 8], {1, 2}) == find_lead([], {1}) == ()
    for template in (CHATML, THINKING):
        assert make_renderer(make_tokenizer(template))._lead == ()


def test_content_is_what_follows_the_last_lead():
    assert take_content([1, 2, 5, 1, 2, 6, 7], (1, 2)) == [6, 7]
    assert take_content([1, 2], (1, 2)) == []
    assert take_content([2, 1], (1, 2)) is take_content([], (1, 2)) is None


@pytest.mark.parametrize("answer", ["the answer is four.", " \n x ", "", "<|end|> of it"])
def test_prompt_and_answer_are_the_template_s_own_rendering(renderer, answer):
    prompt, response = renderer.render_prompt(QUESTION, 999), renderer.render_response(answer)
    header = "<|start|>system<|message|>Valid channels: analysis, final.<|end|><|start|>user"
    header += f"<|message|>{QUESTION[0].content}<|end|><|start|>assistant"
    assert prompt == encode(renderer, header)
    if "<|" not in answer:  # what a text spells is no token
        assert response == encode(renderer, FINAL + answer + "<|return|>")
    assert response[-1] == renderer.tokenizer.convert_tokens_to_ids("<|return|>")
    assert renderer.render_response(answer, finished=False) == response[:-1]
    assert renderer.decode_response(response) == answer


def test_an_answer_in_the_history_ends_otherwise(renderer):
    turns = (*QUESTION, Turn("assistant", "four."), Turn("user", "and three?"))
    expected = f"<|start|>assistant{FINAL}four.<|end|><|start|>user<|message|>and three?<|end|>"
    expected = encode(renderer, expected + "<|start|>assistant")
    assert renderer.render_prompt(turns, 999)[-len(expected) :] == expected


def test_thoughts_of_a_record_go_into_their_channel(renderer):
    turn = Turn("assistant", "four.", pack({"thinking": "two and two"}))
    response = renderer.render_response(turn)
    text = f"{ANALYSIS}two and two<|end|><|start|>assistant{FINAL}four.<|return|>"
    assert response == encode(renderer, text)
    assert renderer.decode_response(response) == "four."


def test_a_sample_s_text_is_its_final_message_or_all_there_is(renderer):
    thought = f"{ANALYSIS}the cat<|end|><|start|>assistant"
    for text, expected in {
        f"{thought}{FINAL}four.<|return|>": "four.",
        f"{thought}{FINAL} four": " four",
        f"{FINAL}one<|end|><|start|>assistant{FINAL}two<|return|>": "two",
        f"{ANALYSIS}the cat": f"{ANALYSIS}the cat",
        f"{thought}<|channel|>commentary to=add<|message|>1 2<|call|>": (
            f"{thought}<|channel|>commentary to=add<|message|>1 2"
        ),
    }.items():
        assert renderer.decode_response(encode(renderer, text)) == expected
    kept = renderer.decode_response(encode(renderer, f"{thought}{FINAL}x"), keep_marker=True)
    assert kept == "analysisthe catassistantfinalx"


def test_answers_end_at_return_and_call_and_not_at_the_end_of_a_message(renderer, caplog):
    ids = {renderer.tokenizer.convert_tokens_to_ids(name): name for name in SPECIAL}
    assert {ids[token] for token in renderer.stop_ids} == {
        "<|return|>",
        "<|call|>",
        "<|endoftext|>",
    }
    assert renderer.stop_strings == () and ids[renderer.pad_id] == "<s>"
    with caplog.at_level(logging.INFO):
        make_renderer(renderer.tokenizer)
    (record,) = caplog.records
    assert f"begins answers by {FINAL!r}" in record.getMessage()
