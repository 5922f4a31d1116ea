"""What the exported file saves."""

from collections.abc import Callable

from qat.cli.charts.costs import beside_float_chart
from qat.cli.charts.theme import Drawing, spec
from qat.cli.report.parts import Chart, Part, Section, Table
from qat.cli.report.run import Run
from qat.cli.report.wording import Number, duration, percent, plain, size

CHECKS = {
    "n_images": ("images compared with the simulated model", plain),
    "agreement": ("of the same class", percent),
    "logit_gap": ("largest gap of logits", plain),
    "n_codes": ("codes compared", plain),
    "n_codes_wrong": ("codes that differ away from a threshold", plain),
}
BESIDE = {
    ("size_float_bytes", "size_packed_bytes"): ("Size of the file", size),
    ("size_float_bytes", "size_onnx_bytes"): ("Size of the file", size),
    ("seconds_per_image_float", "seconds_per_image"): ("Time of an image", duration),
}


def export(run: Run) -> Section | None:
    """Size and speed beside the float model, and the check of the file."""
    charts = [
        Chart(spec(_beside(found, *BESIDE[keys])), f"{BESIDE[keys][0]}, float and exported")
        for keys in BESIDE
        if (found := run.numbers(*keys))
    ]
    if not charts:
        return None
    suffix = "" if run.get("command") == "export" else "_packed"
    rows = [
        [text, form(value)]
        for key, (text, form) in CHECKS.items()
        if (value := run.get(key + suffix)) is not None
    ]
    parts: list[Part] = [*charts, *([Table(("Check of the file", ""), rows)] if rows else [])]
    words = (
        "The exported file beside the float model: grey is float in torch, blue is the file run "
        "without torch, both on this machine's processor. Good is a short blue bar, and no code "
        "that differs."
    )
    return Section("Exported file", words, parts)


def _beside(found: list[Number], title: str, form: Callable[[Number], str]) -> Drawing:
    exact, exported = found
    return beside_float_chart((exact, exported), (form(exact), form(exported)), title)
