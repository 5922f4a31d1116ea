"""Measured seconds of every product at every pair of widths, as a table in a file.

    site,left_bits,right_bits,seconds
    blocks.0.attn.qkv,8,8,0.000309

`site` is the name that `train.py plan` prints, or an `fnmatch` pattern of such names; the first row
that matches counts. `left` is the input, or the left operand of an attention product; `right` the
weight, or the right operand. `benchmarks/latency_table.py` measures one on this machine.
"""

import csv
import fnmatch
from dataclasses import dataclass
from pathlib import Path

from qat.cost.count import Width

COLUMNS = ("site", "left_bits", "right_bits", "seconds")


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of products, for one image.

    Attributes:
        path: Where it was read from.
        rows: Pattern, widths of both operands, seconds.
    """

    path: str
    rows: tuple[tuple[str, int, int, float], ...]

    @staticmethod
    def load(path: str | Path) -> "LatencyTable":
        """Read a table.

        Raises:
            ValueError: If the file is missing or no such table.
        """
        try:
            with open(path, newline="") as file:
                items = list(csv.DictReader(file))
            rows = tuple(
                (r["site"], int(r["left_bits"]), int(r["right_bits"]), float(r["seconds"]))
                for r in items
            )
        except FileNotFoundError:
            raise ValueError(
                f"no latency table '{path}'; measure one with benchmarks/latency_table.py"
            ) from None
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"latency table '{path}': needs the columns {', '.join(COLUMNS)}, got {error!r}"
            ) from None
        return LatencyTable(str(path), rows)

    def seconds(self, site: str, bits: tuple[Width, Width]) -> float:
        """Seconds of a product.

        Raises:
            ValueError: If it was not measured.
        """
        for pattern, left, right, seconds in self.rows:
            if (left, right) == bits and fnmatch.fnmatchcase(site, pattern):
                return seconds
        raise ValueError(
            f"latency table '{self.path}' has no row for {site} at {bits[0]} x {bits[1]} bits; "
            "measure it, or leave the width out of search.weights and search.activations"
        )
