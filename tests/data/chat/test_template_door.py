"""What a template refuses is named by its record, or left out and counted."""

import logging

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from halos_jax.data.chat.renderer import make_renderer
from halos_jax.data.chat.template_door import keep_shown, make_shown
from halos_jax.data.conversations import make_target_items
from halos_jax.data.records.fields import RecordError
from halos_jax.data.records.turns import pack
from halos_jax.data.tokenize import Lengths
from halos_jax.types import Completion, Demonstration, Preference, Prompt, Turn

STRICT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turns') }}"
    "{% endif %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def renderer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["</s>", "<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    tokenizer.chat_template = STRICT
    return make_renderer(tokenizer)


def ask(line, *turns):
    turns = tuple(Turn(*turn.split(":")) for turn in turns)
    return Prompt(f"p{line}", turns, place=f"f line {line}")


GOOD, SYSTEM = ask(1, "user:a"), ask(2, "system:s", "user:a")
TWICE, LAST = ask(3, "user:a", "user:b"), ask(4, "user:c")
TOOLS = Prompt("p5", (Turn("user", "a", pack({"tools": [{}]})),), place="f line 5")


def learn(prompt, *turns):
    return Demonstration(prompt, Completion(tuple(Turn(*turn.split(":")) for turn in turns)))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (SYSTEM, "f line 2: the chat template refuses turns of the roles system, user: no system"),
        (
            SYSTEM,
            ".*: no system turns; data.merge_turns=true joins system turns and neighbours of one "
            "role, which it takes; data.skip_bad=true leaves such records out$",
        ),
        (TWICE, "f line 3: .*roles must alternate; data.merge_turns=true joins .* which it takes"),
        (  # Joined or not, it begins with the assistant.
            ask(6, "assistant:a", "user:b", "user:c"),
            "f line 6: .*roles must alternate; data.skip_bad=true leaves such records out$",
        ),
        (TOOLS, "f line 5: 'tools': the chat template does not show it"),
        (learn(GOOD, "assistant:b", "system:s", "assistant:c"), "f line 1: .*no system"),
        (
            Preference(
                GOOD,
                Completion((Turn("assistant", "", pack({"reasoning": "r"})),)),
                Completion((Turn("assistant", "b"),)),
            ),
            "f line 1: the chat template does not show 'reasoning' of an answer",
        ),
    ],
)
def test_the_first_record_that_is_refused_is_named(renderer, record, message):
    with pytest.raises(RecordError, match=f"^{message}"):
        keep_shown([GOOD, record, SYSTEM], renderer)


def test_refused_records_can_be_left_out(renderer, caplog):
    with caplog.at_level(logging.WARNING):
        kept = keep_shown([GOOD, SYSTEM, TWICE, LAST], renderer, skip=True)
    assert kept == [GOOD, LAST]
    assert "2 of 4 records are left out (data.skip_bad), since the chat template" in caplog.text
    assert caplog.text.rstrip().endswith("neighbours of one role, which it takes")
    with pytest.raises(RecordError, match="refuses all of the records; the first: f line 2"):
        keep_shown([SYSTEM, TWICE], renderer, skip=True)


def test_no_more_are_looked_at_than_are_needed(renderer):
    assert keep_shown([GOOD, LAST, SYSTEM], renderer, count=2) == [GOOD, LAST, SYSTEM]
    kept = keep_shown([SYSTEM, GOOD, LAST, TWICE], renderer, count=2, skip=True)
    assert kept == [GOOD, LAST, TWICE]


def test_what_rendering_raises_gets_its_place(renderer):
    good = learn(GOOD, "assistant:b")

    def make(records, *, skip):
        lengths = Lengths(1000, 1000)
        return make_shown(
            lambda found: make_target_items(found, renderer, lengths), records, renderer, skip=skip
        )

    assert len(make([good, good], skip=False)) == 2
    with pytest.raises(RecordError, match=r"^f line 3: .*roles must alternate"):
        make([good, learn(TWICE, "assistant:b")], skip=False)
    assert len(make([good, learn(TWICE, "assistant:b"), good], skip=True)) == 2
    with pytest.raises(RecordError, match=r"^f line 5: 'tools'"):
        make([good, learn(TOOLS, "assistant:b")], skip=False)
