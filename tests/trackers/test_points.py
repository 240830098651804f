import json

from halos_jax.trackers.points import Point, Samples


def test_a_point_has_samples_only_where_it_evaluates_a_round():
    point = Point(3, 1, 10.0, {"loss/train": 0.5})
    assert point.samples is None
    table = Samples(("prompt", "reward"), (("a", 0.5), ("b", None)))
    assert json.loads(json.dumps(table.rows)) == [["a", 0.5], ["b", None]]
