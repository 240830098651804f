"""Reward functions for the tests of whole runs."""


def score_length(prompt, response: str) -> float:
    """Prefer short answers."""
    return -float(len(response))


def score_nothing(prompt, response: str) -> float:
    """Give every answer the same reward."""
    return 0.5


def score_badly(prompt, response: str) -> float:
    """Give what is no reward."""
    return float("nan")


def score_early(prompt, response: str) -> float:
    """Give the share of a response that is letters of the first half of the alphabet."""
    return sum(letter in "abcdefghijklm" for letter in response) / max(len(response), 1)
