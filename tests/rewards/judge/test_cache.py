"""The file of answers: whole lines only, from several threads and writers, whatever a kill left."""

import json
import os
import random
import threading

import pytest

from halos_jax.rewards.judge.cache import AnswerCache, make_key

ANSWER = {"text": "a\n\u2028ü", "finish_reason": "stop", "model": "m"}


def test_what_is_put_is_there_for_the_next(tmp_path):
    path = tmp_path / "new" / "judge.jsonl"
    cache = AnswerCache(path)
    cache.load()
    assert cache.get("one") is None
    cache.put("one", ANSWER)
    assert cache.get("one") == {"key": "one", **ANSWER}
    other = AnswerCache(path)
    other.load()
    assert other.get("one") == cache.get("one")


def test_a_torn_line_loses_that_answer_alone(tmp_path, caplog):
    path = tmp_path / "judge.jsonl"
    cache = AnswerCache(path)
    for name in ("one", "two"):
        cache.put(name, ANSWER)
    whole = path.read_bytes()
    for cut in range(len(whole) // 2 + 1, len(whole) - 1):
        path.write_bytes(whole[:cut])
        again = AnswerCache(path)
        again.load()
        assert again.get("one") and again.get("two") is None
        again.put("three", ANSWER)
        last = AnswerCache(path)
        last.load()
        assert last.get("one") and last.get("three") and last.get("two") is None
    assert "skipped 1 broken lines" in caplog.text


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_that_was_changed_is_asked_again(tmp_path, caplog, seed):
    """Whatever letter of a line is another one: the other lines stand, and that one is said."""
    path, rng = tmp_path / "judge.jsonl", random.Random(seed)
    cache = AnswerCache(path)
    for name in ("one", "two", "three"):
        cache.put(name, ANSWER)
    first, second, third = path.read_bytes().splitlines(keepends=True)
    for at in rng.sample(range(len(second) - 1), 60):
        other = bytes([second[at] ^ (1 << rng.randrange(7))])
        if other in b"\n\r":
            continue
        path.write_bytes(first + second[:at] + other + second[at + 1 :] + third)
        again = AnswerCache(path)
        again.load()
        if second[at : at + 1].lower() != other.lower():  # two spellings of a code point
            assert again.get("two") is None and len(again) == 2, (at, other)
        assert again.get("two") in (None, cache.get("two"))
    assert "1 broken lines, cut short, changed or without their hash; their" in caplog.text


@pytest.mark.parametrize("number", range(3))
def test_an_answer_whose_hash_was_removed_is_asked_again(tmp_path, caplog, number):
    path, names = tmp_path / "judge.jsonl", ("one", "two", "three")
    cache = AnswerCache(path)
    for name in names:
        cache.put(name, ANSWER)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    del lines[number]["sha256"]
    lines[number]["text"] = "Final Score: 10"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = AnswerCache(path)
    again.load()
    assert again.get(names[number]) is None and len(again) == 2
    assert "skipped 1 broken lines, cut short, changed or without their hash" in caplog.text
    again.put(names[number], ANSWER)
    last = AnswerCache(path)
    last.load()
    assert all(last.get(name) == {"key": name, **ANSWER} for name in names)


def test_answers_of_a_version_without_hashes_are_taken_and_get_theirs(tmp_path, caplog):
    path, old = tmp_path / "judge.jsonl", ("one", "two")
    path.write_text("".join(json.dumps({"key": key, **ANSWER}) + "\n" for key in old))
    cache = AnswerCache(path)
    for _ in range(2):
        cache.load()
    assert all(cache.get(key) == {"key": key, **ANSWER} for key in old)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "2 answers of a version that wrote no hashes are accepted" in said[0]
    cache.put("three", ANSWER)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["key"] for line in lines] == [*old, *old, "three"]
    assert ["sha256" in line for line in lines] == [False, False, True, True, True]
    caplog.clear()
    # The first lines have hashes elsewhere now; one that was changed since is not looked at.
    lines[0]["text"] = "Final Score: 10"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = AnswerCache(path)
    again.load()
    assert all(again.get(key) == {"key": key, **ANSWER} for key in (*old, "three"))
    assert len(again) == 3 and not caplog.records


def test_a_lost_hash_is_no_older_version_where_another_hash_is_wrong(tmp_path, caplog):
    path = tmp_path / "judge.jsonl"
    lines = [{"key": "one", **ANSWER}, {"key": "two", **ANSWER, "sha256": "0" * 64}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    cache = AnswerCache(path)
    cache.load()
    assert len(cache) == 0 and "skipped 2 broken lines" in caplog.text


def test_what_is_no_answer_is_passed_over(tmp_path):
    path = tmp_path / "judge.jsonl"
    path.write_text('[1]\n{"key": "a"}\n{"key": "b", "text": 1, "finish_reason": "stop"}\n\n')
    cache = AnswerCache(path)
    cache.load()
    assert cache.get("a") is None and cache.get("b") is None


def test_threads_and_writers_do_not_mix_their_lines(tmp_path):
    path = tmp_path / "judge.jsonl"
    caches = [AnswerCache(path), AnswerCache(path)]
    threads = [
        threading.Thread(target=caches[n % 2].put, args=(str(n), {**ANSWER, "text": "x" * 9999}))
        for n in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["key"] for line in lines} == {str(n) for n in range(20)}


def test_an_answer_that_is_not_on_disk_is_not_taken(tmp_path, monkeypatch):
    path = tmp_path / "judge.jsonl"
    cache = AnswerCache(path)
    cache.put("one", ANSWER)
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:5]))
    with pytest.raises(OSError, match=r"judge\.jsonl: an answer could not be written whole"):
        cache.put("two", ANSWER)
    assert cache.get("two") is None
    monkeypatch.setattr(os, "write", real)
    cache.put("two", ANSWER)
    again = AnswerCache(path)
    again.load()
    assert again.get("one") and again.get("two")


def test_the_key_names_all_that_was_asked():
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": 0}
    keys = {
        make_key("u", body, 0),
        make_key("v", body, 0),
        make_key("u", body, 1),
        make_key("u", body | {"temperature": 1}, 0),
        make_key("u", body | {"messages": []}, 0),
    }
    assert len(keys) == 5
    assert make_key("u", dict(reversed(body.items())), 0) == make_key("u", body, 0)
