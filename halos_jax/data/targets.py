"""Which outputs in feedback are targets: those that SFT learns, or all of them."""

import dataclasses

from halos_jax.types import Completion, Demonstration, Judgement, Preference, Prompt


@dataclasses.dataclass
class _Output:
    """The feedback on one output of a prompt, collected from all records that have it."""

    demonstration: Demonstration
    rewards: list[float] = dataclasses.field(default_factory=list)
    wins: int = 0  # pairs won less pairs lost
    preferred: bool = False  # chosen in some pair, or labelled desirable
    labelled: bool = False  # has a label of its own, outside of pairs


class Targets:
    """Collects the outputs in feedback, then chooses those to learn.

    With `best_only` it chooses one output per prompt: in binary feedback the first desirable one,
    else the one with the best reward (the mean, if several records have one), or without rewards
    the one that wins most pairs. A prompt without a good output (with a single undesirable answer
    and no reward, for example) gives none. Without `best_only` it chooses every output that is
    preferred in some pair or desirable, once each, and from scored samples the best. With `every`
    it takes all outputs, both halves of pairs too, as often as they come.

    Attributes:
      left_out: how many distinct outputs `choose` did not take.
    """

    def __init__(self, *, best_only: bool, every: bool = False):
        self.left_out = 0
        self._every = every
        self._best_only = best_only
        self._outputs: dict[tuple[object, ...], dict[tuple[object, ...], _Output]] = {}

    def add_preference(self, preference: Preference) -> None:
        for completion, won in ((preference.chosen, True), (preference.rejected, False)):
            output = self._find(preference.prompt, completion, preference.prompt_ids)
            output.wins += 1 if won else -1
            output.preferred |= won

    def add_judgement(self, judgement: Judgement) -> None:
        output = self._find(judgement.prompt, judgement.completion, judgement.prompt_ids)
        output.preferred |= judgement.desirable
        output.labelled = True

    def add_scored(self, sample: Demonstration) -> None:
        self._find(sample.prompt, sample.completion, sample.prompt_ids)

    def choose(self) -> list[Demonstration]:
        """Return the outputs to learn, prompts and outputs in the order in which they came."""
        chosen = []
        for by_text in self._outputs.values():
            outputs = list(by_text.values())
            taken = [one for one in outputs if one.preferred or self._every]
            if not self._every and (self._best_only or not taken):
                taken = _find_best(outputs)
            self.left_out += len(outputs) - len(taken)
            chosen += [one.demonstration for one in taken]
        return chosen

    def _find(self, prompt: Prompt, completion: Completion, prompt_ids: tuple[int, ...]) -> _Output:
        outputs = self._outputs.setdefault(prompt.key, {})
        new = _Output(Demonstration(prompt, completion, prompt_ids))
        number = len(outputs) if self._every else -1  # a sample that comes twice counts twice
        output = outputs.setdefault((completion.turns, completion.ids, number), new)
        if completion.reward is not None:
            output.rewards.append(completion.reward)
        return output


def _find_best(outputs: list[_Output]) -> list[_Output]:
    """Return the best of a prompt's outputs in a list, which is empty if none is known as good."""
    desirable = [one for one in outputs if one.labelled and one.preferred]
    if desirable:
        return desirable[:1]
    if all(one.rewards for one in outputs):
        return [max(outputs, key=lambda one: sum(one.rewards) / len(one.rewards))]
    known = [one for one in outputs if one.preferred or one.rewards]
    return [max(known, key=lambda one: one.wins)] if known else []
