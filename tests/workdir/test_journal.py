"""What the processes of a run have said."""

import logging
import sys

import pytest

from halos_jax.workdir import journal
from halos_jax.workdir.journal import describe_start, keep_journal, read_journal

LOGGER = logging.getLogger("halos_jax.some.room")


def test_starts_and_warnings_are_kept_the_same_text_once(tmp_path):
    for is_new in (True, False):
        with keep_journal(tmp_path, is_new=is_new):
            for text in ("first", "second", "first"):
                LOGGER.warning("the %s", text)
            LOGGER.info("no warning")
            logging.getLogger("another.library").warning("not ours")
    LOGGER.warning("after the run")
    found = read_journal(tmp_path)
    assert len(found.starts) == 2 and found.starts[0]["kind"] == "start"
    assert [one["text"] for one in found.warnings] == ["the first", "the second"]
    with keep_journal(tmp_path, is_new=True):
        pass
    assert len(read_journal(tmp_path).starts) == 1 and read_journal(tmp_path).warnings == ()


def test_other_processes_write_nothing(tmp_path):
    with keep_journal(tmp_path, is_new=True, is_writer=False):
        LOGGER.warning("of process 1")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_nothing_does_not_end_the_run(tmp_path):
    with keep_journal(tmp_path / "absent", is_new=True):
        LOGGER.warning("unheard")
    assert read_journal(tmp_path / "absent") == journal.Journal()


def test_a_message_that_its_arguments_do_not_fit_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)
    # The tests' own handlers do not bear it.
    monkeypatch.setattr(logging.getLogger("halos_jax"), "propagate", False)
    with keep_journal(tmp_path, is_new=True):
        LOGGER.warning("%d prompts", "many")
        LOGGER.warning("and on")
    assert [one["text"] for one in read_journal(tmp_path).warnings] == ["and on"]


def test_too_many_warnings_are_cut_off_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "_MOST", 3)
    with keep_journal(tmp_path, is_new=True):
        for number in range(9):
            LOGGER.warning("number %d", number)
    texts = [one["text"] for one in read_journal(tmp_path).warnings]
    assert texts[:2] == ["number 0", "number 1"]
    assert texts[2:] == ["number 2 (warning 3: no further ones are kept here)"]


def test_lines_that_are_none_are_left_out(tmp_path):
    (tmp_path / "journal.jsonl").write_text(
        '{"kind": "warning", "text": "a"}\n[]\n{"kind": 3}\n{"k'
    )
    assert [one["text"] for one in read_journal(tmp_path).warnings] == ["a"]


@pytest.mark.parametrize(
    "program, is_shown", [("/x/halos_jax/main.py", True), ("/usr/bin/pytest", False)]
)
def test_the_command_is_that_of_the_program(monkeypatch, program, is_shown):
    monkeypatch.setattr(sys, "argv", [program, "--config=a b.py"])
    command = "python -m halos_jax.main '--config=a b.py'"
    assert describe_start().get("command") == (command if is_shown else None)


def test_names_that_are_no_utf8_are_kept(tmp_path, monkeypatch):
    name = b"caf\xe9.jsonl".decode("utf-8", "surrogateescape")
    monkeypatch.setattr(sys, "argv", ["/x/halos_jax/main.py", f"--config.data.train={name}"])
    # What a test logs is sent between the processes of a parallel run of the tests, in UTF-8.
    monkeypatch.setattr(logging.getLogger("halos_jax"), "propagate", False)
    with keep_journal(tmp_path, is_new=True):
        LOGGER.warning("%s has a record without a prompt", name)
    found = read_journal(tmp_path)
    assert name in found.starts[0]["command"]
    assert found.warnings[0]["text"] == f"{name} has a record without a prompt"
