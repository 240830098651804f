"""What is said once a run is said again in the next run of the process."""

import logging

from halos_jax.once import forget_run, once_a_run, say_once, take_repeats

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


def test_what_every_round_says_is_said_once_and_counted(caplog):
    logger, warned = logging.getLogger("halos_jax.here"), "%s: %d of %d are cut"
    with caplog.at_level(logging.INFO):
        for round in (1, 2, 13):
            say_once(logger, warned, f"round {round}, samples", round, 20)
            say_once(logger, "%d have no reward", round, level=logging.INFO)
        say_once(logger, warned, "round 1, held out", 4, 20)
    assert [(one.levelname, one.message) for one in caplog.records] == [
        ("WARNING", "round 1, samples: 1 of 20 are cut"),
        ("INFO", "1 have no reward"),
        ("WARNING", "round 1, held out: 4 of 20 are cut"),
    ]
    said = "said once, it came 2 times more, the last:"
    assert take_repeats() == [
        (logging.WARNING, f"{said} round 13, samples: 13 of 20 are cut"),
        (logging.INFO, f"{said} 13 have no reward"),
    ]
    assert take_repeats() == []
    say_once(logger, warned, "round 2, samples", 1, 20)
    assert caplog.messages[-1] == "round 2, samples: 1 of 20 are cut"  # another run
    say_once(logger, warned, "round 3, samples", 1, 20)
    assert take_repeats()[0][1].startswith("said once, it came once more, the last: round 3")
    say_once(logger, warned, "round 4, samples", 1, 20)
    forget_run()
    say_once(logger, warned, "round 2, samples", 2, 20)
    assert caplog.messages[-1] == "round 2, samples: 2 of 20 are cut"
