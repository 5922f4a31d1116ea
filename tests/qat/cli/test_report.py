"""The page of `report`, from folders as commands leave them."""

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qat.cli.charts.search import POINTS, bits_chart, frontier_chart, sensitivity_chart
from qat.cli.charts.stream import effect, outcome_chart, stream_chart
from qat.cli.charts.theme import in_grid, spec
from qat.cli.main import main
from qat.cli.report import wording
from qat.cli.report.page import page
from qat.cli.report.run import Run
from qat.cli.report.sections.export import export
from qat.cli.report.side_by_side import side_by_side
from qat.cli.run_folder import RunFolder
from qat.cli.tables import read_table
from qat.disk import csv_of

HOSTILE = "<img src=x onerror=alert(1)></script>"
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABh6FO1AAAAABJRU5ErkJggg=="
)
PRODUCTS = [
    {"layer": name, "precision": precision, "bits": bits, "macs": 100, "bops": 100 * bits,
     "weight_bytes": 10.0, "reason": "" if bits < 16 else "no rule matches it"}
    for name, precision, bits in (
        ("patch_embed.proj", "float", 32), ("blocks.0.attn.qkv", "w1a1", 1),
        ("blocks.1.attn.qkv", "w4a8", 8), (HOSTILE, "float", 32),
    )
]  # fmt: skip
METRICS: dict[str, dict[str, Any]] = {
    "fit": {"command": "fit", "top1": 0.97, "top1_teacher": 0.98, "size_bytes": 156_000,
            "bops": 9e6, "macs": 1e6, "num_parameters": 340_000, "coverage_macs": 0.5,
            "seconds": 184.2, "products": PRODUCTS, "size_float_bytes": 1.4e6,
            "size_packed_bytes": 1.8e5, "seconds_per_image_float": 0.004,
            "seconds_per_image": 0.001,
            "agreement_packed": 1.0,
            "doctor": [{"cause": HOSTILE, "evidence": "e", "layer": "l", "suggestion": "s"}]},
    "search": {"command": "search", "measure": "bops", "cost": 2e9, "loss": 0.5, "budget": 2.5e9,
               "mean_bits_weight": 4.0, "products": PRODUCTS},
    "adapt": {"command": "adapt", "error_mean": 0.3, "error_source_mean": 0.4, "n_adapted": 2,
              "n_reset": 1, "table": [
                  {"corruption": HOSTILE, "n_images": 9, "error": 0.3, "error_source": 0.4}]},
    "dit": {"command": "quantize", "noise_error": 0.04, "noise_error_float": 0.02,
            "noise_error_by_time": [
                {"first": 0, "last": 9, "noise_error": 0.04, "noise_error_float": 0.02}]},
}  # fmt: skip
STREAM = [
    {"position": i, "domain": ("fog", HOSTILE)[i // 2], "n_images": 4, "n_refused": i % 2,
     "error": 0.25 * i, "error_source": 0.3, "outcome": ("adapted", "reset")[i // 3], "reason": ""}
    for i in range(4)
]  # fmt: skip
SENSITIVITY = [
    {"module": module, "operand": operand, "bits": bits, "sensitivity": 0.1 / bits,
     "chosen": int(bits == 4)}
    for module in ("patch_embed.proj", "blocks.0.attn.qkv", "blocks.1.attn.qkv")
    for operand in ("weight", "input")
    for bits in (2, 4, 8)
]  # fmt: skip
FRONTIER = [{"bops": 1e9 + 1e6 * i, "loss": 1 / (1 + i)} for i in range(3000)]
WEIGHTS = [{"epoch": i, "-1.00": 0.2, "0.00": 0.6, "1.00": 0.2} for i in range(3)]
LAYERS = ("blocks.0.attn.qkv", HOSTILE)
OSCILLATION = [
    {"epoch": 1, "layer": name, "flip_rate": 0.1, "oscillating": 0.2, "near_boundary": 0.01}
    for name in LAYERS
]
SIGNS = [{"layer": name, "imbalance_before": 0.9, "imbalance_after": 0.1} for name in LAYERS]
CURVES = [{"epoch": 0, "step": i, "train/loss": 1 / (i + 1), "val/top1": ""} for i in range(5)]
TABLES = {
    "fit": {"metrics.csv": CURVES, "weights.csv": WEIGHTS, "oscillation.csv": OSCILLATION,
            "signs.csv": SIGNS},
    "search": {"sensitivity.csv": SENSITIVITY, "frontier.csv": FRONTIER},
    "adapt": {"stream.csv": STREAM},
    "dit": {},
}  # fmt: skip
SECTIONS = {
    "fit": ["Findings of the doctor", "Training", "Weights over time", "Oscillation by layer",
            "Signs of activations", "Exported file", "Precision by layer"],
    "search": ["Sensitivities and chosen bits", "Frontier of plans", "Precision by layer"],
    "adapt": ["Corruptions", "Stream"],
    "dit": ["Samples"],
}  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, Path]:
    """A folder for each command, as the command leaves it, with names that are HTML."""
    for name, metrics in METRICS.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps(metrics | {"recipe": HOSTILE, "seed": 0}))
        (folder / "config.yaml").write_text(json.dumps({"seed_everything": 0, "data": name}))
        for table, rows in TABLES[name].items():
            (folder / table).write_bytes(csv_of(rows))
    for name in ("samples.png", "samples_float.png"):
        (tmp_path / "dit" / name).write_bytes(PIXEL)
    return {name: tmp_path / name for name in METRICS}


def _page(*folders: Path) -> str:
    return page([Run.read(folder) for folder in folders])


def _body(html: str) -> str:
    """The page without the scripts that draw, which are others' code."""
    return html[: html.index("</main>")]


@pytest.mark.parametrize("name", list(METRICS))
def test_page_has_the_sections_that_the_run_has_something_of(
    runs: dict[str, Path], name: str
) -> None:
    body = _body(_page(runs[name]))
    assert re.findall("<h2>(.*?)</h2>", body) == SECTIONS[name]
    assert body.count('<p class="words">') == len(SECTIONS[name])


def test_cards_compare_with_the_float_model(runs: dict[str, Path]) -> None:
    body = _body(_page(runs["fit"]))
    for text in ("0.970", "teacher 0.980", "156 kB", "9.0× below float", "114× below float"):
        assert text in body, text


def test_names_from_a_run_never_become_html(runs: dict[str, Path]) -> None:
    body = _body(_page(*runs.values()))
    assert "onerror=alert(1)" in body
    assert "<img src=x" not in body and "alert(1)></script>" not in body


def test_page_asks_the_network_for_nothing(runs: dict[str, Path]) -> None:
    html = _page(runs["dit"])
    assert "default-src 'none'" in html and "<link" not in html
    assert all(uri.startswith("data:") for uri in re.findall(r'src="(.*?)"', _body(html)))


def test_run_that_has_not_ended_shows_what_there_is(runs: dict[str, Path]) -> None:
    (runs["fit"] / "metrics.json").unlink()
    body = _body(_page(runs["fit"]))
    assert "has not ended" in body and "<h2>Training</h2>" in body and "<dl" not in body


def test_damaged_table_is_named_and_the_rest_is_shown(runs: dict[str, Path]) -> None:
    (runs["fit"] / "weights.csv").write_text("epoch,0.1\n0,what\n1,2\n")
    body = _body(_page(runs["fit"]))
    assert "weights.csv&#39; is damaged" in body and "Weights over time" not in body
    assert "<h2>Training</h2>" in body


def test_torn_last_row_of_a_table_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("layer,loss\na,1\nb,2")
    assert read_table(tmp_path / "t.csv") == [{"layer": "a", "loss": 1.0}]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no run folder"),
        ({}, "is no run folder"),
        ({"metrics.json": "{"}, "is damaged"),
        ({"metrics.json": "[]"}, "is damaged"),
        ({"config.yaml": ""}, "damaged"),
    ],
)
def test_folder_without_a_run_is_one_clear_line(
    tmp_path: Path, content: dict[str, str] | None, said: str
) -> None:
    folder = tmp_path / "run"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(ValueError, match=said):
        Run.read(folder)


def test_command_writes_beside_the_first_run_or_where_it_is_told(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(runs["dit"])]) == 0
    assert (runs["dit"] / "report.html").read_text().startswith("<!doctype html>")
    output = tmp_path / "a.html"
    assert main(["report", str(runs["dit"]), str(runs["adapt"]), "--output", str(output)]) == 0
    assert "Runs side by side" in output.read_text()
    assert main(["report"]) == 1
    assert "no run to report on" in capsys.readouterr().err


def test_settings_that_differ_stand_side_by_side() -> None:
    """Not those that are the same, nor arguments of different classes, nor other sections."""
    recipes: list[dict[str, Any]] = [
        {"seed": 0, "lr": 0.1, "model": {"class_path": "a.A", "init_args": {"x": 1}}, "search": {}},
        {"seed": 0, "lr": 0.2, "model": {"class_path": "b.B", "init_args": {"x": 2}}},
    ]
    found = [Run(RunFolder("run"), name, {"top1": 0.5}, recipes[i]) for i, name in enumerate("ab")]
    _, settings = side_by_side(found).parts
    assert settings.rows == [["lr", "0.1", "0.2"], ["model", "a.A", "b.B"]]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (wording.size, 12_345_678, "12.3 MB"),
        (wording.size, 999_960, "1 MB"),
        (wording.size, 640, "640 B"),
        (wording.count, 8_947_776, "8.95 M"),
        (wording.count, 360, "360"),
        (wording.share, 0.70312, "0.703"),
        (wording.percent, 0.9999, "99.9 %"),
        (wording.percent, 1, "100 %"),
        (wording.percent, 0.0001, "< 0.1 %"),
        (wording.duration, 0.0021, "2.1 ms"),
        (wording.duration, 183.5, "3 min 4 s"),
        (wording.duration, 7300, "2.0 h"),
        (wording.times, 8.66, "8.7×"),
        (wording.plain, None, "–"),
        (wording.plain, 5_265_000, "5,265,000"),
    ],
)
def test_numbers_are_written_as_people_read_them(form: Any, value: float, text: str) -> None:
    assert form(value) == text


def _drawn(drawing: Any) -> list[list[dict[str, Any]]]:
    """The rows of every layer of a chart."""
    whole = spec(drawing)
    data = (part.get("data") or whole["data"] for part in whole.get("layer", [whole]))
    return [whole["datasets"][each["name"]] for each in data]


def test_every_operand_has_one_cell_and_its_chosen_bits() -> None:
    (drawn,) = _drawn(sensitivity_chart(SENSITIVITY))
    assert [(row["part"], row["block"], row["bits"]) for row in drawn] == [
        (f"{part} {operand}", block, 4)
        for part, block in (("patch_embed.proj", "-"), ("attn.qkv", "0"), ("attn.qkv", "1"))
        for operand in ("weight", "input")
    ]
    for layer in _drawn(bits_chart(SENSITIVITY)):
        assert [row["bits"] for row in layer] == [4] * 6


@pytest.mark.parametrize("key", ["size_packed_bytes", "size_onnx_bytes"])
def test_exported_file_of_either_form_stands_beside_the_float_model(key: str) -> None:
    section = export(Run(RunFolder("run"), "a", {"size_float_bytes": 4e6, key: 1e6}, {}))
    assert section is not None
    (chart,) = section.parts
    said = json.dumps(chart.spec)  # type: ignore[union-attr]
    assert all(text in said for text in ("4 MB", "1 MB", '"exported"'))


def test_blocks_of_stages_keep_both_numbers() -> None:
    (row,) = in_grid([{"layer": "layers.2.blocks.1.mlp.fc1"}])
    assert (row["block"], row["part"]) == ("2.1", "mlp.fc1")


def test_long_frontier_is_thinned_and_its_plan_and_budget_are_marked() -> None:
    drawn = json.dumps(spec(frontier_chart(FRONTIER, (2e9, 0.5), 2.5e9, "bops")))
    assert drawn.count('"cost":') < 2 * POINTS
    assert "chosen plan" in drawn and "budget" in drawn


def test_stream_says_why_both_lines_are_one() -> None:
    same = [{**row, "error": row["error_source"]} for row in STREAM]
    assert "No batch adapted: of 4 batches" in effect(same, "of 4 batches 4 were skipped")
    assert "no batch better or worse" in effect(same, None)
    assert effect(STREAM, None) == "Of 4 batches, adaptation made 2 better and 2 worse."
    title = effect(same, None)
    assert spec(stream_chart(same, title))["title"] == title


def test_batches_with_refused_images_and_resets_are_marked() -> None:
    strip, crosses = _drawn(outcome_chart(STREAM))
    ends = [(cell["outcome"], cell["first"], cell["end"]) for cell in strip]
    assert ends == [("adapted", 0, 3), ("reset", 3, 4)]
    assert [cross["batch"] for cross in crosses] == [1.5, 3.5]


PROBE = """<script>
window.errors = []; addEventListener("error", (event) => errors.push(event.message));
addEventListener("load", () => setTimeout(() => {
  const inside = (node) => node.closest(".scroll") !== null;
  const wide = [...document.querySelectorAll("body *")].filter((node) => !inside(node)
    && node.getBoundingClientRect().right > document.documentElement.clientWidth + 1);
  const cards = [...document.querySelectorAll(".card *")];
  const cut = cards.filter((node) => node.scrollWidth > node.clientWidth);
  const found = {
    width: innerWidth, errors: errors, drawn: document.querySelectorAll(".chart svg").length,
    failed: document.querySelectorAll("[data-failed]").length,
    charts: document.querySelectorAll(".chart").length,
    wide: wide.map((node) => node.outerHTML.slice(0, 200)), cut: cut.map((n) => n.textContent),
  };
  parent.postMessage("found " + JSON.stringify(found), "*");
}, 3000));
</script>"""
FRAME = """<iframe src="page.html" style="border: 0; width: {width}px; height: 3000px"></iframe>
<script>addEventListener("message", (event) => (document.title = event.data));</script>"""
"""Chromium makes no window narrower than 500 pixels, but a frame."""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="Debian's package chromium draws it")
@pytest.mark.parametrize("width", [1280, 390])
def test_browser_draws_all_charts_within_the_page(
    runs: dict[str, Path], tmp_path: Path, width: int
) -> None:
    """At desktop and phone width: no error of a script, no element wider than the page."""
    html = _page(*runs.values()).replace("<head>", "<head>" + PROBE, 1)
    (tmp_path / "page.html").write_text(html)
    (tmp_path / "frame.html").write_text(FRAME.format(width=width))
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--dump-dom"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,3000"]
    words += ["--virtual-time-budget=20000", (tmp_path / "frame.html").as_uri()]
    dom = subprocess.run(["chromium", *words], capture_output=True, text=True, timeout=120).stdout
    said = re.search("<title>found (.*?)</title>", dom)
    assert said is not None, dom[:500]
    found = json.loads(said[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert found["width"] == width
    assert found["drawn"] == found["charts"] > 10
    assert (found["errors"], found["failed"], found["wide"], found["cut"]) == ([], 0, [], [])
