"""Folders of models: whole or absent, readable, and never in the place of somebody else's."""

import json
import logging
import os

import pytest

from halos_jax import storage
from halos_jax.models.files import folders
from halos_jax.models.files.folders import MARK, replace_folder
from halos_jax.models.hf.families import ModelError


def export(folder, text="new"):
    with replace_folder(folder) as partial:
        (partial / "config.json").write_text(text)


def list_names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole_and_replaces_an_older_export(tmp_path, caplog):
    folder = tmp_path / "deep" / "model"
    with replace_folder(folder) as partial:
        assert not folder.exists() and partial.parent == folder.parent
        (partial / "config.json").write_text("first")
    assert list_names(folder) == ["config.json", MARK]
    assert json.loads((folder / MARK).read_text()) == {"made_by": "halos_jax"}
    with caplog.at_level(logging.WARNING):
        export(folder)
    assert "replacing the model that stood there" in caplog.text
    assert (folder / "config.json").read_text() == "new"
    assert list_names(folder.parent) == ["model"]


def test_what_users_have_in_an_export_is_kept_by_the_next(tmp_path, caplog):
    folder = tmp_path / "final"
    export(folder, "old")
    (folder / "model-00001-of-00002.safetensors").write_text("of the old one")
    (folder / "notes").mkdir()
    for name in ("eval.csv", "notes/run.md", "README.md"):
        (folder / name).write_text(name)
    with caplog.at_level(logging.INFO), replace_folder(folder) as partial:
        (partial / "config.json").write_text("new")
        (partial / "README.md").write_text("of the export")
    assert list_names(folder) == ["README.md", "config.json", "eval.csv", MARK, "notes"]
    assert (folder / "notes" / "run.md").read_text() == "notes/run.md"
    assert (folder / "README.md").read_text() == "of the export"
    assert "kept 2 file(s) that no export has written: eval.csv, notes/run.md" in caplog.text


def test_links_that_users_have_in_an_export_are_kept_wherever_they_lead(tmp_path):
    folder, other = tmp_path / "final", tmp_path / "plots"
    export(folder, "old")
    other.mkdir()
    (folder / "plots").symlink_to(other)
    (folder / "latest.csv").symlink_to(tmp_path / "gone.csv")
    export(folder, "new")
    assert (folder / "plots").readlink() == other
    assert (folder / "latest.csv").readlink() == tmp_path / "gone.csv"


def test_a_failure_leaves_what_there_was(tmp_path):
    with pytest.raises(ZeroDivisionError), replace_folder(tmp_path / "model") as partial:
        (partial / "config.json").write_text("half")
        raise ZeroDivisionError
    assert list_names(tmp_path) == []
    export(tmp_path / "model", "old")
    with pytest.raises(KeyboardInterrupt), replace_folder(tmp_path / "model"):
        raise KeyboardInterrupt
    assert list_names(tmp_path) == ["model"]
    assert (tmp_path / "model" / "config.json").read_text() == "old"


def test_what_users_have_beside_the_target_stays(tmp_path):
    """Folders of these names were deleted by the exports of earlier versions."""
    export(tmp_path / "out", "old")
    for name in ("out.old", "out.partial", ".out.partial", ".out.0123abcd.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text(name)
    # A copy that somebody made of an export is somebody's.
    export(tmp_path / "out.keep", "kept")
    (tmp_path / "out.keep").rename(tmp_path / ".out.old")
    before = list_names(tmp_path)
    export(tmp_path / "out")
    assert list_names(tmp_path) == before
    assert (tmp_path / "out.old" / "thesis.tex").read_text() == "out.old"


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    export(folder, "old")
    with monkeypatch.context() as killed:
        killed.setattr(folders.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(ZeroDivisionError), replace_folder(folder) as partial:
            (partial / "weights").write_text("half")
            raise ZeroDivisionError
        export(folder, "middle")
    left = [name for name in list_names(tmp_path) if name != "out"]
    assert [name.rpartition(".")[2] for name in left].count("partial") == 1 and len(left) == 2
    export(tmp_path / "outer")  # another target's are not touched
    assert set(left) < set(list_names(tmp_path))
    export(folder)
    assert list_names(tmp_path) == ["out", "outer"]

    # Killed between the two renamings: the older model comes back before anything else happens.
    folder.rename(tmp_path / ".out.89abcdef.old")
    with pytest.raises(ZeroDivisionError), replace_folder(folder):
        assert (folder / "config.json").read_text() == "new"
        raise ZeroDivisionError
    assert list_names(tmp_path) == ["out", "outer"]


def test_files_are_synced_before_the_renaming(tmp_path, monkeypatch):
    folder, synced = tmp_path / "model", []
    monkeypatch.setattr(storage, "sync_file", lambda path: synced.append((path, folder.exists())))
    with replace_folder(folder) as partial:
        (partial / "adapter").mkdir()
        (partial / "adapter" / "weights").write_text("x")
    before = {path for path, renamed in synced if not renamed}
    inside = ("adapter", "adapter/weights", MARK)
    assert before == {partial, *(partial / name for name in inside)}
    assert synced[-1] == (tmp_path, True)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_every_file_is_as_readable_as_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        with replace_folder(tmp_path / "model") as partial:
            (partial / "adapter").mkdir(mode=0o700)
            os.close(os.open(partial / "adapter" / "weights", os.O_CREAT | os.O_WRONLY, 0o600))
            (partial / "config.json").write_text("{}")
    finally:
        os.umask(before)
    for path in (tmp_path / "model", *(tmp_path / "model").rglob("*")):
        full = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == full & ~umask, path


def test_folders_that_no_export_made_are_not_replaced(tmp_path):
    other = tmp_path / "thesis"
    other.mkdir()
    export(other)  # an empty one may be taken
    for name, file in (("a", "chapter.tex"), ("b", "config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("x")
        with pytest.raises(ModelError, match=r"holds files but no halos_jax\.json"):
            export(tmp_path / name)
        assert list_names(tmp_path / name) == [file]
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match=r"file: is a file; give a folder"):
        export(tmp_path / "file")
    assert list_names(tmp_path) == ["a", "b", "file", "thesis"]


def test_a_link_is_followed(tmp_path):
    store = tmp_path / "store"
    export(store / "model", "old")
    (tmp_path / "model").symlink_to(store / "model")
    (tmp_path / "new").symlink_to(store / "new")  # there is nothing yet
    for name in ("model", "new"):
        export(tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert (store / name / "config.json").read_text() == "new"
    assert list_names(store) == ["model", "new"]
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ModelError, match=r"loop: is a link that leads nowhere"):
        export(tmp_path / "loop")
