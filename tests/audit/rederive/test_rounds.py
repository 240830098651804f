"""The checks of a round, one after the other."""

from types import SimpleNamespace

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
