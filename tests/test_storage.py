import errno
import hashlib
import os
import shutil

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


def test_a_folder_that_cannot_be_made_here_says_so():
    with (
        pytest.raises(WorkdirError, match=r"'/proc/foo': it cannot be created here; the file sys"),
        storage.explain_os_errors("/proc/foo"),
    ):
        os.mkdir("/proc/foo")
    missing = "the folder is missing; create it"
    with pytest.raises(WorkdirError, match=missing), storage.explain_os_errors("x"):
        os.listdir("/no/such/folder")


@pytest.fixture
def disk(monkeypatch, tmp_path):
    """Make every disk one with 3 MiB free."""
    free = shutil.disk_usage(tmp_path)._replace(free=3 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)


def test_a_full_disk_says_how_much_is_free(disk, tmp_path):
    with (
        pytest.raises(WorkdirError) as caught,
        storage.explain_os_errors(tmp_path / "absent" / "x"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "No space left on device (3.0 MiB free); the disk is full; free some" in str(
        caught.value
    )
    assert storage.describe_full(tmp_path, 6 * 2**30, "checkpoint 7") == (
        f"the disk of '{tmp_path}' is full: 3.0 MiB free, a checkpoint takes 6.0 GiB and stands "
        "beside the old one until it is whole; free some space and run the same command again "
        "(checkpoint 7 is safe)"
    )


def test_room_is_asked_for_before_it_is_needed(disk, tmp_path):
    storage.require_space(tmp_path / "run", 3 * 2**20, "a checkpoint")
    with pytest.raises(WorkdirError) as caught:
        storage.require_space(tmp_path / "run", 3 * 2**20 + 1, "a checkpoint")
    assert str(caught.value) == (
        f"workdir: the disk of '{tmp_path / 'run'}' has 3.0 MiB free, but a checkpoint takes "
        "3.0 MiB; free some space, or choose another folder (--config.workdir=DIR)"
    )


def test_an_error_that_hides_the_code_of_a_full_disk_is_known_by_its_text():
    hidden = ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [28]")
    outer = RuntimeError("could not save")
    outer.__cause__ = hidden
    for error in (hidden, outer, OSError(errno.EDQUOT, "x")):
        assert storage.says_full(error)
    for error in (ValueError("RESOURCE_EXHAUSTED: out of memory"), OSError(errno.EIO, "x")):
        assert not storage.says_full(error)


@pytest.mark.parametrize(
    "size, shown",
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**20, "1.0 MiB"), (2**30, "1.0 GiB")],
)
def test_sizes_for_people(size, shown):
    assert storage.format_size(size) == shown
    assert storage.format_size(5000 * 2**30) == "5,000.0 GiB"


def test_a_new_file_is_noted_with_its_hash_before_it_has_the_name(tmp_path):
    path, seen = tmp_path / "x", []
    path.write_bytes(b"old")

    def note(target, size, sha256):
        seen.append((target, size, sha256, path.read_bytes(), sorted(os.listdir(tmp_path))))

    with storage.replace_file(path, note=note) as file:
        for part in (b"ab", b"", b"c"):
            file.write(part)
    digest = hashlib.sha256(b"abc").hexdigest()
    assert seen == [(path, 3, digest, b"old", ["x", "x.partial"])]
    assert path.read_bytes() == b"abc" and os.listdir(tmp_path) == ["x"]
    assert storage.hash_file(path) == digest


@pytest.mark.parametrize("where", ["body", "note", "fsync", "replace"])
def test_a_file_that_was_not_finished_leaves_the_old_one(tmp_path, monkeypatch, where):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def fail(*_):
        raise OSError(errno.EIO, "gone")

    if where in ("fsync", "replace"):
        monkeypatch.setattr(os, where, fail)
    with (
        pytest.raises(OSError, match="gone"),
        storage.replace_file(path, note=fail if where == "note" else None) as file,
    ):
        file.write(b"new")
        if where == "body":
            fail()
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("function", ["write", "fsync"])
def test_lines_are_appended_whole_or_not_at_all(tmp_path, monkeypatch, function):
    path, write = tmp_path / "x", os.write
    storage.append_whole(path, b"one\n")

    def fail(file, data=b""):
        if function == "write":
            return write(file, data[:2])
        raise OSError(errno.EIO, "gone")

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        with pytest.raises(OSError):
            storage.append_whole(path, b"two\n")
    storage.append_whole(path, b"three\n")
    assert path.read_bytes() == b"one\nthree\n"


def test_what_is_appended_is_synced_once(tmp_path, monkeypatch):
    path, synced, fsync = tmp_path / "x", [], os.fsync
    path.touch()

    def record(descriptor):
        synced.append(os.fstat(descriptor).st_size)  # all of the data must be there before
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    storage.append_whole(path, b"one\n")
    assert synced == [4]
    with storage.open_append(path) as descriptor:
        os.write(descriptor, b"two\n")
        assert synced == [4]
    assert synced == [4, 8]


def test_a_tree_is_synced_with_the_names_in_it(tmp_path, monkeypatch):
    write(tmp_path / "a" / "b", "c")
    synced, fsync = [], os.fsync

    def record(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    storage.sync_tree(tmp_path / "a")
    assert synced == [str(tmp_path / name) for name in ("a/b", "a/b/c", "a")]


def test_a_file_system_that_cannot_sync_folders_is_used_all_the_same(tmp_path, monkeypatch):
    code = errno.EINVAL

    def refuse(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    storage.sync_folder(tmp_path)
    code = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        storage.sync_folder(tmp_path)
