"""The exported model, made again; whole runs are in tests/e2e."""

from halos_jax.audit.opened import Opened
from halos_jax.audit.rederive.single import exports
from halos_jax.config import Config
from halos_jax.workdir.changes import History
from halos_jax.workdir.ledger import no_ledger


def write(folder, **files):
    (folder / "adapter").mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("_", "/")).with_suffix(".safetensors").write_text(text)
    (folder / "config.json").write_text(folder.name)
    return folder


def test_weights_are_compared_file_by_file(tmp_path):
    recorded = write(tmp_path / "a", model="x", adapter_model="y")
    same = write(tmp_path / "b", model="x", adapter_model="y")
    names = ["adapter/model.safetensors", "model.safetensors"]
    assert exports.compare_weights(recorded, same) == ([], names)
    other = write(tmp_path / "c", model="z")
    wrong, _ = exports.compare_weights(recorded, other)
    assert wrong == [
        "adapter/model.safetensors is in one of the two alone",
        "model.safetensors has other weights",
    ]


def test_a_run_under_way_has_exported_nothing(tmp_path):
    config = Config()
    opened = Opened("online", tmp_path, History(config), config, no_ledger(tmp_path), ())
    assert exports.check_final(opened) == []
