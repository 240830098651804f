"""Where a checkpoint was taken: the JSON objects of all versions, and what they mean."""

import json

import pytest

from halos_jax.checkpoints.position import Position

LAYOUTS = {"train": [{"rows": 1}]}
# As they stand in checkpoints: an end of a round, inside of one, a task that trains once.
RECORDS = [
    ({"round": 3, "in_stage": False, "layouts": LAYOUTS, "step": 96}, 3),
    ({"round": 3, "in_stage": True, "stage_step": 5, "layouts": {}, "step": 69}, 2),
    ({"in_stage": False, "stage_step": 40, "step": 40}, 0),
    ({"in_stage": False, "stage_step": 40, "layouts": LAYOUTS, "step": 40}, 0),
    ({"round": 0, "in_stage": False, "layouts": {}, "origin": {"round": 2}, "step": 0}, 0),
]


@pytest.mark.parametrize(("record", "done"), RECORDS)
def test_a_record_is_read_and_written_to_the_same_bytes(record, done):
    found = Position.from_dict(record)
    assert json.dumps(found.to_dict()) == json.dumps(record)
    assert found.rounds_done == done and found.step == record["step"]


def test_a_record_of_before_layouts_is_read():
    found = Position.from_dict({"round": 2, "in_stage": False, "step": 8})
    assert found == Position(step=8, round=2) and found.layouts == {}
