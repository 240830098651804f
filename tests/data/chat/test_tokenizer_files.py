"""The door of a tokenizer: each field of a wrong type is one message with its file; what differs
from the files is said; end tokens come from where they stand."""

import json

import pytest

from halos_jax.config import ConfigError
from halos_jax.data.chat import tokenizer_files
from halos_jax.data.chat.loading import load_renderer
from halos_jax.data.chat.tokenizer_files import open_tokenizer, read_eos
from tests.data.chat.test_loading import CHATML, make_tokenizer

WRONG = [True, 3, -1, 1.5, float("nan"), 10**30, "x", [], [1], [[]], {}, {"a": 1}, {"content": 3}]


SEVEN = {"eos_token_id": [7]}


@pytest.fixture
def folder(tmp_path):
    """Write a tokenizer; return its folder."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = CHATML
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").unlink()
    return tmp_path


def edit(file, **fields):
    old = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(old | fields))


def test_a_whole_tokenizer_is_read_without_a_word(folder, caplog):
    tokenizer = open_tokenizer(str(folder))
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    assert (tokenizer.eos_token, tokenizer.chat_template) == ("</s>", CHATML)
    assert caplog.records == []


def test_every_field_of_a_wrong_type_is_named(folder):
    for name, fields in tokenizer_files._FILES.items():
        if name == "config.json":
            continue
        whole = (folder / name).read_text() if (folder / name).exists() else ""
        for field, (_, fits) in fields.items():
            for value in WRONG:
                edit(folder / name, **{field: value})
                if fits(value):
                    continue
                with pytest.raises(ConfigError) as caught:
                    open_tokenizer(str(folder))
                assert f"{folder / name}: {field}: got " in str(caught.value)
                assert "\n" not in str(caught.value)
            (folder / name).write_text(whole or "{}")
    open_tokenizer(str(folder))


def test_keys_of_tokens_that_nobody_reads_are_said(folder, caplog):
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole["added_tokens"][0] |= {"speciall": True}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    edit(
        folder / "tokenizer_config.json",
        eos_token={"content": "</s>", "__type": "AddedToken", "lstript": True},
    )
    open_tokenizer(str(folder))
    first, second = sorted(one for one in caplog.messages if "keys of tokens" in one)
    assert "tokenizer.json: keys of tokens that are not read: 'speciall'; the known" in first
    assert "tokenizer_config.json: keys of tokens that are not read: 'lstript';" in second


def test_added_tokens_are_a_list(folder):
    edit(folder / "tokenizer.json", added_tokens={"id": 1, "content": "x"})
    with pytest.raises(
        ConfigError, match=r"tokenizer\.json: added_tokens: got .*a list of objects"
    ):
        open_tokenizer(str(folder))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b"[]", "got list, allowed: an object"),
        (b'"x"', "got str, allowed: an object"),
        (b"[" * 9000 + b"]" * 9000, "nested deeper than 64"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
        (b"\xff", "can't decode byte"),
    ],
)
def test_a_file_that_is_no_object_is_named(folder, name, text, message):
    (folder / name).write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        open_tokenizer(str(folder))
    assert f"{folder / name}: " in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda read: read["model"]["vocab"].update(a="x"), "model.vocab: got {"),
        (lambda read: read["model"]["vocab"].update(a=-1), "model.vocab: got {"),
        (lambda read: read["model"]["vocab"].update(a=True), "model.vocab: got {"),
        (lambda read: read["model"]["vocab"].update(new=3), "model.vocab: got 3 for "),
        (lambda read: read["model"].update(vocab=[1]), "model.vocab: got [1], allowed: pairs of"),
        (lambda read: read.update(model=None), "model.vocab: got None, allowed: an object"),
        (lambda read: read.update(added_tokens={"a": 1}), "added_tokens: got {'a': 1}, allowed"),
        (lambda read: read["added_tokens"][0].update(id="0"), "added_tokens: got {"),
        (lambda read: read["added_tokens"][0].update(content=None), "added_tokens: got {"),
        (lambda read: read["model"].update(type="Spiral"), "needs no remote code; "),
        (lambda read: read.update(pre_tokenizer={"type": 3}), "needs no remote code; "),
        (lambda read: read["model"].update(merges=[["q", "no such"]]), "needs no remote code; "),
    ],
)
def test_a_broken_tokenizer_json_is_one_message(folder, change, message):
    read = json.loads((folder / "tokenizer.json").read_text())
    change(read)
    (folder / "tokenizer.json").write_text(json.dumps(read))
    with pytest.raises(ConfigError) as caught:
        open_tokenizer(str(folder))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_template_that_is_no_text_is_named(folder):
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe{{ x }}")
    with pytest.raises(ConfigError, match=r"jinja: got a file that cannot be read .*UTF-8"):
        open_tokenizer(str(folder))


def test_an_empty_template_is_named_and_so_is_a_name_that_is_nearly_one(folder, caplog):
    edit(folder / "tokenizer_config.json", eos_token=None, eos_tokens="</s>", backend="x")
    edit(folder / "generation_config.json", eos_token_ids=3, bos_token_id=1)
    read_eos(str(folder))
    open_tokenizer(str(folder))
    said = {record.message for record in caplog.records}
    assert said == {
        f"{folder}/tokenizer_config.json: 'eos_tokens' is not read; did you mean 'eos_token'?",
        f"{folder}/generation_config.json: 'eos_token_ids' is not read; did you mean "
        "'eos_token_id'?",
    }
    (folder / "chat_template.jinja").write_text(" \n")
    with pytest.raises(ConfigError, match=r"chat_template.jinja: got an empty file, allowed"):
        open_tokenizer(str(folder))


def test_what_is_read_otherwise_than_it_stands_is_said(folder, caplog):
    read = json.loads((folder / "tokenizer.json").read_text())
    read["added_tokens"][3]["id"] = 999
    (folder / "tokenizer.json").write_text(json.dumps(read))
    edit(folder / "tokenizer_config.json", eos_token="<|end|>")
    open_tokenizer(str(folder))
    said = " ".join(record.message for record in caplog.records)
    assert "1 tokens have other ids than in tokenizer.json: '<|im_end|>' has 259, there 999" in said
    assert "eos_token: '<|end|>' is no token of tokenizer.json: it is added as a new one" in said


# --------------------------------------------------------------------------- end tokens


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, ()),
        ({"generation_config.json": {"eos_token_id": [5, 6]}}, (5, 6)),
        ({"generation_config.json": {"eos_token_id": 5}, "config.json": {"eos_token_id": 7}}, (5,)),
        ({"generation_config.json": {"top_p": 0.9}, "config.json": {"eos_token_id": 7}}, (7,)),
        (
            {
                "generation_config.json": {"eos_token_id": None},
                "config.json": {"eos_token_id": [7]},
            },
            (7,),
        ),
        ({"generation_config.json": {"eos_token_id": []}, "config.json": SEVEN}, (7,)),
        ({"config.json": {"text_config": {"eos_token_id": 8}}}, (8,)),
        ({"config.json": {"eos_token_id": [1], "text_config": {"eos_token_id": 8}}}, (1,)),
        ({"config.json": {"text_config": 3}}, ()),
    ],
)
def test_end_tokens_are_config_jsons_where_no_other_has_any(folder, files, expected):
    for name, fields in files.items():
        (folder / name).write_text(json.dumps(fields))
    assert read_eos(str(folder)) == expected
    assert load_renderer(str(folder)).stop_ids >= {*expected}


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("value", [True, "2", 1.0, -1, [True], [[1]], {"a": 1}, [None], 10**12])
def test_an_end_token_that_is_no_id_is_named(folder, name, value):
    (folder / name).write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ConfigError, match=rf"{name}: eos_token_id: got .*, allowed: a token id"):
        read_eos(str(folder))


def test_an_end_token_inside_that_is_no_id_is_named(folder):
    (folder / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": "x"}}))
    with pytest.raises(ConfigError, match=r"config.json: text_config: eos_token_id: got 'x', allo"):
        read_eos(str(folder))


# --------------------------------------------------------------------------- packages


@pytest.mark.parametrize(
    ("start", "absent", "packages"),
    [
        (b"\n\x0e\n\x05<unk>\x15", {"sentencepiece", "google.protobuf"}, "sentencepiece protobuf"),
        (b"\n\x0e\n\x05<unk>\x15", {"sentencepiece"}, "sentencepiece"),
        (b"IQ== 0\nIg== 1\n", {"tiktoken"}, "tiktoken"),
    ],
)
def test_a_tokenizer_model_names_the_package_that_reads_it(
    tmp_path, monkeypatch, start, absent, packages
):
    (tmp_path / "tokenizer.model").write_bytes(start)
    monkeypatch.setattr(tokenizer_files, "_is_installed", lambda module: module not in absent)
    with pytest.raises(ConfigError) as caught:
        open_tokenizer(str(tmp_path))
    assert str(caught.value).endswith(f"pip install {packages}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        open_tokenizer(str(tmp_path))
    assert "pip install" not in str(caught.value)


def test_a_tokenizer_of_sentencepiece_alone_is_read(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text"
    text.write_text("\n".join(f"the {n} quick brown foxes jump over {n * 7}" for n in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=60,
        model_type="bpe",
        byte_fallback=False,
        character_coverage=1.0,
    )
    edit(tmp_path / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    tokenizer = open_tokenizer(str(tmp_path))
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    line = "the quick brown foxes jump"
    found = tokenizer(line, add_special_tokens=False)["input_ids"]
    assert found == model.encode(line)
