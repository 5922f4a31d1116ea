"""Conversion, costs, checkpoints and initialisers over models of many families.

    python benchmarks/zoo.py --models zoo.txt --out docs/results/zoo.jsonl --table docs/families.md

Each line of the file names a timm model, with arguments of `qat.timm_model` such as
`img_size=224,model_args=dict(depth=4)`; `#` begins a comment. What is checked is in `zoo_checks`.
Rows are kept by line, so a run may be done in pieces, by `--only`; the table shows them all.
"""

import argparse
import ast
import json
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from zoo_checks import CHECKS, COMPILING, INITIALISING, Subject, outcome, seed

import qat
from qat.cost.count import cost

CLAIMS = {
    "the plan `w8a8` is taken as it is": ("converts",),
    "the float phase computes the float model's bits": ("float", "float_train"),
    "MACs are those that torch's FLOP counter finds": ("macs",),
    "coverage is that of an independent count, `benchmarks/audit.py`": ("coverage",),
    "it calibrates": ("calibrates",),
    "it is saved and loaded to the same bits": ("saves",),
    "every parameter with a gradient in float has one": ("gradients",),
}
"""Checks behind each sentence of the table."""
Row = dict[str, Any]


def parse(line: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a line.

    Raises:
        ValueError: If an argument is more than plain data and `dict(...)`.
    """
    name, _, arguments = line.partition(" ")
    call = ast.parse(f"dict({arguments})", mode="eval").body
    return name, _value(call)


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
            return {str(keyword.arg): _value(keyword.value) for keyword in keywords}
        case ast.Tuple(elts=items):
            return tuple(map(_value, items))
        case ast.List(elts=items):
            return list(map(_value, items))
    return ast.literal_eval(node)


def lines_of(path: str | Path) -> list[str]:
    """The lines of a file that name models."""
    lines = (line.partition("#")[0].strip() for line in Path(path).read_text().splitlines())
    return [line for line in lines if line]


def examine(line: str, checks: Iterable[str]) -> Row:
    """The row of a line: for each check true, or why not, null where it could not be made.

    Seconds are those of the processor.
    """
    started = time.process_time()
    name, arguments = parse(line)
    known = {**CHECKS, **INITIALISING, **COMPILING}
    found: dict[str, bool | str | None] = dict.fromkeys(("builds", *checks))
    row: Row = {"line": line, "name": name, "arguments": arguments, "checks": found}
    made: list[Subject] = []
    seed()
    found["builds"] = outcome(lambda: made.append(Subject.of(qat.timm_model(name, **arguments))))
    if made:
        for check in checks:
            if check == "converts" or found["converts"] is True:
                found[check] = outcome(lambda check=check: known[check](made[0]))
        if found.get("coverage") is True:
            counted = cost(made[0].model)
            row |= {"macs": counted.macs, "coverage": counted.coverage_macs}
            row["uncounted"] = list(counted.uncounted)
    elif not builds_in_timm(name, arguments):
        found["builds"] = f"timm cannot build it: {found['builds']}"
    row["seconds"] = round(time.process_time() - started, 1)
    row["versions"] = versions()
    return row


def versions() -> dict[str, str]:
    """Of torch, of timm, and the commit of this checkout."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return {"torch": str(torch.__version__), "timm": timm.__version__, "commit": commit}


def builds_in_timm(name: str, arguments: dict[str, Any]) -> bool:
    """Whether timm builds a model by itself, given the same arguments."""
    model_args = arguments.get("model_args", {})
    sizes = {k: v for k, v in arguments.items() if k != "model_args" and v is not None}
    return outcome(lambda: timm.create_model(name, **sizes, **model_args)) is True


def table(rows: list[Row]) -> str:
    """The rows as Markdown; reasons that several models share stand below it once."""
    built = [row for row in rows if row["checks"]["builds"] is True]
    reasons = {reason: n for n, reason in enumerate(dict.fromkeys(_reasons(built)), 1)}
    text = [
        "# Families",
        "",
        f"{len(built)} models that timm builds, with random weights and every operand on 8 bits",
        f"({_versions(built)}). For each of them `benchmarks/zoo.py` tries, and notes in the",
        "[rows](results/zoo.jsonl) with the commit:",
        "",
        *(f"- {claim}: {_passed(built, names)};" for claim, names in CLAIMS.items()),
        "- the initialisers of the last column: they work, or refuse in one line (a number).",
        "",
        "Covered is the share of multiply-accumulates (MACs) whose operands are quantized.",
        "",
        "| model | covered | does not pass | initialisers |",
        "|---|---|---|---|",
        *(_line(row, reasons) for row in built),
        "",
        *(f"{n}. {reason}." for reason, n in reasons.items()),
    ]
    unbuilt = [row for row in rows if row["checks"]["builds"] is not True]
    if unbuilt:
        text += ["", "Not built by timm:", ""]
        text += [f"- `{row['line']}`: {_cause(row['checks']['builds'])}" for row in unbuilt]
    return "\n".join([*text, ""])


def _cause(reason: str) -> str:
    """What timm says, of a line that says more."""
    return reason.partition(";")[0].rpartition("': ")[2]


def _line(row: Row, reasons: dict[str, int]) -> str:
    found = row["checks"]
    share = f"{row['coverage']:.2%}" if "coverage" in row else "-"
    share = f"at most {share}" if row.get("uncounted") else share
    failed = [
        _marked(name, found.get(name), reasons) for name in CHECKS if found.get(name) is not True
    ]
    starts = [_marked(name, found.get(name), reasons) for name in INITIALISING]
    return f"| `{row['line']}` | {share} | {', '.join(failed)} | {', '.join(starts)} |"


def _marked(name: str, result: bool | str | None, reasons: dict[str, int]) -> str:
    return name if result is True else f"{name} ({reasons.get(_reason(result), 'not tried')})"


def _reasons(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        for name in (*CHECKS, *INITIALISING):
            if isinstance(result := row["checks"].get(name), str):
                yield _reason(result)


def _reason(result: bool | str | None) -> str:
    """The first sentence of an error of ours; a raw error as it is."""
    return str(result).removeprefix("ours: ValueError: ").partition(". ")[0].rstrip(".")


def _passed(rows: list[Row], names: tuple[str, ...]) -> str:
    passed = sum(all(row["checks"].get(name) is True for name in names) for row in rows)
    return f"{passed} of {len(rows)}"


def _versions(rows: list[Row]) -> str:
    found = (f"torch {row['versions']['torch']}, timm {row['versions']['timm']}" for row in rows)
    return "; ".join(dict.fromkeys(found))


def summary(rows: list[Row]) -> str:
    """How many rows passed each check, and how many errors were raw."""
    checks = dict.fromkeys(name for row in rows for name in row["checks"])
    made = {name: [row["checks"].get(name) for row in rows] for name in checks}
    counts = [
        f"{name} {found.count(True)}/{sum(x is not None for x in found)}"
        for name, found in made.items()
    ]
    raw = sum(str(x).startswith("raw") for found in made.values() for x in found)
    seconds = sum(row["seconds"] for row in rows)
    return f"{len(rows)} models, {raw} raw errors, {seconds:.0f} s: {', '.join(counts)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", required=True)
    parser.add_argument("--only", nargs="+", help="names of models; others keep their rows")
    parser.add_argument("--checks", nargs="+", choices=[*CHECKS, *INITIALISING, *COMPILING])
    parser.add_argument("--compile", action="store_true", help="also check torch.compile")
    parser.add_argument("--out", default="docs/results/zoo.jsonl")
    parser.add_argument("--table", default="docs/families.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [*CHECKS, *INITIALISING, *(COMPILING if given.compile else ())]
    checks = ["converts", *given.checks] if given.checks else chosen
    out, lines = Path(given.out), lines_of(given.models)
    rows: dict[str, Row] = {}
    if out.exists():
        rows = {row["line"]: row for row in map(json.loads, out.read_text().splitlines())}
    for line in lines:
        if given.only and parse(line)[0] not in given.only:
            continue
        rows[line] = row = examine(line, dict.fromkeys(checks))
        print(f"{line}: {row['seconds']} s", flush=True)
        for name, result in row["checks"].items():
            if isinstance(result, str):
                print(f"    {name}: {result}", flush=True)
        kept = [rows[line] for line in lines if line in rows]
        out.write_text("".join(f"{json.dumps(row)}\n" for row in kept))
        Path(given.table).write_text(table(kept))
    print(summary([rows[line] for line in lines if line in rows]))


if __name__ == "__main__":
    main()
