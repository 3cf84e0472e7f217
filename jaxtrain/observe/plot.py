"""The loss curve of a run folder as a PNG. It reads metrics.jsonl and nothing else."""

from __future__ import annotations

from pathlib import Path

from jaxtrain.observe.sinks import read_rows


def plot_loss(run_dir: Path) -> Path:
    """Draws training loss and held-out loss over steps into run_dir/loss.png; returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_rows(run_dir / "metrics.jsonl")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)", title=run_dir.name)
    for name, style in (("train/loss", "-"), ("eval/loss", "o-")):
        points = [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]
        if points:
            axes.plot(*zip(*points), style, label=name, linewidth=1.2, markersize=4)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    path = run_dir / "loss.png"
    figure.savefig(path, dpi=120)
    return path
