"""Training curves, drawn from metrics.jsonl."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gmpo.report.jsonl import read_records

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, LINE, EVAL, FAINT = "#222222", "#2a6f97", "#c8553d", "#dddddd"


def training_curves(metrics: str | Path, image: str | Path, *, title: str = "") -> None:
    """Draw reward, length, entropy, log-ratio, clip shares and gradient norm over the steps.

    Args:
        metrics: A metrics.jsonl.
        image: The file to write; its ending gives the format (.png, .svg, .pdf).
        title: Above the curves.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the file has no training step in it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    records = read_records(metrics)
    if not any("reward" in record for record in records):
        raise ValueError(
            f"{metrics} has no line of a training step. Log at least once (logging_steps)."
        )
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08, wspace=0.03)
    figure = Figure(figsize=(11, 5.6), layout=layout, dpi=140)
    FigureCanvasAgg(figure)
    for axes, draw in zip(figure.subplots(2, 3, sharex=True).flat, PANELS, strict=True):
        draw(axes, records)
        dress(axes)
    figure.suptitle(title, x=0.035, ha="left", fontsize=12, color=INK)
    figure.supxlabel("optimizer steps", fontsize=9, color=INK)
    Path(image).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image)


def series(records: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Return the steps and values of the figure `name`, where it was logged and finite."""
    points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def curve(axes: "Axes", records: Sequence[dict[str, Any]], name: str, **style: Any) -> None:
    steps, values = series(records, name)
    if steps:
        marker = "o" if len(steps) == 1 else None
        axes.plot(
            steps,
            values,
            **{"color": LINE, "linewidth": 1.6, "marker": marker, "markersize": 4, **style},
        )


def draw_reward(axes: "Axes", records: Sequence[dict[str, Any]]) -> None:
    axes.set_title("reward (mean of completions)")
    both = [r for r in records if r.get("reward") is not None and r.get("reward_std") is not None]
    steps = [r["step"] for r in both]
    low, high = ([r["reward"] + sign * r["reward_std"] for r in both] for sign in (-1, 1))
    axes.fill_between(steps, low, high, color=LINE, alpha=0.13, linewidth=0)
    curve(axes, records, "reward", label="training (± std)" if both else "training")
    curve(axes, records, "eval_reward", color=EVAL, marker="o", label="evaluation")
    if series(records, "eval_reward")[0]:
        axes.legend(loc="lower right")


def draw_length(axes: "Axes", records: Sequence[dict[str, Any]]) -> None:
    axes.set_title("completion length (tokens)")
    curve(axes, records, "completions/mean_length")
    axes.set_ylim(bottom=0)


def draw_entropy(axes: "Axes", records: Sequence[dict[str, Any]]) -> None:
    axes.set_title("entropy (nats per token)")
    curve(axes, records, "entropy")
    axes.set_ylim(bottom=0)


def draw_log_ratio(axes: "Axes", records: Sequence[dict[str, Any]]) -> None:
    axes.set_title("log-ratio of tokens (min .. max, nats)")
    both = [
        r
        for r in records
        if r.get("log_ratio/min") is not None and r.get("log_ratio/max") is not None
    ]
    steps = [r["step"] for r in both]
    low, high = ([r[name] for r in both] for name in ("log_ratio/min", "log_ratio/max"))
    axes.fill_between(steps, low, high, color=LINE, alpha=0.3, linewidth=0)
    axes.axhline(0, color=INK, linewidth=0.6)


def draw_clip_shares(axes: "Axes", records: Sequence[dict[str, Any]]) -> None:
    axes.set_title("share of tokens clipped")
    curve(axes, records, "clip_ratio/high_mean", label="high (positive advantage)")
    curve(axes, records, "clip_ratio/low_mean", color=EVAL, label="low (negative advantage)")
    axes.yaxis.set_major_formatter(lambda value, position: f"{value:.1%}")
    if axes.lines:
        axes.set_ylim(0, max(1.35 * axes.get_ylim()[1], 0.005))  # room for the legend
        axes.legend(loc="upper left")


def draw_grad_norm(axes: "Axes", records: Sequence[dict[str, Any]]) -> None:
    axes.set_title("gradient norm (before clipping)")
    curve(axes, records, "grad_norm")
    axes.set_ylim(bottom=0)


PANELS = (draw_reward, draw_length, draw_entropy, draw_log_ratio, draw_clip_shares, draw_grad_norm)


def dress(axes: "Axes") -> None:
    """Give a panel the quiet look of all."""
    axes.title.set(fontsize=10, color=INK, ha="left", position=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(labelsize=8, colors=INK, color=FAINT)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    if (legend := axes.get_legend()) is not None:
        legend.set_frame_on(False)
        for text in legend.get_texts():
            text.set(fontsize=8, color=INK)
