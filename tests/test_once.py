"""What is said once a run is said again in the next run of the process."""

from halos_jax.once import forget_run, once_a_run

said = []


@once_a_run
def say(word: str, *, loud: bool = False) -> int:
    """Say it."""
    said.append((word, loud))
    return len(said)


def test_the_same_is_said_once_until_a_new_run_begins():
    said.clear()
    assert [say("a"), say("a"), say("b"), say("a", loud=True), say("a")] == [1, 1, 2, 3, 1]
    forget_run()
    assert [say("a"), say("a")] == [4, 4]
    assert said == [("a", False), ("b", False), ("a", True), ("a", False)]
    assert say.__name__ == "say" and say.__doc__ == "Say it."
