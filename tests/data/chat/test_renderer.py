"""The renderer against the template itself: the two say the same, whatever the template."""

import functools
import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from halos_jax.config import ConfigError
from halos_jax.data.chat.loading import load_tokenizer
from halos_jax.data.chat.renderer import make_renderer
from halos_jax.data.chat.template import DEFAULT_TEMPLATE
from halos_jax.data.records.turns import turns_to_record
from halos_jax.types import Turn

SENTENCES = [
    "the cat sat on the mat and the dog ran away",
    "what is two plus two? the answer is four.",
    "user assistant system the answer is: 1 2 3 4 5 6 7 8 9 0",
    "def f(x):\n    return x + 1\n",
] * 4
SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BOS_CHATML = "{{ bos_token }}" + CHATML
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] }}"
    " [/INST]{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
# The answer's turn starts with an empty thought that the generation header lacks.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} ###\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
STRICT = (
    "{% set turns = messages[1:] if messages[0]['role'] == 'system' else messages %}"
    "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
)


@functools.cache
def train_byte_level(special) -> str:
    """Train a byte-level BPE of a few hundred tokens; return it as JSON."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES, trainer)
    return core.to_str()


def make_tokenizer(template=None, *, adds_bos=False, special=SPECIAL, eos="</s>"):
    core = Tokenizer.from_str(train_byte_level(special))
    if adds_bos:
        bos = ("<s>", core.token_to_id("<s>"))
        core.post_processor = processors.TemplateProcessing("<s> $A", None, [bos])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def make_metaspace_tokenizer(template):
    """A tokenizer in the manner of SentencePiece, whose decoder drops the first space."""
    core = Tokenizer(models.BPE(byte_fallback=False))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    texts = [*SENTENCES, "[INST] [/INST] x\n"]
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=300, special_tokens=list(SPECIAL), show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


TEMPLATES = {
    "none": (None, {}),
    "chatml": (CHATML, {}),
    "bos": (BOS_CHATML, {}),
    "bos twice": (BOS_CHATML, {"adds_bos": True}),
    "llama2": (LLAMA2, {}),
    "thinking": (THINKING, {}),
    "plain": (PLAIN, {}),
    "eos is the marker": (CHATML, {"eos": "<|im_end|>"}),
    "markers are text": (CHATML, {"special": SPECIAL[:2]}),
}
TEXTS = ["four", "the answer is four.", "a  b\n\n\tc", "é ü 日本語 🙂", "x\n```py\n    y\n```"]


@pytest.fixture(params=TEMPLATES.values(), ids=TEMPLATES.keys())
def tokenizer(request):
    template, options = request.param
    return make_tokenizer(template, **options)


def user(*contents):
    roles = ["user", "assistant"] * len(contents)
    return tuple(Turn(role, content) for role, content in zip(roles, contents, strict=False))


def template_text(tokenizer, turns, generate=False):
    return tokenizer.apply_chat_template(
        turns_to_record(turns),
        chat_template=tokenizer.chat_template or DEFAULT_TEMPLATE,
        add_generation_prompt=generate,
        tokenize=False,
    )


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# --------------------------------------------------------------------------- rendering


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("prompt", [user("what is two?"), user("a", "b", "c\n"), user(*TEXTS)])
def test_prompt_and_response_are_the_templates_text(tokenizer, prompt, text):
    renderer = make_renderer(tokenizer)
    prompt_ids = renderer.render_prompt(prompt, 10_000)
    assert decode(tokenizer, prompt_ids) == template_text(tokenizer, prompt, generate=True)
    for content in (text, ""):
        whole = decode(tokenizer, prompt_ids + renderer.render_response(content))
        full = template_text(tokenizer, (*prompt, Turn("assistant", content)))
        expected = full.rstrip()
        if not expected.endswith(renderer.end_marker):
            expected += renderer.end_marker
        assert whole == expected


@pytest.mark.parametrize("text", TEXTS)
def test_a_cut_response_is_the_finished_one_without_its_marker(tokenizer, text):
    renderer = make_renderer(tokenizer)
    finished, cut = renderer.render_response(text), renderer.render_response(text, finished=False)
    assert decode(tokenizer, finished) == decode(tokenizer, cut) + renderer.end_marker
    assert decode(tokenizer, cut).endswith(text)


def test_the_default_template_is_that_of_halos():
    tokenizer = make_tokenizer(None)
    ids = make_renderer(tokenizer).render_prompt((Turn("system", "s"), Turn("user", "q")), 100)
    expected = (
        "\n<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    )
    assert decode(tokenizer, ids) == expected


@pytest.mark.parametrize(
    ("template", "adds_bos", "count"),
    [
        (None, False, 0),
        (None, True, 1),
        (CHATML, True, 0),  # the template is the authority
        (BOS_CHATML, False, 1),
        (BOS_CHATML, True, 1),
    ],
)
def test_bos_stands_once_where_it_is_called_for(template, adds_bos, count):
    tokenizer = make_tokenizer(template, adds_bos=adds_bos)
    renderer = make_renderer(tokenizer)
    ids = renderer.render_prompt(user("a", "b", "c"), 100)
    assert ids.count(tokenizer.bos_token_id) == count
    assert (ids[0] == tokenizer.bos_token_id) == bool(count)
    assert tokenizer.bos_token_id not in renderer.render_response("a")
    assert len(renderer.render_prompt(user("the cat " * 50), 30)) <= 30  # BOS is counted


def test_the_date_in_a_template_stands_still():
    template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%c%N') %}{% endif %}"
        "{{ date_string }}" + CHATML
    )
    tokenizer = make_tokenizer(template)
    text = decode(tokenizer, make_renderer(tokenizer).render_prompt(user("q"), 100))
    assert text.startswith("26 Jul 2024<|im_start|>")


def test_a_template_that_refuses_says_so():
    renderer = make_renderer(make_tokenizer(STRICT))
    with pytest.raises(ValueError, match=r"refuses turns of the roles user, user: .*alternate"):
        renderer.render_prompt((Turn("user", "a"), Turn("user", "b")), 100)
    with pytest.raises(ValueError, match="empty conversation"):
        renderer.render_prompt((), 100)


# --------------------------------------------------------------------------- markers and decoding


@pytest.mark.parametrize(
    ("name", "marker", "stops", "strings"),
    [
        ("none", "<|im_end|>", {"</s>", "<|im_end|>"}, ()),
        ("chatml", "<|im_end|>", {"</s>", "<|im_end|>"}, ()),
        ("eos is the marker", "<|im_end|>", {"<|im_end|>"}, ()),
        ("llama2", " </s>", {"</s>"}, ()),
        ("plain", " ###", {"</s>"}, (" ###",)),
        ("markers are text", "<|im_end|>", {"</s>"}, ("<|im_end|>",)),
    ],
)
def test_end_markers_and_stops(name, marker, stops, strings):
    template, options = TEMPLATES[name]
    tokenizer = make_tokenizer(template, **options)
    renderer = make_renderer(tokenizer)
    assert renderer.end_marker == marker
    assert renderer.stop_ids == {tokenizer.convert_tokens_to_ids(token) for token in stops}
    assert renderer.stop_strings == strings


def test_end_tokens_of_the_generation_config_are_added():
    tokenizer = make_tokenizer(CHATML)
    base = make_renderer(tokenizer).stop_ids
    assert make_renderer(tokenizer, [77, 78]).stop_ids == base | {77, 78}
    assert make_renderer(tokenizer, 77).stop_ids == base | {77}
    assert make_renderer(tokenizer, None).stop_ids == base


def test_eos_ends_a_turn_where_the_template_has_no_marker():
    bare = "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}\n{% endfor %}"
    tokenizer = make_tokenizer(bare)
    renderer = make_renderer(tokenizer)
    assert renderer.end_marker == "</s>"
    assert renderer.render_response("a")[-1] == tokenizer.eos_token_id
    with pytest.raises(ConfigError, match="no eos token"):
        make_renderer(make_tokenizer(bare, eos=None))
    with pytest.raises(ConfigError, match="leaves out the assistant's turns"):
        make_renderer(make_tokenizer("{{ messages[0]['content'] }}"))


@pytest.mark.parametrize("text", [*TEXTS, "", " leading and trailing \n\n"])
@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("name", ["none", "chatml", "bos", "plain", "markers are text"])
def test_decoding_inverts_rendering(name, finished, text):
    template, options = TEMPLATES[name]
    renderer = make_renderer(make_tokenizer(template, **options))
    ids = renderer.render_response(text, finished=finished)
    before = " " if name == "plain" else ""  # the space that stands in the plain template
    assert renderer.decode_response(ids) == before + text


def test_decoding_drops_special_tokens_and_ends_with_any_stop():
    tokenizer = make_tokenizer(CHATML)
    renderer = make_renderer(tokenizer)
    ids = [*renderer.render_response(" a", finished=False), tokenizer.eos_token_id]
    assert renderer.decode_response(ids) == " a"
    assert renderer.decode_response([tokenizer.bos_token_id, *ids]) == " a"
    assert renderer.decode_response([]) == ""


@pytest.mark.parametrize(("template", "before"), [(LLAMA2, " "), (CHATML, "")])
def test_spaces_survive_a_tokenizer_that_adds_and_drops_the_first(template, before):
    tokenizer = make_metaspace_tokenizer(template)
    renderer = make_renderer(tokenizer)
    prompt, text = user("the cat sat"), "the dog ran"
    response = renderer.render_response(text)
    ids = renderer.render_prompt(prompt, 100) + response
    full = template_text(tokenizer, (*prompt, Turn("assistant", text))).rstrip()
    assert list(ids) == tokenizer(full, add_special_tokens=False).input_ids
    assert renderer.decode_response(response).rstrip() == before + text


# --------------------------------------------------------------------------- truncation

CONVERSATION = (
    Turn("system", "the dog ran away " * 2),
    *user(
        *(f"turn {i} the cat sat on the mat " * 3 for i in range(6)), "what is two plus two? " * 8
    ),
)


@pytest.mark.parametrize("name", ["none", "chatml", "bos twice", "plain"])
def test_truncation_keeps_the_end_and_the_structure_at_every_length(name):
    template, options = TEMPLATES[name]
    tokenizer = make_tokenizer(template, **options)
    renderer = make_renderer(tokenizer)
    shortest = len(renderer.render_prompt((Turn("user", ""),), 100))
    total = len(renderer.render_prompt(CONVERSATION, 10_000))
    header = template_text(tokenizer, (Turn("user", "SPLIT"),), True).partition("SPLIT")[2]
    lengths, before = [], ()
    tried = [*range(shortest, total, 3), total]
    for max_length in tried:
        turns = renderer.truncate_turns(CONVERSATION, max_length)
        ids = renderer.render_prompt(CONVERSATION, max_length)
        assert len(ids) <= max_length
        assert ids == renderer.render_prompt(turns, 10_000)
        assert decode(tokenizer, ids).endswith(header)
        # The last turn goes last, from its beginning; whole turns before it from the oldest.
        assert CONVERSATION[-1].content.endswith(turns[-1].content)
        if turns[-1] != CONVERSATION[-1]:
            assert len(turns) == 1
        without_system = [turn for turn in turns if turn.role != "system"]
        assert without_system[0].role == "user"
        if len(turns) > 1:
            assert without_system == list(CONVERSATION[-len(without_system) :])
            assert turns[0] == CONVERSATION[0]
        assert sum(len(t.content) for t in turns) >= sum(len(t.content) for t in before)
        before = turns
        lengths.append(max_length - len(ids))
    assert before == CONVERSATION
    # While only the last turn is cut, no more than a token or two are given away.
    single = [slack for slack, size in zip(lengths, tried, strict=True) if size < 40]
    assert max(single) <= 3


def test_an_exchange_is_dropped_whole_so_that_roles_go_on_alternating():
    renderer = make_renderer(make_tokenizer(STRICT))
    total = len(renderer.render_prompt(CONVERSATION, 10_000))
    turns = renderer.truncate_turns(CONVERSATION, total - 1)
    assert turns == (CONVERSATION[0], *CONVERSATION[3:])


def test_the_system_turn_outlives_the_exchanges_but_not_the_question():
    renderer = make_renderer(make_tokenizer(CHATML))
    with_system = (CONVERSATION[0], CONVERSATION[-1])
    size = len(renderer.render_prompt(with_system, 10_000))
    assert renderer.truncate_turns(CONVERSATION, size) == with_system
    assert renderer.truncate_turns(CONVERSATION, size - 1) == CONVERSATION[-1:]


def test_any_content_is_cut_to_fit_and_between_characters():
    generator = random.Random(0)
    renderer = make_renderer(make_tokenizer(CHATML))
    contents = ["".join(generator.choices("ab \n.🙂日é", k=k)) for k in range(1, 120)]
    for content in contents:
        max_length = generator.randint(15, 60)
        [turn] = renderer.truncate_turns((Turn("user", content),), max_length)
        assert len(renderer.render_prompt((turn,), 10_000)) <= max_length
        assert content.endswith(turn.content)


def test_a_length_below_the_empty_template_is_an_error():
    renderer = make_renderer(make_tokenizer(CHATML))
    shortest = len(renderer.render_prompt((Turn("user", ""),), 100))
    assert len(renderer.render_prompt(CONVERSATION, shortest)) == shortest
    message = rf"got {shortest - 1}, .*has {shortest} tokens.*allowed: {shortest} or more"
    with pytest.raises(ConfigError, match=message):
        renderer.render_prompt(CONVERSATION, shortest - 1)


# --------------------------------------------------------------------------- loading, identity


def test_equal_renderers_have_equal_fingerprints(tmp_path):
    tokenizer = make_tokenizer(CHATML)
    tokenizer.save_pretrained(tmp_path)
    prints = {
        "itself": make_renderer(tokenizer).fingerprint,
        "template": make_renderer(make_tokenizer(BOS_CHATML)).fingerprint,
        "bos": make_renderer(make_tokenizer(None, adds_bos=True)).fingerprint,
        "no bos": make_renderer(make_tokenizer(None)).fingerprint,
        "vocabulary": make_renderer(make_tokenizer(CHATML, special=SPECIAL[:2])).fingerprint,
    }
    assert len(set(prints.values())) == len(prints)
    assert make_renderer(load_tokenizer(str(tmp_path))).fingerprint == prints["itself"]
