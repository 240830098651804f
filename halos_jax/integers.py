"""Division of whole numbers that rounds up."""


def divide_up(count: int, size: int) -> int:
    """Return how many parts of `size` hold `count`."""
    return -(-count // size)


def round_up(count: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is `count` or more."""
    return divide_up(count, multiple) * multiple
