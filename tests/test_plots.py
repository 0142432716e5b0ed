"""The pictures are looked at by people; here, that they are written, and of the numbers that were given."""

import matplotlib.figure
import pytest
import torch
from matplotlib.image import imread

from peft_tint import Coefficients
from peft_tint.plots import plot_accuracy, plot_coefficients, plot_cross_task, plot_similarity, plot_training

TASKS = ["sst2", "mrpc", "stsb"]
CROSS = {a: {b: 0.9 if a == b else 0.5 for b in TASKS} for a in TASKS}
LOG = [{"step": 10 * i, "loss": 1.0, **{f"loss_{t}": 1 / i for t in TASKS}, "kept_sst2": 0.9} for i in (1, 2, 3)]
PLOTS = {
    "coefficients": lambda path: plot_coefficients(
        Coefficients(torch.rand(3, 4), TASKS, [f"encoder.layer.{i}.weight" for i in range(4)]), path
    ),
    "accuracy": lambda path: plot_accuracy({"tint": dict.fromkeys(TASKS, 0.5)}, path, "GLUE score", -1),
    "cross_task": lambda path: plot_cross_task(CROSS, path),
    "similarity": lambda path: plot_similarity(torch.eye(3), TASKS, path),
    "training": lambda path: plot_training([*LOG, {"step": 30, "best_step": 20}], TASKS, path),
}


@pytest.fixture
def figure(monkeypatch):
    """The figure that was saved last."""
    saved, save = [], matplotlib.figure.Figure.savefig

    def remember(self, *args, **kwargs):
        saved[:] = [self]
        return save(self, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", remember)
    return saved


@pytest.mark.parametrize("name", PLOTS)
def test_each_picture_is_written(name, tmp_path):
    PLOTS[name](tmp_path / "picture.png")
    assert imread(tmp_path / "picture.png")[..., :3].std() > 0.01  # not blank


def test_the_matrix_has_an_encoder_a_row_and_a_head_a_column(figure, tmp_path):
    scores = {"sst2": {"sst2": 0.9, "mrpc": 0.25}, "mrpc": {"sst2": 0.5, "mrpc": 0.75}}
    plot_cross_task(scores, tmp_path / "cross.png")
    axes = figure[0].axes[0]
    assert axes.images[0].get_array().tolist() == [[0.9, 0.25], [0.5, 0.75]]
    assert {text.get_position(): text.get_text() for text in axes.texts}[1, 0] == "0.25"  # column, row
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("encoder", "head")


def test_curves_have_a_panel_a_measure_and_a_line_a_task_that_has_it(figure, tmp_path):
    PLOTS["training"](tmp_path / "training.png")
    lines = {axes.get_title(): {line.get_label(): line for line in axes.lines} for axes in figure[0].axes}
    assert {measure: list(own) for measure, own in lines.items()} == {"loss": TASKS, "kept": ["sst2"]}
    assert lines["loss"]["mrpc"].get_xydata().tolist() == [[10, 1], [20, 1 / 2], [30, 1 / 3]]
    with pytest.raises(ValueError, match="no measures of these tasks"):
        plot_training([{"step": 1}], TASKS, tmp_path / "training.png")
