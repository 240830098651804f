"""What is served ends and is rendered as what was trained."""

import json
import logging

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from halos_jax.data.chat.renderer import make_renderer
from halos_jax.policies import serving
from halos_jax.types import Turn

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENS = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot|>")
BOS, EOS, START, END, EOT = range(256, 261)
QUESTION = [{"role": "user", "content": "hi  there\n"}]


def make_tokenizer(template=CHATML, *, tokens=TOKENS, adds_bos=False):
    """Return a tokenizer of the bytes alone, with special tokens behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({text: number for number, text in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    if adds_bos:
        core.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", BOS)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


def write(folder, name, value):
    (folder / name).write_text(json.dumps(value))


def read(folder, name):
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize(
    ("generation", "config", "expected", "expected_config"),
    [
        # A base model's own token stays the first; the marker that was learnt comes behind it.
        ({"eos_token_id": EOS, "top_p": 0.8}, EOS, [EOS, END], [EOS, END]),
        ({"eos_token_id": [EOT, EOS]}, EOS, [EOT, EOS, END], [EOT, EOS, END]),
        ({"eos_token_id": EOS, "_from_model_config": True}, EOS, [EOS, END], [EOS, END]),
        ({"eos_token_id": [END, EOS]}, [EOS, END], [END, EOS], [EOS, END]),
        ({"eos_token_id": [END, EOS]}, None, [END, EOS], [END, EOS]),
        ({"do_sample": True}, EOS, [EOS, END], [EOS, END]),
        # Without the file transformers takes all from config.json, and would go on with it.
        (None, EOS, [EOS, END], [EOS, END]),
        (None, None, [EOS, END], [EOS, END]),
        (None, [END, EOS], None, [END, EOS]),
    ],
)
def test_the_tokens_that_end_an_answer(tmp_path, generation, config, expected, expected_config):
    write(tmp_path, "config.json", {"model_type": "llama", "eos_token_id": config})
    if generation is not None:
        write(tmp_path, "generation_config.json", generation)
    serving.write_stops(tmp_path, make_renderer(make_tokenizer()))
    if expected is None:
        assert not (tmp_path / "generation_config.json").exists()
    else:
        made = read(tmp_path, "generation_config.json")
        kept = {"bos_token_id": BOS} if generation is None else dict(generation)
        kept.pop("_from_model_config", None)
        assert made == kept | {"eos_token_id": expected}
        assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == expected
    assert read(tmp_path, "config.json")["eos_token_id"] == expected_config


def test_files_that_say_it_all_are_left_as_they_are(tmp_path):
    texts = {
        "config.json": f'{{"eos_token_id":[{END},{EOS}]}}',
        "generation_config.json": f'{{ "eos_token_id":[{EOS}, {END}] }}',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    serving.write_stops(tmp_path, make_renderer(make_tokenizer()))
    assert {name: (tmp_path / name).read_text() for name in texts} == texts


def test_a_marker_that_is_no_token_is_a_stop_string_and_said(tmp_path, caplog):
    renderer = make_renderer(make_tokenizer(tokens=TOKENS[:2]))
    assert renderer.stop_strings == ("<|im_end|>",)
    write(tmp_path, "config.json", {"eos_token_id": EOS})
    with caplog.at_level(logging.INFO):
        serving.write_stops(tmp_path, renderer)
    made = {"bos_token_id": BOS, "eos_token_id": EOS, "stop_strings": ["<|im_end|>"]}
    assert read(tmp_path, "generation_config.json") == made
    assert "answers end with the text '<|im_end|>', which is no token" in caplog.text
    write(tmp_path, "generation_config.json", made | {"stop_strings": "###"})
    serving.write_stops(tmp_path, renderer)
    assert read(tmp_path, "generation_config.json")["stop_strings"] == ["###", "<|im_end|>"]


def test_a_damaged_file_is_written_anew(tmp_path, caplog):
    write(tmp_path, "config.json", {"eos_token_id": EOS, "pad_token_id": 0})
    (tmp_path / "generation_config.json").write_text("{")
    serving.write_stops(tmp_path, make_renderer(make_tokenizer()))
    made = {"bos_token_id": BOS, "eos_token_id": [EOS, END], "pad_token_id": 0}
    assert read(tmp_path, "generation_config.json") == made
    assert "generation_config.json: cannot be read" in caplog.text


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("older", [False, True])
def test_the_default_template_is_served_as_it_was_trained(tmp_path, adds_bos, older):
    tokenizer = make_tokenizer(None, adds_bos=adds_bos)
    tokenizer.save_pretrained(tmp_path)
    if older:  # a template that was not used, in the files of earlier versions
        settings = read(tmp_path, "tokenizer_config.json")
        write(tmp_path, "tokenizer_config.json", settings | {"chat_template": "old"})
        write(tmp_path, "chat_template.json", {"chat_template": "old"})
    renderer = make_renderer(tokenizer)
    serving.write_template(tmp_path, renderer.template)
    served = AutoTokenizer.from_pretrained(tmp_path)
    turns = tuple(Turn(**turn) for turn in QUESTION)
    expected = renderer.render_prompt(turns, 100)
    ids = served.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    assert tuple(ids) == expected and (expected[0] == BOS) == adds_bos
    answer = [*QUESTION, {"role": "assistant", "content": "four"}]
    whole = served.apply_chat_template(answer, return_dict=False)
    assert tuple(whole) == expected + renderer.render_response("four")
    texts = [path.read_text() for path in tmp_path.glob("*.j*")]
    assert len(texts) == 3 + older and not any('"old"' in text for text in texts)
    assert make_renderer(served).fingerprint == renderer.fingerprint


def test_an_adapter_gets_what_its_base_lacks_but_no_tokenizer(tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer_config.json"):
        (tmp_path / name).write_text(name)
    serving.copy_to_adapter(tmp_path, adapter)
    assert {path.name: path.read_text() for path in adapter.iterdir()} == {
        name: name for name in ("generation_config.json", "chat_template.jinja")
    }
    (tmp_path / "chat_template.jinja").unlink()
    (adapter / "chat_template.jinja").unlink()
    serving.copy_to_adapter(tmp_path, adapter)
    assert not (adapter / "chat_template.jinja").exists()


@pytest.mark.parametrize(
    ("template", "setting", "mark", "said"),
    [
        (CHATML, "auto", "template_end", ""),
        (CHATML, "template_end", "template_end", ""),
        (CHATML, "end_of_turn", "end_of_turn", r"writes '\n' at a conversation's end"),
        (CHATML.replace("<|im_end|>\n", "<|im_end|>"), "auto", "end_of_turn", ""),
        (CHATML.replace("<|im_end|>", ""), "auto", "end_of_turn", "writes no end marker at"),
    ],
)
def test_a_classifier_says_where_it_was_trained_to_be_read(
    tmp_path, template, setting, mark, said, caplog
):
    write(tmp_path, "config.json", {"model_type": "llama"})
    serving.write_place(tmp_path, make_renderer(make_tokenizer(template)), setting)
    assert read(tmp_path, "config.json") == {"model_type": "llama", "halos_jax_read_at": mark}
    assert said in caplog.text and bool(caplog.text) == bool(said)
