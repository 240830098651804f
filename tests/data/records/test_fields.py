"""Every getter takes what it should and names file, line and field where it should not."""

import pytest

from halos_jax.data.records.fields import Fields, RecordError, shorten


def test_getters_return_typed_values():
    fields = Fields(
        {
            "text": "a",
            "id": 7,
            "integer": 3,
            "number": 2,
            "ids": [0, 5],
            "numbers": [1, 0.5],
            "label": 1.0,
            "choice": "b",
            "mapping": {"k": 1},
            "null": None,
        }
    )
    assert fields.text("text") == "a" and fields.text("absent", "x") == "x"
    assert fields.identifier("id") == "7"
    assert fields.integer("integer") == 3 and fields.integer("null", 9) == 9
    assert fields.number("number") == 2.0 and fields.number("null") is None
    assert fields.ids("ids") == (0, 5) and fields.ids("absent") == ()
    assert fields.numbers("numbers") == (1.0, 0.5) and fields.numbers("null") is None
    assert fields.label() is True
    assert fields.choice("choice", ("a", "b"), "a") == "b"
    assert fields.choice("absent", ("a", "b"), "a") == "a"
    assert fields.mapping("mapping") == {"k": 1} and fields.mapping("absent") == {}
    assert fields.has("text", "id") and not fields.has("text", "null")


@pytest.mark.parametrize("value", [0, 0.0, False, 1, 1.0, True])
def test_labels_come_in_three_types(value):
    assert Fields({"label": value}).label() is bool(value)


@pytest.mark.parametrize(
    ("getter", "value"),
    [
        ("text", 3),
        ("text", None),
        ("text", "\ud800"),  # half of a surrogate pair
        ("identifier", ""),
        ("identifier", True),
        ("identifier", 1.5),
        ("integer", True),
        ("integer", 1.0),
        ("integer", None),
        ("number", "1"),
        ("number", True),
        ("number", float("inf")),
        ("ids", "12"),
        ("ids", [1, -1]),
        ("ids", [1, 2.0]),
        ("ids", [True]),
        ("numbers", 3),
        ("numbers", [1, "2"]),
        ("label", 0.5),
        ("label", None),
        ("label", "1"),
        ("mapping", []),
    ],
)
def test_wrong_types_name_file_line_and_field(getter, value):
    fields = Fields({"x": value}, "data.jsonl", 12)
    with pytest.raises(RecordError, match=r"^data\.jsonl line 12: field 'x': got .*, allowed: "):
        getattr(fields, getter)("x")


def test_a_choice_lists_what_is_allowed():
    with pytest.raises(RecordError, match="got 'c', allowed: 'a', 'b'"):
        Fields({"x": "c"}).choice("x", ("a", "b"), "a")


def test_long_values_are_shortened():
    assert shorten("ab") == "'ab'"
    assert len(shorten("a" * 1000)) == 80
    error = Fields({"x": "a" * 1000}).error("x", "a" * 1000, "less")
    assert len(str(error)) < 150


def test_an_absent_field_is_named_with_those_that_there_are():
    fields = Fields({"Prompt": "a", "none": None}, "f", 3)
    assert str(fields.error("prompt", None, "a text")) == (
        "f line 3: field 'prompt': got nothing, allowed: a text; the record has 'Prompt'"
    )
    many = Fields({f"n{number}": 1 for number in range(10)})
    assert str(many.error("chosen", None, "x")).endswith("'n6', 'n7' and 2 more")
    assert str(Fields({}).error("label", None, "x")).endswith("the record has no fields")
    nulls = Fields({"label": None, "prompt": None}).error("label", None, "x")
    assert str(nulls).endswith("the record has nothing but null (in 'label', 'prompt')")
    # What is there and is no field's name of ours says nothing of other fields.
    assert str(fields.error("none", None, "x")).endswith("allowed: x")
    assert str(fields.error("messages[0].role", None, "x")).endswith("allowed: x")
