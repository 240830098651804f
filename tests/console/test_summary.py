"""The summary of a run."""

from halos_jax.console.summary import format_facts


def test_facts_stand_behind_their_labels_and_wrap_there():
    facts = [
        ("mesh", "data=1"),
        ("adapter", ""),
        ("reward", "model /a/long-path/that-is/to-be/copied/whole; rules for the log: a:b"),
    ]
    assert (
        format_facts("task online", facts, width=40)
        == """\
task online
  mesh    data=1
  reward  model
          /a/long-path/that-is/to-be/copied/whole;
          rules for the log: a:b"""
    )
    listed = format_facts(
        "a run", [("start", "refused:\n  - seed: 0 -> 1\nset it back"), ("a", "b")]
    )
    assert (
        listed
        == """\
a run
  start  refused:
           - seed: 0 -> 1
         set it back
  a      b"""
    )
    assert format_facts("nothing", []) == "nothing"
