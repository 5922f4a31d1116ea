"""What adaptation did: under each corruption, and batch by batch."""

from qat.cli.charts.stream import corruption_chart, effect, outcome_chart, stream_chart
from qat.cli.charts.theme import spec
from qat.cli.report.parts import Chart, Note, Part, Section
from qat.cli.report.run import Run
from qat.cli.report.wording import count

COUNTS = {
    "n_adapted": "adapted",
    "n_skipped": "skipped",
    "n_rolled_back": "rolled back",
    "n_reset": "reset",
}

ERRORS = ("error", "error_source")


def corruptions(run: Run) -> Section | None:
    """Error under each corruption."""
    rows = [row for row in run.rows("table") if row.keys() >= {"corruption", *ERRORS}]
    if not rows:
        return None
    words = (
        "The share of wrong answers under each corruption, of the model left alone and of the one "
        "that adapts. Good is a blue bar that is shorter than the grey one above it."
    )
    drawn = Chart(spec(corruption_chart(rows)), "error by corruption", wide=True)
    return Section("Corruptions", words, [drawn])


def adaptation(run: Run) -> Section | None:
    """The stream, batch by batch."""
    rows = run.table("stream.csv")
    if not rows:
        return None
    parts: list[Part] = [Note(effect(rows, run.get("never_adapted")))]
    parts.append(Chart(spec(stream_chart(rows)), "error along the stream", wide=True))
    parts.append(Chart(spec(outcome_chart(rows)), "what became of each batch", wide=True))
    ended = {word: run.numbers(key) or [0] for key, word in COUNTS.items()}
    counts = [f"{count(number)} {word}" for word, (number,) in ended.items() if number]
    words = (
        "The error along the stream, and below it what became of each batch"
        + (f" ({', '.join(counts)})" if counts else "")
        + "; a cross marks batches in which images were refused. Good is a blue line below the "
        "grey one, and few resets."
    )
    return Section("Stream", words, parts)
