import json
import subprocess
import sys

import pytest

from gmpo.report import plots

pytest.importorskip("matplotlib")


@pytest.fixture
def axes():
    from matplotlib.figure import Figure

    return Figure().subplots()


@pytest.fixture
def metrics(tmp_path):
    def write(*records):
        path = tmp_path / "metrics.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write


def drawn(axes, label):
    line = next(line for line in axes.lines if line.get_label() == label)
    return list(line.get_xdata()), list(line.get_ydata())


def test_reward_of_training_and_evaluation_are_two_curves_over_their_own_steps(axes):
    records = [
        {"step": 1, "reward": 0.25},
        {"step": 2, "reward": None},  # a figure that was not finite
        {"step": 2, "eval_reward": 0.75},
        {"step": 3, "reward": 0.5},
    ]
    plots.draw_reward(axes, records)
    assert drawn(axes, "training") == ([1, 3], [0.25, 0.5])
    assert drawn(axes, "evaluation") == ([2], [0.75])


def test_the_log_ratio_is_a_band_from_minimum_to_maximum(axes):
    records = [
        {"step": 1, "log_ratio/min": -0.5, "log_ratio/max": 0.25},
        {"step": 2, "log_ratio/min": -1.0},
    ]
    records.append({"step": 3, "log_ratio/min": -0.75, "log_ratio/max": 1.5})
    plots.draw_log_ratio(axes, records)
    corners = {tuple(corner) for corner in axes.collections[0].get_paths()[0].vertices.tolist()}
    assert corners == {(1.0, -0.5), (1.0, 0.25), (3.0, -0.75), (3.0, 1.5)}


def test_clip_shares_show_both_sides_apart(axes):
    plots.draw_clip_shares(
        axes, [{"step": 4, "clip_ratio/low_mean": 0.01, "clip_ratio/high_mean": 0.02}]
    )
    assert drawn(axes, "high (positive advantage)") == ([4], [0.02])
    assert drawn(axes, "low (negative advantage)") == ([4], [0.01])


def test_the_picture_has_a_panel_for_each_figure_even_where_one_was_never_logged(metrics, tmp_path):
    path = metrics(
        {"step": 1, "reward": 0.5},
        {"step": 2, "reward": 0.75, "entropy": 1.0},
        {"step": 2, "train_runtime": 1},
    )
    image = tmp_path / "pictures" / "curves.svg"
    plots.training_curves(path, image, title="a run")
    text = image.read_text()
    for heading in (
        "a run",
        "reward",
        "completion length",
        "entropy",
        "log-ratio",
        "tokens clipped",
        "gradient norm",
    ):
        assert heading in text


def test_a_file_without_training_steps_is_refused_with_what_to_do(metrics, tmp_path):
    with pytest.raises(ValueError, match="logging_steps"):
        plots.training_curves(metrics({"step": 0, "eval_reward": 1.0}), tmp_path / "curves.png")


def test_matplotlib_is_loaded_only_when_something_is_drawn():
    code = "import sys, gmpo.report.plots; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
