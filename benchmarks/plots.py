"""One look for every figure: a row of line plots, written as PNG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Line = tuple[Sequence[float], Sequence[float]]

_LINES_AROUND_A_LEGEND = 5
"""With more of them the legend goes beside the axes."""


@dataclass(frozen=True)
class Panel:
    """One set of axes. `lines` maps a label to its x and y values; `faint` lines are drawn thin, without markers."""

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Line]
    log_x: bool = False
    log_y: bool = False
    from_zero: bool = False
    faint: Sequence[str] = field(default_factory=tuple)


def draw(panels: Sequence[Panel], path: Path, *, columns: int = 2) -> Path:
    """Draw the panels in a grid and write them to `path`; a label has one colour in all of them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter, StrMethodFormatter

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.6 * columns, 3.8 * rows), squeeze=False, layout="constrained")
    for spare in axes.flat[len(panels) :]:
        spare.set_visible(False)
    labels = list(dict.fromkeys(label for panel in panels for label in panel.lines))
    for panel, ax in zip(panels, axes.flat, strict=False):
        for label, (x, y) in panel.lines.items():
            faint, colour = label in panel.faint, f"C{labels.index(label) % 10}"
            style = {"marker": "", "linewidth": 0.7} if faint else {"marker": "o", "markersize": 3, "linewidth": 1.6}
            ax.plot(x, y, label=label, color=colour, **style)
        ax.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        if panel.log_x:
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        if panel.log_y:
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.4)))
            ax.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.4)))
        ax.set_ylim(bottom=0) if panel.from_zero else None
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
        if len(panel.lines) > 1:
            many = len(panel.lines) > _LINES_AROUND_A_LEGEND
            place = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if many else {}
            ax.legend(frameon=False, fontsize="small", **place)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
