"""The position in a run at which a checkpoint was taken: the typed form of its `round_state`."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Position:
    """The position of a checkpoint in its run.

    Attributes:
      step: optimizer steps since the start of the run.
      round: the round that is or was trained; None for a task that trains once.
      in_stage: whether the training of `round` is still under way.
      stage_step: optimizer steps taken in the current stage.
      layouts: the batch shapes that the run has compiled; see `LayoutMemory.to_record`.
      origin: of the state that a run starts from, if it is another run's: see `policies/branch.py`.

    Example:
      Position(step=96, round=3, in_stage=True, stage_step=32)
    """

    step: int
    round: int | None = None
    in_stage: bool = False
    stage_step: int = 0
    layouts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def rounds_done(self) -> int:
        """How many rounds are trained completely."""
        return (self.round or 0) - self.in_stage

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object that is stored in the checkpoint."""
        if self.round is None:
            kept = {"layouts": dict(self.layouts)} if self.layouts else {}
            return {"in_stage": False, "stage_step": self.stage_step, **kept, "step": self.step}
        inside = {"stage_step": self.stage_step} if self.in_stage else {}
        record = {"round": self.round, "in_stage": self.in_stage, **inside}
        began = {"origin": dict(self.origin)} if self.origin else {}
        return record | {"layouts": dict(self.layouts), **began, "step": self.step}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Position":
        """Read the JSON object that `to_dict` made; KeyError if it has no step."""
        number = record.get("round")
        return cls(
            step=int(record["step"]),
            round=None if number is None else int(number),
            in_stage=bool(record.get("in_stage")),
            stage_step=int(record.get("stage_step", 0)),
            layouts=record.get("layouts", {}),
            origin=record.get("origin", {}),
        )
