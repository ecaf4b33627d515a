"""Pictures of what precisions cost: quality against bytes, errors along the depth, and the outliers of activations."""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quantizers.errors import InvalidInput
from quantizers.report import Activations, Report
from server.comparison import Comparison

STRONGEST = 64  # channels that are drawn: the others lie together
FLOOR = 1e-5  # nats a token: where the logarithmic axis ends, and fp32 itself, which loses nothing, is drawn


def check_picture(path: Path) -> None:
    """Raises InvalidInput for a name that is no picture's."""
    if path.suffix not in (".svg", ".png"):
        raise InvalidInput(f"{str(path)!r}: a plot is written as .svg or .png", param="plot")


def plot_quality(name: str, reports: Sequence[Report], path: Path) -> None:
    """Write an SVG or PNG, by the suffix of `path`: KL to fp32 over bytes, each point a recipe, its area the speed of decoding."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    _quality(axes, reports)
    axes.set_title(name)
    _save(figure, name, path)


def plot_comparison(found: Comparison, path: Path) -> None:
    """Quality against bytes; the error of each decoder block's output; the outliers of each layer's input, and the channels of the worst
    one, before and after smoothing. What was not measured is left out.
    """
    panels: list[Callable[[Axes], None]] = [lambda axes: _quality(axes, [row.report for row in found.variants])]
    if any(row.block_errors for row in found.variants):
        panels.append(lambda axes: _errors(axes, found))
    if found.before is not None:
        before = found.before
        after = {row.report.recipe: row.after for row in found.variants if row.after is not None}
        panels.append(lambda axes: _outliers(axes, before, after))
        panels.append(lambda axes: _channels(axes, before, after))
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(13 if len(panels) > 1 else 7, 4.5 * rows), layout="constrained")
    for index, draw in enumerate(panels, start=1):
        draw(figure.add_subplot(rows, min(2, len(panels)), index))
    text = found.text.replace("$", r"\$")  # a file's name is no formula
    figure.suptitle(f"{found.checkpoint}: {found.windows} windows of {found.window_tokens} tokens of {text}")
    _save(figure, found.checkpoint, path)


def _save(figure: Figure, name: str, path: Path) -> None:
    with mpl.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):  # the same numbers give the same file; text stays text
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _quality(axes: Axes, reports: Sequence[Report]) -> None:
    megabytes = [sum(report.bytes.values()) / 1e6 for report in reports]
    divergences = [max(report.kl_divergence, FLOOR) for report in reports]
    fastest = max(report.decode_tokens_per_second for report in reports) or 1.0
    areas = [20 + 180 * report.decode_tokens_per_second / fastest for report in reports]
    axes.scatter(megabytes, divergences, s=areas, alpha=0.7)
    for report, x, y in zip(reports, megabytes, divergences, strict=True):
        axes.annotate(
            f"{report.recipe} ({report.decode_tokens_per_second:.0f} tok/s)", (x, y), xytext=(7, 5), textcoords="offset points", fontsize=8
        )
    axes.set(xlabel="MB in memory", ylabel="KL to fp32, nats a token", yscale="log", ylim=(FLOOR / 2, None))
    axes.margins(x=0.2)
    axes.grid(alpha=0.3)


def _errors(axes: Axes, found: Comparison) -> None:
    for row in found.variants:
        if row.block_errors:
            axes.plot(range(len(row.block_errors)), row.block_errors, marker=".", label=row.report.recipe)
    axes.set(xlabel="decoder block", ylabel="relative error of its output, in fp32 arithmetic", yscale="log")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _outliers(axes: Axes, before: Activations, after: dict[str, Activations]) -> None:
    for label, activations in {"the checkpoint": before, **after}.items():
        axes.plot([each.outlier for each in activations.inputs], linewidth=1, label=label)
    axes.set(xlabel="input of linear layers, in the order of the model", ylabel="largest channel / median channel", yscale="log")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def _channels(axes: Axes, before: Activations, after: dict[str, Activations]) -> None:
    """The strongest channels of the checkpoint. Scaled by the median, since only proportions cost an int8 token its resolution."""
    strongest = sorted(range(len(before.channels)), key=lambda channel: -before.channels[channel])[:STRONGEST]
    for label, activations in {"the checkpoint": before, **after}.items():
        ordered = sorted(activations.channels)
        median = ordered[len(ordered) // 2] or 1.0
        axes.plot([activations.channels[channel] / median for channel in strongest], linewidth=1, label=label)
    axes.set(
        xlabel=f"the {len(strongest)} strongest channels of {len(before.channels)}, input of {before.widest}",
        ylabel="largest magnitude / median channel",
        yscale="log",
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
