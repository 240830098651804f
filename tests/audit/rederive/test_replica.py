"""A run opened for reading."""

from halos_jax.audit.rederive import replica
from halos_jax.rounds.order import Order
from halos_jax.types import Prompt, Turn
from halos_jax.workdir.manifests import FileRecord, Manifest, save_manifest

PROMPTS = [Prompt(str(number), (Turn("user", "a"),)) for number in range(9)]


def test_an_order_is_cut_to_the_prompts_of_an_earlier_start():
    order = Order(PROMPTS, (4, 3, 2), is_new=False, held_out=PROMPTS[:1])
    for count, groups in ((9, (4, 3, 2)), (7, (4, 3)), (5, (4, 1)), (4, (4,))):
        found = replica._cut(order, count)
        assert (found.prompts, found.groups) == (PROMPTS[:count], groups)
        assert found.held_out == PROMPTS[:1]


def test_files_of_the_rounds_are_linked_and_not_copied(tmp_path):
    for round in (0, 2):
        folder = tmp_path / "run" / "rounds" / f"{round:04d}"
        folder.mkdir(parents=True)
        (folder / "eval.jsonl").write_text(f"{round}")
        (folder / "other.jsonl").write_text("not of the manifest")
        files = {name: FileRecord("", 1) for name in ("eval.jsonl", "gone.jsonl")}
        save_manifest(folder, Manifest(round, files=files))
    (tmp_path / "run" / "rounds" / "0003").mkdir()
    found = replica._link_rounds(tmp_path / "run", tmp_path / "scratch")
    assert [(round, one.round) for round, one in found.items()] == [(0, 0), (2, 2)]
    links = sorted((tmp_path / "scratch").rglob("*.json*"))
    assert [(one.parent.name, one.name) for one in links] == [
        (round, name) for round in ("0000", "0002") for name in ("eval.jsonl", "manifest.json")
    ]
    assert all(one.is_symlink() for one in links)
    assert links[2].read_text() == "2"
