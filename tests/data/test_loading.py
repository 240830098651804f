"""What a folder's tokenizer, template and end tokens make of a renderer; bad ones are one error."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from halos_jax.config import ConfigError
from halos_jax.data.chat import make_renderer
from halos_jax.data.loading import load_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} ###\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_tokenizer(template=CHATML, special=("<s>", "</s>", "<|im_start|>", "<|im_end|>")):
    """Return a tokenizer of the bytes alone, with special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({text: number for number, text in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(special))
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


def test_loading_takes_the_template_of_a_file(tmp_path):
    make_tokenizer(CHATML).save_pretrained(tmp_path)
    (tmp_path / "other.jinja").write_text(PLAIN, encoding="utf-8")
    assert load_tokenizer(str(tmp_path)).chat_template == CHATML
    loaded = load_tokenizer(str(tmp_path), str(tmp_path / "other.jinja"))
    assert make_renderer(loaded).end_marker == " ###"
    with pytest.raises(ConfigError, match=r"model.chat_template: got '.*none.jinja', allowed"):
        load_tokenizer(str(tmp_path), str(tmp_path / "none.jinja"))


def test_loading_what_is_not_there_is_one_clear_error(tmp_path):
    with pytest.raises(ConfigError, match=r"model.tokenizer: got '', allowed"):
        load_tokenizer("")
    with pytest.raises(ConfigError, match="no such folder"):
        load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"model.tokenizer: got .*allowed: a folder or hub id"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(ConfigError, match=r"model.tokenizer: got .*allowed: a folder or hub id"):
        load_tokenizer(str(tmp_path))
