import errno
import os

import pytest

from halos_jax import storage
from halos_jax.storage import WorkdirError


def write(folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("x")


def test_remove_partials_takes_nothing_else(tmp_path):
    for name in ("samples.jsonl.partial", "samples.jsonl", "partial"):
        write(tmp_path, name)
    write(tmp_path / "final.partial", "config.json")
    write(tmp_path / "final", "config.json")
    elsewhere = tmp_path / "final"
    (tmp_path / "link.partial").symlink_to(elsewhere)
    storage.remove_partials(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final", "partial", "samples.jsonl"]
    assert (elsewhere / "config.json").exists()


def test_numbers_that_json_lacks_are_refused(tmp_path):
    with pytest.raises(ValueError):
        storage.write_json_atomic(tmp_path / "x.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "code, advice",
    [
        (errno.ENOSPC, "free some space"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EROFS, "read-only"),
        (errno.ENXIO, "check the disk"),
    ],
)
def test_an_os_error_names_the_path_and_what_to_do(code, advice):
    with pytest.raises(WorkdirError, match=advice) as error, storage.explain_os_errors("runs/a"):
        raise OSError(code, os.strerror(code))
    assert "'runs/a'" in str(error.value) and os.strerror(code) in str(error.value)
    with pytest.raises(WorkdirError, match="runs/a/b"), storage.explain_os_errors("runs/a"):
        raise OSError(code, os.strerror(code), "runs/a/b")


def test_only_errors_of_the_workdir_are_explained_in_a_run(tmp_path):
    for error in (
        OSError(errno.EACCES, "denied", str(tmp_path / "run" / "x")),
        OSError(errno.ENOSPC, "full"),
        OSError(errno.ENOSPC, "full", 7),
    ):
        with pytest.raises(WorkdirError), storage.explain_run_errors(tmp_path / "run"):
            raise error
    for error in (
        FileNotFoundError(errno.ENOENT, "missing", str(tmp_path / "rewards.txt")),
        FileNotFoundError(errno.ENOENT, "missing", str(tmp_path / "run2" / "x")),
        ConnectionError(errno.ECONNREFUSED, "refused"),
    ):
        with pytest.raises(type(error)), storage.explain_run_errors(tmp_path / "run"):
            raise error


def test_a_relative_workdir_is_recognised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WorkdirError), storage.explain_run_errors("run"):
        open(tmp_path / "run" / "missing" / "x", "w")  # noqa: SIM115


def test_hash_and_atomic_write_agree_with_what_is_read(tmp_path):
    path = tmp_path / "a" / "x.json"
    storage.write_json_atomic(path, {"b": 1})
    before = storage.hash_file(path)
    storage.write_json_atomic(path, {"b": 2})
    assert path.read_text() == '{\n  "b": 2\n}\n' and storage.hash_file(path) != before
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]
