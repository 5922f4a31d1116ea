"""An exported model beside the simulated one: how far apart, and what the first difference is.

Both run on the same images. Where logits differ by more than rounding, the inputs of all grids are
compared in the order in which they are computed. At the first grid where a value has another code
in the two runs, the two values are compared: if they are as near as rounding leaves values of that
size, a threshold lies between them, both sat on it. Anything else is a fault.

Apart from that every grid is given the simulated model's values, and its codes are compared. Where
a weight is a grid of the exported model, which takes nothing, its values are.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qat.calibrate import Batch
from qat.export.onnx_file import OnnxGrid, OnnxModel
from qat.export.watch import watched
from qat.quantizers import Quantizer
from qat.runtime import Model
from qat.runtime.grids import Grid, Token

NEAR = 1e-5
"""Values this near to a threshold may fall to either side; relative to values above 1."""
ROUNDING = 1e-4
"""Gap of logits, relative to the largest if above 1, that needs no explanation."""
IMAGES_AT_ONCE = 8

Inputs = dict[str, np.ndarray]


Exported = Model | OnnxModel
"""An exported model: it answers, has grids, and shows their inputs."""


@dataclass(frozen=True)
class Difference:
    """Where two runs part for one image.

    Attributes:
        image: Number of the image.
        gap: Largest difference of its logits.
        grid: Name of the first grid with another code; None where all codes are equal.
        distance: Largest difference of the values there whose codes differ.
        on_threshold: Whether these values sat on their threshold.
    """

    image: int
    gap: float
    grid: str | None
    distance: float
    on_threshold: bool


@dataclass
class Verification:
    """What a comparison found.

    Attributes:
        gaps: Largest difference of the logits of each image.
        agreed: Whether both gave the same class to each image.
        differences: One for each image whose logits differ by more than rounding.
        num_codes: Codes that were compared with identical inputs.
        num_on_threshold: Codes among them that differ, their values on a threshold.
        wrong: By the name of the grid, how many differ for no such reason, in the order of their
            computation.
    """

    gaps: list[float] = field(default_factory=list)
    agreed: list[bool] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    num_codes: int = 0
    num_on_threshold: int = 0
    wrong: dict[str, int] = field(default_factory=dict)

    @property
    def num_wrong(self) -> int:
        """Codes that differ for no good reason."""
        return sum(self.wrong.values())

    @property
    def faults(self) -> list[Difference]:
        """Differences that rounding does not explain."""
        return [found for found in self.differences if not found.on_threshold]

    @property
    def agreement(self) -> float:
        """Share of images to which both gave the same class."""
        return float(np.mean(self.agreed))

    def items(self) -> dict[str, Any]:
        """What `metrics.json` holds of it."""
        return {
            "n_images": len(self.gaps),
            "agreement": self.agreement,
            "logit_gap": float(np.max(self.gaps)),
            "logit_gap_median": float(np.median(self.gaps)),
            "n_gaps": len(self.differences),
            "n_faults": len(self.faults),
            "n_codes": self.num_codes,
            "n_codes_on_threshold": self.num_on_threshold,
            "n_codes_wrong": self.num_wrong,
        }

    def require_same(self) -> None:
        """Refuse an exported model that differs from the simulated one.

        Raises:
            ValueError: Naming the first image and the first module that differ.
        """
        if self.num_wrong:
            raise ValueError(
                f"{self.num_wrong} of {self.num_codes} codes differ for identical inputs, away "
                f"from any threshold, the first in '{next(iter(self.wrong))}'; the file is not to "
                "be used"
            )
        if self.faults:
            first = self.faults[0]
            where = (
                f"the first other code is in '{first.grid}', of values {first.distance:.2g} apart"
                if first.grid
                else "all codes are equal"
            )
            raise ValueError(
                f"the logits of {len(self.faults)} of {len(self.gaps)} images differ, of image "
                f"{first.image} by {first.gap:.2g}; {where}; the file is not to be used"
            )


def verify(simulated: nn.Module, exported: Exported, batches: Iterable[Batch]) -> Verification:
    """Compare both models on images.

    Args:
        simulated: The model in torch, on the processor.
        exported: The model of the file.
        batches: Preprocessed images (batch, channels, height, width), or all inputs of a model.

    Raises:
        ValueError: If there are no images.
    """
    found = Verification()
    for batch in batches:
        inputs = (batch,) if isinstance(batch, Tensor) else batch
        for few in zip(*(each.split(IMAGES_AT_ONCE) for each in inputs), strict=True):
            _compare(simulated, exported, few, found)
    if not found.gaps:
        raise ValueError("no images to verify with; name some with --images DIR")
    return found


@torch.no_grad()
def _compare(
    simulated: nn.Module, exported: Exported, inputs: tuple[Tensor, ...], found: Verification
) -> None:
    """Add a few images to what was found."""
    with watched(simulated, lambda name, _: name in exported.grids) as seen:
        expected = simulated(*inputs).flatten(1).numpy()
    theirs: Inputs = {name: x.numpy() for name, x in seen.items()}
    ours: Inputs = {}
    arrays = (each.numpy() for each in inputs)
    answers = exported(*arrays, see=lambda name, x: ours.__setitem__(name, x))
    logits = answers.reshape(expected.shape)
    values = {name: _values(simulated, exported, name, x) for name, x in theirs.items()}
    for name, x in theirs.items():
        _count_codes(name, exported.grids[name], x, values[name], found)

    @cache
    def differ(name: str) -> np.ndarray:
        if name in ours:
            return _made(exported.grids[name], ours[name]) != values[name]
        return _crossed(exported.grids[name], theirs[name], NEAR * np.abs(theirs[name]))

    gaps = np.abs(logits - expected).max(1)
    for i, gap in enumerate(gaps):
        if not gap <= ROUNDING * max(1, np.abs(expected[i]).max()):
            image = len(found.gaps) + i
            of = partial(_of_image, place=i, count=len(gaps))
            found.differences.append(_first_difference(image, float(gap), of, theirs, ours, differ))
    found.gaps += gaps.tolist()
    found.agreed += (logits.argmax(1) == expected.argmax(1)).tolist()


def _values(simulated: nn.Module, exported: Exported, name: str, x: np.ndarray) -> np.ndarray:
    """What the simulated model makes of the input of a grid, in a form to be compared."""
    quantizer: Any = simulated.get_submodule(name)
    assert isinstance(quantizer, Quantizer)
    inputs = torch.from_numpy(x)
    if isinstance(exported.grids[name], Token):
        return quantizer.codes(inputs).values.numpy()
    return quantizer.fake_quantize(inputs).numpy()


def _made(grid: Grid | OnnxGrid, x: np.ndarray) -> np.ndarray:
    """The same of the exported model: values, or codes where the step follows the values."""
    return grid.codes(x) if isinstance(grid, Token) else grid.values(x)


def _count_codes(
    name: str, grid: Grid | OnnxGrid, x: np.ndarray, expected: np.ndarray, found: Verification
) -> None:
    """Compare the codes of identical inputs."""
    found.num_codes += x.size
    differ = _made(grid, x) != expected
    if not differ.any():
        return
    crossed = _crossed(grid, x, _tolerance(x))
    found.num_on_threshold += int((differ & crossed).sum())
    if wrong := int((differ & ~crossed).sum()):
        found.wrong[name] = found.wrong.get(name, 0) + wrong


def _crossed(grid: Grid | OnnxGrid, x: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Where a threshold lies within a distance of the values."""
    return _made(grid, x - near) != _made(grid, x + near)


def _of_image(x: np.ndarray, place: int, count: int) -> np.ndarray:
    """What of an array belongs to one of some images: its row, or its windows.

    Whatever does not divide among the images, such as a table of positions, belongs to each.
    """
    share, rest = divmod(len(x), count)
    return x if rest else x[place * share : (place + 1) * share]


def _first_difference(
    image: int,
    gap: float,
    of: Callable[[np.ndarray], np.ndarray],
    theirs: Inputs,
    ours: Inputs,
    differ: Callable[[str], np.ndarray],
) -> Difference:
    """The first grid that has other codes in the two runs of an image.

    The native operation of a binary attention does not show its map. Where a value of the map sat
    on its threshold and no threshold explains what differs behind it, the map is that grid.

    Args:
        image: Its number.
        gap: Of its logits.
        of: What of an array belongs to it.
        theirs: Inputs of the grids in the simulated model.
        ours: The same in the model of the file, where it shows them.
        differ: Where the codes of a grid differ; where a value is on its threshold if unseen.
    """
    unseen = None
    for name, x in theirs.items():
        parts = of(differ(name))
        if not parts.any():
            continue
        if name not in ours:
            unseen = unseen or name
            continue
        apart = float(np.abs(of(x)[parts] - of(ours[name])[parts]).max())
        explained = apart <= NEAR * max(1.0, float(np.abs(of(x)).max()))
        if explained or unseen is None:
            return Difference(image, gap, name, apart, explained)
        return Difference(image, gap, unseen, 0.0, True)
    return Difference(image, gap, None, 0.0, False)


def _tolerance(x: np.ndarray) -> np.ndarray:
    return (NEAR * np.maximum(1, np.abs(x))).astype(np.float32)
