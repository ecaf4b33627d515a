"""The picture beside the table of `precis evaluate`: what each precision holds against what it loses."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from quantizers.report import Report

FLOOR = 1e-5  # nats a token: where the logarithmic axis ends, and fp32 itself, which loses nothing, is drawn


def plot_quality(name: str, reports: Sequence[Report], path: Path) -> None:
    """Write an SVG or PNG, by the suffix of `path`: KL to fp32 over bytes, each point a recipe, its area the speed of decoding."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    megabytes = [sum(report.bytes.values()) / 1e6 for report in reports]
    divergences = [max(report.kl_divergence, FLOOR) for report in reports]
    fastest = max(report.decode_tokens_per_second for report in reports) or 1.0
    areas = [20 + 180 * report.decode_tokens_per_second / fastest for report in reports]
    axes.scatter(megabytes, divergences, s=areas, alpha=0.7)
    for report, x, y in zip(reports, megabytes, divergences, strict=True):
        axes.annotate(
            f"{report.recipe} ({report.decode_tokens_per_second:.0f} tok/s)", (x, y), xytext=(7, 5), textcoords="offset points", fontsize=8
        )
    axes.set(xlabel="MB in memory", ylabel="KL to fp32, nats a token", yscale="log", ylim=(FLOOR / 2, None), title=name)
    axes.margins(x=0.2)
    axes.grid(alpha=0.3)
    with mpl.rc_context({"svg.hashsalt": name}):  # the same numbers give the same file
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
