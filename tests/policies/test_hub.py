"""A push to the Hugging Face Hub, with a stand-in for its client."""

import logging
import types

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from halos_jax.config import Config, ExportConfig
from halos_jax.policies import hub

WANTED = ExportConfig(push_to_hub="me/model")


class Api:
    """Stands for HfApi: notes what it is asked to do."""

    def __init__(self, *, private=True, error=None):
        self.calls, self.private, self.error = [], private, error

    def create_repo(self, name, **how):
        self.calls.append(("create", name, how))
        return f"https://huggingface.co/{name}"

    def repo_info(self, name):
        return types.SimpleNamespace(private=self.private)

    def upload_folder(self, **how):
        if self.error is not None:
            raise self.error
        self.calls.append(("upload", how["repo_id"], how["folder_path"]))
        self.deleted = how["delete_patterns"]


def test_an_export_is_pushed_to_a_private_repository(tmp_path):
    api = Api()
    assert hub.push(tmp_path, WANTED, api=api)
    assert api.calls == [
        ("create", "me/model", {"private": True, "exist_ok": True}),
        ("upload", "me/model", tmp_path),
    ]
    open_api = Api(private=False)
    assert hub.push(tmp_path, ExportConfig(push_to_hub="me/model", private=False), api=open_api)
    assert open_api.calls[0][2]["private"] is False


def test_no_weights_of_an_earlier_push_stay_beside_the_new_ones(tmp_path):
    api = Api()
    assert hub.push(tmp_path, WANTED, api=api)
    weights = ["model.safetensors", "model-00001-of-00002.safetensors"]
    weights += ["model.safetensors.index.json"]
    others = ["adapter/adapter_model.safetensors", "README.md", "mine.safetensors", "config.json"]
    found = filter_repo_objects([*weights, *others], allow_patterns=api.deleted)
    assert list(found) == weights


def test_nothing_is_pushed_unless_asked_for(tmp_path):
    api = Api()
    assert not hub.push(tmp_path, ExportConfig(), api=api) and api.calls == []


def test_what_is_to_be_private_is_not_pushed_into_a_public_repository(tmp_path, caplog):
    api = Api(private=False)
    assert not hub.push(tmp_path, WANTED, api=api)
    assert [call[0] for call in api.calls] == ["create"]
    assert "is public" in caplog.text and "export.private=false" in caplog.text


def test_a_failed_push_says_what_to_do_and_never_the_token(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "s3cret-token")
    error = ConnectionError("401 for s3cret-token\nand hf_abcdefGHIJ12345 at https://x")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with caplog.at_level(logging.INFO):
        assert not hub.push(tmp_path, WANTED, api=Api(error=error))
    assert f"`hf upload me/model {tmp_path} --private`" in caplog.text
    assert "ConnectionError: 401 for hf_*** and hf_*** at https://x" in caplog.text
    assert "s3cret" not in caplog.text and "abcdef" not in caplog.text
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"push_to_hub": "model"}, "'OWNER/NAME'"),
        ({"push_to_hub": "a/b/c"}, "'OWNER/NAME'"),
        ({"push_to_hub": "me/a b"}, "'OWNER/NAME'"),
        ({"push_to_hub": "https://huggingface.co/me/x"}, "'OWNER/NAME'"),
        ({"license": "mit\nx: y"}, "export.license: got"),
    ],
)
def test_names_that_cannot_be_are_refused_before_the_run(fields, said):
    [line] = hub.find_problems(Config(export=ExportConfig(**fields)))
    assert said in line


def test_a_task_without_a_model_pushes_nothing():
    for task, count in (("online", 0), ("sft", 0), ("export", 0), ("pipeline", 0), ("label", 1)):
        assert len(list(hub.find_problems(Config(task=task, export=WANTED)))) == count


def test_a_missing_token_is_said_at_the_start(caplog, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    hub.warn_of_no_token(ExportConfig())
    assert caplog.text == ""
    hub.warn_of_no_token(WANTED)
    assert "no token" in caplog.text and "hf auth login" in caplog.text
