"""The numbers at the top of a run."""

from collections.abc import Callable, Iterator

from qat.cli.report.parts import Card
from qat.cli.report.run import Run
from qat.cli.report.wording import Number, count, duration, percent, plain, share, size, times

FLOAT_BITS = 32
BESIDE: dict[str, tuple[tuple[str, str], ...]] = {
    "top1": (("top1_float", "float"), ("top1_teacher", "teacher")),
    "noise_error": (("noise_error_float", "float"),),
    "class_accuracy": (("class_accuracy_float", "float"),),
    "frechet": (("frechet_float", "float"),),
    "error_mean": (("error_source_mean", "without adaptation"),),
}
"""Results that a result is compared with, the first that a run has, and their names."""
MEASURES: dict[str, tuple[str, Callable[[Number], str]]] = {
    "top1": ("Top-1 accuracy", share),
    "error_mean": ("Mean error", share),
    "noise_error": ("Noise error", lambda value: f"{value:.4f}"),
    "class_accuracy": ("Class accuracy", share),
    "frechet": ("Fréchet distance", lambda value: f"{value:.1f}"),
    "agreement": ("Agreement", share),
    "mean_bits_weight": ("Weight bits, mean", lambda value: f"{value:.2f}"),
    "mean_bits_activation": ("Activation bits, mean", lambda value: f"{value:.2f}"),
}


def cards(run: Run) -> list[Card]:
    """Those that the run has numbers for."""
    return [*_measures(run), *_costs(run)]


def float_bytes(run: Run) -> Number | None:
    """Bytes of the float model: as written, of the teacher, or 32 bits a parameter."""
    for key in ("size_float_bytes", "size_bytes_teacher"):
        if found := run.numbers(key):
            return found[0]
    found = run.numbers("num_parameters")
    return found[0] * FLOAT_BITS / 8 if found else None


def _measures(run: Run) -> Iterator[Card]:
    for key, (label, form) in MEASURES.items():
        if found := run.numbers(key):
            others = (
                f"{name} {form(run.metrics[other])}"
                for other, name in BESIDE.get(key, ())
                if run.numbers(other)
            )
            yield Card(label, form(found[0]), next(others, _other_side(run, key)))


def _other_side(run: Run, key: str) -> str:
    """Whose answers those of the run agree with."""
    sides = {"export": "with the simulated model", "adapt": "with the model left alone"}
    return sides.get(str(run.get("command")), "with float") if key == "agreement" else ""


def _costs(run: Run) -> Iterator[Card]:
    if found := run.numbers("size_bytes"):
        whole = float_bytes(run)
        ratio = _below(whole / found[0]) if whole and found[0] else ""
        yield Card("Size", size(found[0]), ratio)
    if found := run.numbers("bops", "macs"):
        ratio = _below(found[1] * FLOAT_BITS**2 / max(found[0], 1))
        yield Card("BOPs an image", count(found[0]), ratio)
    if found := run.numbers("coverage_macs"):
        yield Card("Below 16 bits", percent(found[0]), "of the MACs")
    if found := run.numbers("seconds"):
        calibration = run.numbers("seconds_calibration")
        beside = f"{duration(calibration[0])} of calibration" if calibration else ""
        yield Card("Run time", duration(found[0]), beside)
    if found := run.numbers("n_images"):
        refused = run.numbers("n_refused") or [0]
        yield Card("Images", count(found[0]), f"{plain(refused[0])} refused" if refused[0] else "")


def _below(ratio: Number) -> str:
    """How many times less than the float model; nothing where it is the float model."""
    return f"{times(ratio)} below float" if ratio > 1.05 else ""
