"""Weight files: what a whole one holds, and every way in which one can be broken."""

import contextlib
import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from halos_jax.models.files.weight_files import (
    INDEX,
    SINGLE,
    open_tensors,
    read_header,
    read_json,
)
from halos_jax.models.hf.families import ModelError

TENSORS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.weight": np.arange(4).astype(ml_dtypes.bfloat16),
    "empty": np.zeros((0, 3), np.float16),
    "scalar": np.array(5, np.int64),
}


STRANGE = [
    *(1, None, ["one.safetensors"], "", "one", "/etc/passwd", "../one.safetensors"),
    *("x/one.safetensors", "..\\one.safetensors", "\0.safetensors"),
]


def write(folder, tensors=TENSORS, name=SINGLE):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name, metadata={"format": "pt"})
    return folder / name


def split(folder):
    """Write two shards and their index; return the index, as an object to be changed."""
    names = {"one.safetensors": ["a.weight", "empty"], "two.safetensors": ["b.weight", "scalar"]}
    for file, held in names.items():
        write(folder, {name: TENSORS[name] for name in held}, file)
    weight_map = {name: file for file, held in names.items() for name in held}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    return index


def read_all(folder):
    with contextlib.ExitStack() as stack:
        opened = open_tensors(folder, stack)
        whole = {name: all(one.get_shape() or [0]) for name, one in opened.items()}
        return {name: one[:] if whole[name] else None for name, one in opened.items()}


def edit_header(file, change):
    """Rewrite the header of `file` as `change(header)` returns it: an object, or the very bytes."""
    stored = file.read_bytes()
    (length,) = struct.unpack("<Q", stored[:8])
    made = change(json.loads(stored[8 : 8 + length]))
    made = made if isinstance(made, bytes) else json.dumps(made).encode()
    file.write_bytes(struct.pack("<Q", len(made)) + made + stored[8 + length :])


def set_field(name, **fields):
    def change(header):
        header[name] |= fields
        return header

    return change


def test_headers_and_tensors_are_those_that_were_written(tmp_path):
    file = write(tmp_path)
    found = read_header(file)
    assert {name: (one.dtype, one.shape) for name, one in found.items()} == {
        "a.weight": ("F32", (2, 3)),
        "b.weight": ("BF16", (4,)),
        "empty": ("F16", (0, 3)),
        "scalar": ("I64", ()),
    }
    assert sum(one.stop - one.start for one in found.values()) == 24 + 8 + 8
    for name, value in read_all(tmp_path).items():
        if value is not None:
            np.testing.assert_array_equal(value, load_file(file)[name])


def test_shards_hold_together_what_their_index_says(tmp_path):
    split(tmp_path / "model")
    assert read_all(tmp_path / "model").keys() == TENSORS.keys()
    # A file of another tool beside them belongs to nobody.
    write(tmp_path / "model", {"other": np.ones(2)}, "consolidated.safetensors")
    assert read_all(tmp_path / "model").keys() == TENSORS.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_field("a.weight", dtype="F31"), "a.weight: dtype: got 'F31', allowed: F64, I64"),
        (set_field("a.weight", dtype=None), "a.weight: dtype: got None"),
        (set_field("a.weight", dtype=["F32"]), "a.weight: dtype: got ['F32']"),
        (set_field("a.weight", dtype="F16"), "do not hold F16 of the shape [2, 3]"),
        (set_field("a.weight", shape=[2, 4]), "do not hold F32 of the shape [2, 4]"),
        (set_field("a.weight", shape=[-2, -3]), "a.weight: shape: got [-2, -3], allowed: integers"),
        (set_field("a.weight", shape=[2.0, 3]), "a.weight: shape: got [2.0, 3]"),
        (set_field("b.weight", shape=[True, 4]), "b.weight: shape: got [True, 4]"),
        (set_field("a.weight", shape="6"), "a.weight: shape: got '6'"),
        (set_field("a.weight", shape=[10**30, 3]), "do not hold F32 of the shape"),
        (set_field("a.weight", data_offsets=[0]), "a.weight: data_offsets [0] do not hold"),
        (set_field("a.weight", data_offsets=[24, 0]), "do not hold F32"),
        (set_field("a.weight", data_offsets=[-8, 16]), "data_offsets: got [-8, 16]"),
        (set_field("b.weight", data_offsets=[4, 12]), "overlap those of another tensor"),
        (set_field("b.weight", data_offsets=[40, 48]), "leave a gap before"),
        (
            set_field("a.weight", extra=1),
            "got ['data_offsets', 'dtype', 'extra', 'shape'], allowed",
        ),
        (lambda header: {**header, "a.weight": [1]}, "a.weight: got list, allowed: dtype, shape"),
        (lambda header: {**header, "__metadata__": {"format": 1}}, "__metadata__: allowed: an obj"),
        (lambda header: {**header, "__metadata__": [1]}, "__metadata__: allowed: an object of st"),
        (lambda header: [header], "got list, allowed: an object"),
        (lambda header: {}, "its tensors take 0 bytes, but 40 follow it"),
        (lambda header: b"\xff" * 40, "can't decode byte"),
        (lambda header: b"[" * 5000 + b"]" * 5000, "nested deeper than 64"),
        (
            lambda header: (
                json.dumps(header)[:-1].encode()
                + b', "scalar": {"dtype": "U64", "shape": [], "data_offsets": [0, 8]}}'
            ),
            "the key 'scalar' stands twice in one object",
        ),
    ],
)
def test_a_header_that_lies_is_one_message_with_its_tensor(tmp_path, change, message):
    file = write(tmp_path)
    edit_header(file, change)
    with pytest.raises(ModelError) as caught:
        read_all(tmp_path)
    text = str(caught.value)
    assert text.startswith(f"{file}: cannot be read as safetensors (header: ") and message in text
    assert "download or copy it again" in text


@pytest.mark.parametrize("length", [0, 7, 10**6, 2**63, 2**64 - 1])
def test_the_length_of_a_header_is_checked_before_it_is_read(tmp_path, length):
    file = write(tmp_path)
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    with pytest.raises(ModelError, match=r"cannot be read as safetensors \(header: "):
        read_all(tmp_path)


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 100, -1, "more"])
def test_a_file_that_is_cut_or_too_long_is_refused(tmp_path, cut):
    file = write(tmp_path)
    stored = file.read_bytes()
    file.write_bytes(stored + b"x" if cut == "more" else stored[:cut])
    with pytest.raises(ModelError, match=r"truncated or damaged: download or copy it again"):
        read_all(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("weight_map"), "no 'weight_map'"),
        (lambda index: index.update(weight_map={}), "no 'weight_map'"),
        (lambda index: index.update(weight_map=["one.safetensors"]), "no 'weight_map'"),
        *(
            (
                lambda index, file=file: index["weight_map"].update({"a.weight": file}),
                f"weight_map: 'a.weight': got {file!r}, allowed: the name of a .safetensors file",
            )
            for file in STRANGE
        ),
        (
            lambda index: index["weight_map"].update({"a.weight": "three.safetensors"}),
            "three.safetensors: missing, though model.safetensors.index.json names it",
        ),
        (
            lambda index: index["weight_map"].update({"a.weight": "two.safetensors"}),
            "says that 'a.weight' (1 such) is in two.safetensors, which has no such tensor",
        ),
        (
            lambda index: index["weight_map"].update({"c.weight": "two.safetensors"}),
            "says that 'c.weight' (1 such) is in two.safetensors, which has no such tensor",
        ),
    ],
)
def test_an_index_that_lies_is_one_message(tmp_path, change, message):
    index = split(tmp_path / "model")
    change(index)
    (tmp_path / "model" / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError) as caught:
        read_all(tmp_path / "model")
    assert message in str(caught.value)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    split(tmp_path / "model")
    write(
        tmp_path / "model",
        {"b.weight": TENSORS["b.weight"], "a.weight": np.ones(1)},
        "two.safetensors",
    )
    index = json.loads((tmp_path / "model" / INDEX).read_text())
    del index["weight_map"]["scalar"]
    (tmp_path / "model" / INDEX).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"the tensor 'a.weight' stands in one.safetensors too"):
        read_all(tmp_path / "model")


def test_one_of_two_models_in_a_folder_must_go(tmp_path):
    split(tmp_path / "model")
    write(tmp_path / "model")
    with pytest.raises(ModelError, match=r"has both model.safetensors and .*, which does not name"):
        read_all(tmp_path / "model")


def test_without_weights_the_message_lists_what_is_there(tmp_path):
    with pytest.raises(ModelError, match=r"got no weight file\. Other formats"):
        read_all(tmp_path)
    write(tmp_path, name="model-00001-of-00002.safetensors")
    (tmp_path / "x.gguf").touch()
    with pytest.raises(ModelError, match=r"got model-00001-of-00002.safetensors, x.gguf\. Other"):
        read_all(tmp_path)


@pytest.mark.parametrize("text", [b"{", b'{"a": 1, "a": 2}', b"[" * 9000, b'["\\ud800"]', b"\xff"])
def test_json_is_read_strictly(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(ModelError, match=r"x.json: cannot be read as JSON: .*; copy it again"):
        read_json(tmp_path / "x.json")
    with pytest.raises(ModelError, match=r"y.json: missing; a model folder in Hugging Face format"):
        read_json(tmp_path / "y.json")
    with pytest.raises(ModelError, match=r"cannot be read as JSON"):
        read_json(tmp_path)
