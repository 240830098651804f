import logging
import os
import subprocess
import sys
import textwrap

import pytest

from halos_jax.config import Config
from halos_jax.storage import WorkdirError
from halos_jax.workdir import lock, runs


def test_two_jobs_never_share_a_workdir(tmp_path):
    script = """
        import sys
        from halos_jax.config import Config
        from halos_jax import storage
        from halos_jax.workdir import runs
        try:
            runs.open_run(sys.argv[1], Config())
        except storage.WorkdirError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    run = runs.open_run(tmp_path, Config())
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"is in use by another job (process {os.getpid()} on " in found
    # A process that dies holds nothing: the other one got the lock and is gone.
    run.close()
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == ""
    runs.open_run(tmp_path, Config()).close()


def test_a_lock_names_its_holder_and_goes_with_it(tmp_path):
    held = lock.lock_workdir(tmp_path)
    with pytest.raises(WorkdirError, match=f"in use by another job .process {os.getpid()} on "):
        lock.lock_workdir(tmp_path)
    os.close(held)
    os.close(lock.lock_workdir(tmp_path))


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING):
        os.close(lock.lock_workdir(tmp_path))
    assert "cannot be locked" in caplog.text and "start only one job in it" in caplog.text
