"""What the plot of a sweep shows."""

import matplotlib.figure
import pytest

from jaxlab.tools.plots import draw_sweep


def group(mean, *, diverged=0, **values):
    names = {key.replace("_", "."): value for key, value in values.items()}
    return {"set": names, "mean": mean, "std": None, "runs": 1, "diverged": diverged}


def drawn(*groups):
    axes = matplotlib.figure.Figure().subplots()
    draw_sweep(axes, {"groups": groups}, metric="validation_loss")
    axes.figure.draw_without_rendering()
    return axes


def tick_labels(axes):
    return [label.get_text() for label in axes.get_xticklabels()]


def test_names_stand_on_the_axis_in_order_and_are_not_joined():
    axes = drawn(group(2.0, optimizer_name="muon"), group(1.0, optimizer_name="adamw"))
    assert tick_labels(axes) == ["muon", "adamw"] and axes.get_xlabel() == "name"
    (line,) = (line for line in axes.lines if line.get_marker() == "o")
    assert line.get_xydata().tolist() == [[0.0, 2.0], [1.0, 1.0]]
    assert line.get_linestyle() == "None"


def test_numbers_that_span_much_stand_on_a_logarithmic_axis_under_their_own_names():
    axes = drawn(*(group(1.0, rate=rate) for rate in (1e-3, 3e-3, 1e-2)))
    assert axes.get_xscale() == "log" and tick_labels(axes) == ["0.001", "0.003", "0.01"]
    (line,) = (line for line in axes.lines if line.get_marker() == "o")
    assert line.get_linestyle() == "-"


@pytest.mark.parametrize("other", [None, 1.5])
def test_runs_that_diverged_are_crosses_at_the_top(other):
    axes = drawn(group(1.0, rate=1), group(other, rate=2, diverged=1))
    (cross,) = (line for line in axes.lines if line.get_marker() == "x")
    assert cross.get_xydata().tolist() == [[2.0, 1.0]]
    assert cross.get_transform() == axes.get_xaxis_transform()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["diverged"]
