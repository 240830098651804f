"""The files that a run has read."""

from pathlib import Path

from halos_jax.audit.inputs import check_inputs


def outcomes(opened) -> list[tuple[str, str]]:
    return [(one.outcome, one.why) for one in check_inputs(opened)]


def test_data_are_compared_with_what_the_run_has_read(made):
    data = Path(made.config.data.train)
    assert outcomes(made.open()) == [("passed", "")]
    data.write_text(data.read_text() + '{"prompt": "b"}\n')
    assert [outcome for outcome, _ in outcomes(made.open())] == ["passed", "not checked"]
    data.write_text('{"prompt": "c"}\n')
    assert outcomes(made.open()) == [
        ("differs", f"data.train: {data} holds something else than it did")
    ]


def test_data_that_are_not_there_are_not_checked(made):
    data = Path(made.config.data.train)
    data.unlink()
    assert outcomes(made.open()) == [("not checked", f"data.train: {data} is missing")]


def test_a_run_without_a_record_of_inputs_has_nothing_to_compare(made):
    (made.workdir / "inputs.json").unlink()
    assert outcomes(made.open()) == []
