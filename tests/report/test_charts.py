"""What a chart is."""

from halos_jax.report.charts import Chart, Line, keep_known


def test_lines_and_charts_without_a_point_are_left_out():
    known, empty = Line("a", (1.0,), (2.0,)), Line("b", (), ())
    charts = [
        Chart("x", "X", "", "round", "", (empty, known)),
        Chart("y", "Y", "", "", "", (empty,)),
    ]
    (chart,) = keep_known(charts)
    assert (chart.name, chart.lines) == ("x", (known,))
