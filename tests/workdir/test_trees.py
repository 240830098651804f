"""An exported folder: what is damaged, missing or added in it."""

import pytest

from halos_jax.workdir import trees


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "final" / "adapter").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "adapter/adapter_config.json"):
        (tmp_path / "final" / name).write_text("content")
    return tmp_path / "final"


def test_what_is_not_as_it_was_written_is_named(folder):
    files = trees.describe_tree(folder)
    assert list(files) == ["adapter/adapter_config.json", "config.json", "model.safetensors"]
    assert trees.find_wrong(folder, files) == []
    (folder / "README.md").write_text("mine")  # nobody takes it for a part of the model
    assert trees.find_wrong(folder, files) == []
    (folder / "config.json").write_text("CONTENT")
    (folder / "adapter" / "adapter_config.json").unlink()
    (folder / "model.safetensors").write_text("content and more")
    (folder / "added_tokens.json").write_text("{}")
    assert trees.find_wrong(folder, files) == [
        "final/adapter/adapter_config.json is missing",
        "final/config.json is damaged",
        "final/model.safetensors has grown",
        "final/added_tokens.json was added",
    ]


def test_what_no_reader_takes_may_be_added(folder):
    files = trees.describe_tree(folder)
    (folder / "onnx").mkdir()
    (folder / "additional_chat_templates").mkdir()
    for name in ("notes.txt", "onnx/config.json", "onnx/tokenizer.json", "eval_results.json"):
        (folder / name).write_text("mine")
    assert trees.find_wrong(folder, files) == []
    read = (
        "adapter/tokenizer.json",
        "additional_chat_templates/rag.jinja",
        "chat_template.jinja",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "vocab.txt",
    )
    for name in read:
        (folder / name).write_text("{}")
    assert trees.find_wrong(folder, files) == [f"final/{name} was added" for name in read]


def test_a_large_file_is_looked_at_by_blocks_and_whole_when_asked(folder):
    path = folder / "model.safetensors"
    with open(path, "wb") as file:
        file.truncate(1 << 26)
    files = trees.describe_tree(folder)
    assert {"size", "blocks", "whole"} == files["model.safetensors"].keys()
    with open(path, "r+b") as file:
        file.seek((1 << 20) * 9 + 500_000)
        file.write(b"1")
    assert trees.find_wrong(folder, files) == []
    assert trees.find_wrong(folder, files, whole=True) == ["final/model.safetensors is damaged"]
    with open(path, "r+b") as file:
        file.write(b"1")
    assert trees.find_wrong(folder, files) == ["final/model.safetensors is damaged"]
