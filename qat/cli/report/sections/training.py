"""How a training run went: curves, weights, layers that oscillate, signs of activations."""

from qat.cli.charts.theme import spec
from qat.cli.charts.training import (
    balance_grid,
    curve_chart,
    share_grid,
    weights_chart,
    weights_over_time_chart,
)
from qat.cli.report.parts import Chart, Section
from qat.cli.report.run import Run

CURVES: dict[str, dict[str, str]] = {
    "loss": {"train/loss": "training", "val/loss": "validation"},
    "top-1 accuracy": {"val/top1": "validation"},
    "noise error": {"val/noise_error": "validation"},
    "share of weights": {"weights/flip_rate": "flip in a step", "weights/oscillating": "oscillate"},
    "sign entropy, bits": {"activations/sign_entropy": "binary activations"},
}
"""What is drawn of `metrics.csv`: titles of axes, columns, and their names."""


def curves(run: Run) -> Section | None:
    """What was logged in training."""
    rows = run.table("metrics.csv")
    parts = []
    for title, lines in CURVES.items():
        logged = {key for row in rows for key in lines if row.get(key) is not None}
        found = {key: name for key, name in lines.items() if key in logged}
        if found:
            parts.append(Chart(spec(curve_chart(rows, found, title)), f"{title} by step"))
    words = (
        "Each point is one entry of the log. Good is a loss that falls and then levels out; a "
        "validation loss that rises again while the training loss falls means overfitting."
    )
    return Section("Training", words, parts) if parts else None


def weights(run: Run) -> Section | None:
    """Distribution of the latent weights over time."""
    rows = run.table("weights.csv")
    if len(rows) < 2:
        return None
    words = (
        "Where the weights lie, each in units of the mean magnitude of its row. For binary weights "
        "good is two bands, near −1 and +1, with little between them: a weight near 0 flips its "
        "sign at the slightest step."
    )
    parts = [
        Chart(spec(weights_over_time_chart(rows)), "distribution of weights by epoch"),
        Chart(spec(weights_chart(rows)), "distribution of weights at the start and the end"),
    ]
    return Section("Weights over time", words, parts)


def oscillation(run: Run) -> Section | None:
    """Layers whose weights keep changing their code."""
    rows = run.table("oscillation.csv")
    if not rows:
        return None
    last = [row for row in rows if row["epoch"] == rows[-1]["epoch"]]
    titles = {
        "oscillating": "Weights that oscillate",
        "near_boundary": "Weights near the boundary",
    }
    words = (
        "The share of each layer's weights, in the last epoch, that switch between two codes again "
        "and again, and that lie so near the boundary between two codes that they may. Good is "
        "pale: weights that have settled."
    )
    parts = [
        Chart(spec(share_grid(last, key, title)), f"{title} by layer")
        for key, title in titles.items()
    ]
    return Section("Oscillation by layer", words, parts)


def signs(run: Run) -> Section | None:
    """Balance of the signs of binary activations, before and after their shift."""
    rows = run.table("signs.csv")
    if not rows:
        return None
    titles = {"imbalance_before": "Before the shift", "imbalance_after": "After the shift"}
    words = (
        "How unequal the two signs of each binary activation are, mean over its channels: 0 is "
        "half and half, 1 is a channel that always has the same sign and says nothing. Good is a "
        "second map that is paler than the first: the shift (ASM) has balanced the signs."
    )
    parts = [
        Chart(spec(balance_grid(rows, key, title)), f"imbalance of signs, {title}")
        for key, title in titles.items()
    ]
    return Section("Signs of activations", words, parts)
