"""Prompt and answer are the template's own rendering of the conversation, or it is said once."""

import logging

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from halos_jax.config import ConfigError
from halos_jax.data.chat.renderer import make_renderer
from halos_jax.data.chat.template import choose_template
from halos_jax.data.chat.template_options import set_options
from halos_jax.data.records.turns import pack
from halos_jax.types import Turn

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<|end|>")
OPEN = "<|im_start|>{{ m.role }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n"
LAST = "{% for m in messages %}{% set text = m.content %}{% set last = loop.last %}"
SPLIT = (  # of Qwen 3: reasoning in its field, or in the content
    "{% set thought = m.reasoning_content or '' %}"
    "{% if not thought and '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
SHOWN = "<think>\n{{ thought }}\n</think>\n\n{{ text }}"
# Name -> template; those that open, end, show or leave out thoughts, and those of the families.
TEMPLATES = {
    "chatml": LAST + OPEN + "{{ text }}<|im_end|>\n{% endfor %}" + PROMPT + "{% endif %}",
    "chatml, no break": LAST + OPEN + "{{ text }}<|im_end|>{% endfor %}" + PROMPT + "{% endif %}",
    "llama 3": LAST + OPEN + "{{ text | trim }}<|im_end|>{% endfor %}" + PROMPT + "{% endif %}",
    "mistral": (
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}"
    ),
    "phi 3": LAST + OPEN + "{{ text }}<|end|>\n{% endfor %}" + PROMPT + "{% else %}</s>{% endif %}",
    "tulu": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}"
        "{% if m.role == 'assistant' %}</s>{% endif %}{{ '' if loop.last else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}"
    ),
    "qwen 3": (
        LAST
        + OPEN
        + "{% if m.role == 'assistant' %}"
        + SPLIT
        + "{% if last or thought %}"
        + SHOWN
        + "{% else %}{{ text }}{% endif %}{% else %}{{ text }}{% endif %}<|im_end|>\n{% endfor %}"
        + PROMPT
        + "{% if enable_thinking is defined and enable_thinking is false %}"
        "<think>\n\n</think>\n\n{% endif %}{% endif %}"
    ),
    "qwen 3 thinking": (
        LAST
        + OPEN
        + "{% if m.role == 'assistant' %}"
        + SPLIT
        + "{% if last %}"
        + SHOWN
        + "{% else %}{{ text }}{% endif %}{% else %}{{ text }}{% endif %}<|im_end|>\n{% endfor %}"
        + PROMPT
        + "<think>\n{% endif %}"
    ),
    "qwq": (
        LAST + "{% if m.role == 'assistant' %}"
        "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        + OPEN
        + "{{ text }}<|im_end|>\n{% endfor %}"
        + PROMPT
        + "<think>\n{% endif %}"
    ),
    "r1": (
        LAST
        + "{% if m.role == 'assistant' %}{% set text = text.split('</think>')[-1] %}{% endif %}"
        + OPEN
        + "{{ text }}<|im_end|>{% endfor %}"
        + PROMPT
        + "{% endif %}"
    ),
    "magistral": (
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}[THINK]{% endif %}"
    ),
}
TEMPLATES["qwen 3 off"] = set_options(TEMPLATES["qwen 3"], {"enable_thinking": False})
THOUGHT = "<think>\nadd them\n</think>\n\nfour"
QUESTION = Turn("user", "2+2?")


def make_tokenizer(template, special=SPECIAL):
    """Return a tokenizer of the bytes alone, with special tokens and <think> as one that is not."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({text: number for number, text in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(special))
    core.add_tokens([AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


def show(renderer, answer, *, finished=True):
    """Return prompt and answer as text, and the whole conversation as the template writes it."""
    tokenizer = renderer.tokenizer
    ids = renderer.render_prompt((QUESTION,), 999)
    ids += renderer.render_response(answer, finished=finished)
    turn = {"role": "assistant", "content": answer}
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION.content}, turn], tokenize=False
    )
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False), whole


# (template, answer) -> what is learned behind the last header; all others are the template's own.
SAID = {
    ("qwq", THOUGHT): "<think>\nadd them\n</think>\n\nfour<|im_end|>",
    ("qwq", "four"): "<think>\n\n</think>\n\nfour<|im_end|>",
    ("qwq", "add them\n</think>\n\nfour"): "<think>\nadd them\n</think>\n\nfour<|im_end|>",
    ("r1", THOUGHT): f"{THOUGHT}<|im_end|>",
    ("r1", "add them\n</think>\n\nfour"): "add them\n</think>\n\nfour<|im_end|>",
    ("qwen 3 off", THOUGHT): f"<think>\n\n</think>\n\n{THOUGHT}<|im_end|>",
    ("qwen 3 off", "add them\n</think>\n\nfour"): (
        "<think>\n\n</think>\n\nadd them\n</think>\n\nfour<|im_end|>"
    ),
    ("magistral", "four"): "[THINK]\n\n[/THINK]\n\nfour</s>",
    ("magistral", THOUGHT): f"[THINK]\n\n[/THINK]\n\n{THOUGHT}</s>",
    ("magistral", "add them\n</think>\n\nfour"): (
        "[THINK]\n\n[/THINK]\n\nadd them\n</think>\n\nfour</s>"
    ),
}
ANSWERS = ("four", THOUGHT, "add them\n</think>\n\nfour")


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_and_answer_are_the_templates_own_or_it_is_said(name, answer, caplog):
    renderer = make_renderer(make_tokenizer(TEMPLATES[name]))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found, whole = show(renderer, answer)
    said = [one.getMessage() for one in caplog.records if "the chat template" in one.getMessage()]
    if (name, answer) in SAID:
        learned = found.partition("2+2?")[2]
        for header in ("<|im_end|>", "\n", "<|im_start|>assistant\n", " [/INST]"):
            learned = learned.removeprefix(header)
        assert learned == SAID[name, answer]
        assert found != whole.rstrip() and said and len(said) == len(set(said))
    else:
        assert found == whole.rstrip() and not said


def test_a_cut_answer_has_no_end():
    renderer = make_renderer(make_tokenizer(TEMPLATES["qwq"]))
    finished, cut = (show(renderer, THOUGHT, finished=end)[0] for end in (True, False))
    assert finished == f"{cut}<|im_end|>" and cut.count("<think>") == 1


def test_what_is_said_names_what_the_prompt_has(caplog):
    renderer = make_renderer(make_tokenizer(TEMPLATES["qwq"]))
    assert not caplog.text, "nothing is said of a template before an answer is written"
    renderer.render_response("four")
    assert r"prompt ends with '<think>\n', which its past answers do not have" in caplog.text
    assert r"one without a thought after '\n</think>\n\n' too" in caplog.text
    renderer = make_renderer(make_tokenizer(TEMPLATES["qwen 3 off"]))
    renderer.render_response(THOUGHT)
    assert "an answer has a thought ('<think>" in caplog.text
    assert "chat_template_options.enable_thinking=true" in caplog.text
    renderer = make_renderer(make_tokenizer(TEMPLATES["r1"]))
    renderer.render_response(THOUGHT)
    assert "leaves out or changes a part of some answers" in caplog.text


@pytest.mark.parametrize("name", ["qwen 3", "qwen 3 thinking"])
def test_reasoning_of_a_turn_is_what_the_template_writes(name, caplog):
    renderer = make_renderer(make_tokenizer(TEMPLATES[name]))
    turn = Turn("assistant", "four", further=pack({"reasoning_content": "add them"}))
    plain = renderer.render_response(THOUGHT)
    assert renderer.render_response(turn) == plain
    assert "the chat template" not in caplog.text


def test_tags_of_thoughts_that_are_special_tokens_are_tokens_in_answers():
    tokenizer = make_tokenizer(TEMPLATES["magistral"], (*SPECIAL, "[THINK]", "[/THINK]"))
    renderer = make_renderer(tokenizer)
    begin, end = tokenizer.convert_tokens_to_ids(["[THINK]", "[/THINK]"])
    prompt = renderer.render_prompt((Turn("user", "a [/THINK] b"),), 999)
    assert prompt.count(begin) == 1 and end not in prompt, "what a user types is text"
    for answer in ("four", "[THINK]add[/THINK]four", "add[/THINK]four"):
        ids = renderer.render_response(answer)
        assert ids.count(end) == 1 and begin not in ids
    assert renderer.render_response("a</s>[/THINK]four").count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize(
    ("name", "marker", "closing"),
    [
        ("chatml", "<|im_end|>", "\n"),
        ("chatml, no break", "<|im_end|>", ""),
        ("mistral", "</s>", ""),
        ("phi 3", "<|end|>\n</s>", ""),
        ("tulu", "</s>", ""),
        ("qwq", "<|im_end|>", "\n"),
    ],
)
def test_what_stands_behind_an_answer(name, marker, closing):
    renderer = make_renderer(make_tokenizer(TEMPLATES[name]))
    assert renderer.end_marker == marker and renderer.closing == closing


def test_a_template_without_an_end_has_no_closing():
    bare = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
    assert make_renderer(make_tokenizer(bare)).closing is None


def test_one_of_several_templates_is_chosen_by_its_name():
    tokenizer = make_tokenizer({"default": "a", "tool_use": "b"})
    assert choose_template(tokenizer) == "a"
    assert choose_template(tokenizer, "tool_use") == "b"
    tokenizer.chat_template = None
    assert choose_template(tokenizer) == ""
    tokenizer.chat_template = {"tool_use": "b", "rag": "c"}
    with pytest.raises(ConfigError, match=r"without a default: 'tool_use', 'rag'; allowed: one of"):
        make_renderer(tokenizer)


@pytest.mark.parametrize(
    ("special", "cost", "level"),
    [(SPECIAL, "1 token here", "INFO"), (SPECIAL[:2], "10 tokens here; --config", "WARNING")],
)
def test_the_default_template_is_named_with_its_cost(special, cost, level, caplog):
    with caplog.at_level(logging.INFO):
        make_renderer(make_tokenizer(None, special))
    (record,) = [one for one in caplog.records if "no chat template" in one.getMessage()]
    assert record.levelname == level
    assert f"'<|im_end|>' is {cost}" in record.getMessage()


def test_a_date_set_as_an_option_is_the_one_that_is_shown():
    dated = "{% if not date_string is defined %}{% set date_string = 'today' %}{% endif %}"
    dated += "{{ date_string }}" + TEMPLATES["chatml"]
    for template, date in ((dated, "26 Jul 2024"), (set_options(dated, {"date_string": "1"}), "1")):
        renderer = make_renderer(make_tokenizer(template))
        ids = renderer.render_prompt((QUESTION,), 999)
        assert renderer.tokenizer.decode(ids).startswith(f"{date}<|im_start|>")


@pytest.mark.parametrize(
    ("template", "bos", "pad", "expected"),
    [
        ("chatml", "<s>", "[INST]", "[INST]"),
        ("chatml", "<s>", None, "<s>"),
        # What ends an answer may pad where the template writes more behind it, and else not.
        ("chatml", None, "</s>", "</s>"),
        ("chatml", None, "<|im_end|>", "<|im_end|>"),
        ("llama 3", None, "</s>", None),
        ("mistral", "<s>", "</s>", "<s>"),
    ],
)
def test_padding_is_never_the_last_token(template, bos, pad, expected):
    tokenizer = make_tokenizer(TEMPLATES[template])
    tokenizer.bos_token, tokenizer.pad_token = bos, pad
    pad_id = make_renderer(tokenizer).pad_id
    assert pad_id == (expected and tokenizer.convert_tokens_to_ids(expected))
