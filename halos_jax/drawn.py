"""What the tokens of a response were drawn from, where that is not the policy itself."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, slots=True)
class Drawn:
    """The distributions of a response's tokens: softmax(logits / temperature) over kept tokens.

    `logps` are the tokens' log-probabilities (nats) under them. `kept_counts` says how many tokens
    were kept at each, and `kept_ids` which: little-endian int32, ascending at each token, those of
    one token behind those of the other. Both are empty where all tokens were kept that there are
    (a row of the vocabulary may have none). The sets are the sampler's: they stay as they are when
    the policy changes.

    Example: two tokens, 23 and 2, of which the first was drawn from {7, 23}, the other for sure.
      >>> kept = np.array([7, 23, 2], "<i4").tobytes()
      >>> drawn = Drawn(0.7, (-0.2, 0.0), kept_counts=(2, 1), kept_ids=kept)
      >>> drawn.tabulate(3).tolist()
      [[7, 23, -1], [2, -1, -1]]
      >>> drawn.cut(1).kept_counts
      (2,)
    """

    temperature: float
    logps: tuple[float, ...]
    kept_counts: tuple[int, ...] = ()
    kept_ids: bytes = b""

    def cut(self, length: int) -> "Drawn":
        """Return what a response's first `length` tokens were drawn from."""
        counts = self.kept_counts[:length]
        kept = self.kept_ids[: 4 * sum(counts)]
        return Drawn(self.temperature, self.logps[:length], counts, kept)

    def tabulate(self, width: int) -> np.ndarray:
        """Return the kept ids i32[tokens, width] of each token, filled up with -1."""
        table = np.full((len(self.logps), width), -1, np.int32)
        if self.kept_counts:
            filled = np.arange(width) < np.array(self.kept_counts)[:, None]
            table[filled] = np.frombuffer(self.kept_ids, "<i4")
        return table
