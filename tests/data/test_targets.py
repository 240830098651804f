"""Which outputs of feedback are learned, by kind of feedback."""

import pytest

from halos_jax.data.targets import Targets
from halos_jax.types import Completion, Demonstration, Judgement, Preference, Prompt, Turn


def prompt(name):
    return Prompt(name, (Turn("user", name),))


def complete(text, reward=None):
    return Completion((Turn("assistant", text),), reward=reward)


def learn(best_only, *feedback):
    targets = Targets(best_only=best_only)
    for one in feedback:
        if isinstance(one, Preference):
            targets.add_preference(one)
        elif isinstance(one, Judgement):
            targets.add_judgement(one)
        else:
            targets.add_scored(one)
    chosen = targets.choose()
    return [one.completion.turns[0].content for one in chosen], targets.left_out


def pair(better, worse, rewards=(None, None), name="p"):
    first, second = complete(better, rewards[0]), complete(worse, rewards[1])
    return Preference(prompt(name), first, second)


def judge(text, desirable, reward=None, name="p"):
    return Judgement(prompt(name), complete(text, reward), desirable)


def score(text, reward, name="p"):
    return Demonstration(prompt(name), complete(text, reward))


@pytest.mark.parametrize(
    ("feedback", "best", "preferred"),
    [
        # Pairs: the best mean reward, else the most wins less losses.
        ([pair("a", "b"), pair("a", "c"), pair("d", "a")], ["a"], ["a", "d"]),
        ([pair("a", "b", (2, 1)), pair("d", "a", (3, 0)), pair("b", "a", (4, 4))], ["d"], "abd"),
        ([pair("a", "b", (1, 0)), pair("c", "d", name="q")], ["a", "c"], ["a", "c"]),
        # Binary: the first desirable one, else the best reward, else nothing.
        ([judge("a", False, 9), judge("b", True, 1), judge("c", True, 2)], ["b"], ["b", "c"]),
        ([judge("a", False, 1), judge("b", False, 2)], ["b"], ["b"]),
        ([judge("a", False), judge("b", False)], [], []),
        # Scores: the best of each prompt, the first of equals.
        ([score("a", 1), score("b", 3), score("c", 3), score("d", 0, "q")], ["b", "d"], ["b", "d"]),
    ],
)
def test_what_is_learned(feedback, best, preferred):
    outputs = {
        (one.prompt.prompt_id, text.turns[0].content)
        for one in feedback
        for text in (
            (one.chosen, one.rejected) if isinstance(one, Preference) else (one.completion,)
        )
    }
    for best_only, expected in ((True, list(best)), (False, list(preferred))):
        assert learn(best_only, *feedback) == (expected, len(outputs) - len(expected))


def test_every_output_is_taken_as_often_as_it_comes():
    targets = Targets(best_only=True, every=True)
    targets.add_scored(score("a", 1))
    targets.add_scored(score("a", 1))
    targets.add_scored(score("b", 9, "q"))
    targets.add_preference(pair("c", "a"))
    targets.add_judgement(judge("d", False))
    found = [one.completion.turns[0].content for one in targets.choose()]
    assert (found, targets.left_out) == (["a", "a", "c", "a", "d", "b"], 0)
