"""The checks of a round, one after the other."""

from types import SimpleNamespace

import pytest

from halos_jax.audit.rederive import rounds
from halos_jax.types import Prompt, Sample, Turn
from halos_jax.workdir.manifests import Manifest

PROMPTS = [Prompt(str(number), (Turn("user", "a"),)) for number in range(9)]


def test_samples_are_those_of_the_extents(monkeypatch, tmp_path):
    known = [Sample(one, at, "", (1,), (2,), "stop") for one in PROMPTS[2:7] for at in range(2)]
    monkeypatch.setattr(rounds.stages, "read_samples", lambda path: known)
    sampling = SimpleNamespace(num_samples_per_prompt=2)
    run = SimpleNamespace(config=SimpleNamespace(sampling=sampling), prompts=PROMPTS)
    replica = SimpleNamespace(folder=lambda round: tmp_path)
    extents = [{"stop": 5, "examples": 1}, {"stop": 6, "examples": 2}]
    manifest = Manifest(3, start=2, stop=6, decisions={"refill": {"extents": extents}})
    draws = rounds._split_extents(replica, run, manifest)
    assert [one.prompts for one in draws] == [PROMPTS[2:5], PROMPTS[5:6]]
    # Two samples are too many: they are left in the last part, where they are counted.
    assert [len(one.samples) for one in draws] == [6, 4]


def test_the_final_test_has_a_stage_of_its_own():
    assert rounds._name_stage("test", 2) == "test"
    assert [rounds._name_stage(one, 0) for one in ("test", "eval")] == ["evaluate"] * 2


@pytest.mark.parametrize(
    ("start", "saved", "frozen", "asked"),
    [(0, None, None, True), (0, 1, None, False), (2, None, None, False), (2, None, "base", True)],
)
def test_a_policy_of_a_checkpoint_has_its_fingerprint_everywhere(
    monkeypatch, start, saved, frozen, asked
):
    monkeypatch.setattr(rounds, "find_start", lambda *_: start)
    monkeypatch.setattr(rounds.same, "explain_made", lambda *_: "elsewhere")
    replica = SimpleNamespace(scratch=None, find_checkpoint=lambda round: saved)
    run = SimpleNamespace(
        trainer=SimpleNamespace(frozen=frozen),
        policy=SimpleNamespace(settings=None, decoder=None),
        workspace=None,
    )
    made = rounds._explain_made(replica, run, Manifest(3))
    assert made == ("elsewhere" if asked else "")
    monkeypatch.setattr(rounds, "identify", lambda *_: SimpleNamespace(fingerprint="a"))
    outcomes = [rounds._check_origin(run, mark, {}, made)[0].outcome for mark in ("a", "b")]
    assert outcomes == ["passed", "not checked" if asked else "differs"]
