"""Operations on rows of floats: signs, LayerNorm, GELU, softmax, the tail of a `react` layer."""

import numpy as np

from qat.kernels.arrays import Bits, Floats, floats, require_multiple, thresholds_of, words
from qat.kernels.native import Native


class Rows:
    """Operations on rows, by the kernels of an instruction set.

    Args:
        native: The kernels.
    """

    def __init__(self, native: Native) -> None:
        self._run = native.run

    def sign_pack(self, x: Floats, threshold: Floats, gain: Floats | None = None) -> Bits:
        """Bits of `x >= threshold`, x (groups, rows, k), threshold (1 or groups, k).

        With a gain (k,) it is multiplied with the mean over rows, and added to the threshold.
        """
        groups, rows, k = x.shape
        x, threshold = floats("x", x), thresholds_of(threshold, groups, k)
        gain = None if gain is None else floats("gain", gain, k)
        packed = np.empty((groups, rows, words(k)), np.uint64)
        self._run("sign_pack", x, threshold, gain, groups, rows, k, len(threshold), packed)
        return packed

    def norm_sign_pack(
        self, x: Floats, weight: Floats, bias: Floats, eps: float, threshold: Floats
    ) -> Bits:
        """`sign_pack` of the LayerNorm of x."""
        groups, rows, k = x.shape
        x, threshold = floats("x", x), thresholds_of(threshold, groups, k)
        affine = (floats(name, value, k) for name, value in (("weight", weight), ("bias", bias)))
        packed = np.empty((groups, rows, words(k)), np.uint64)
        sizes = groups, rows, k, len(threshold)
        self._run("norm_sign_pack", x, *affine, eps, threshold, *sizes, packed)
        return packed

    def layer_norm(self, x: Floats, weight: Floats, bias: Floats, eps: float) -> Floats:
        """LayerNorm over the last axis of x (rows, d)."""
        rows, k = x.shape
        weight, bias = floats("weight", weight, k), floats("bias", bias, k)
        y = np.empty(x.shape, np.float32)
        self._run("layer_norm", floats("x", x), weight, bias, eps, rows, k, y)
        return y

    def gelu(self, x: Floats) -> Floats:
        """The exact GELU, within 1e-6."""
        y = np.empty(x.shape, np.float32)
        self._run("gelu", floats("x", x), x.size, y)
        return y

    def softmax(self, x: Floats) -> Floats:
        """Softmax over the last axis."""
        y = np.empty(x.shape, np.float32)
        self._run("softmax", floats("x", x), x.size // max(x.shape[-1], 1), x.shape[-1], y)
        return y

    def rprelu(self, x: Floats, before: Floats, slope: Floats, after: Floats) -> Floats:
        """PReLU of `x - before`, plus `after`, x (rows, n)."""
        rows, n = x.shape
        parts = (floats(*named, n) for named in _bend(before, slope, after))
        y = np.empty(x.shape, np.float32)
        self._run("rprelu", floats("x", x), *parts, rows, n, y)
        return y

    def shortcut(self, x: Floats, n: int) -> Floats:
        """Features (rows, k) repeated to n, or averaged in groups to n."""
        rows, k = x.shape
        require_multiple(k, n)
        y = np.empty((rows, n), np.float32)
        self._run("shortcut", floats("x", x), rows, k, n, y)
        return y

    def react(
        self,
        y: Floats,
        x: Floats,
        weight: Floats,
        bias: Floats,
        eps: float,
        before: Floats,
        slope: Floats,
        after: Floats,
    ) -> Floats:
        """RPReLU of LayerNorm of y (rows, n) plus the shortcut of x (rows, k)."""
        (rows, n), k = y.shape, x.shape[1]
        require_multiple(k, n)
        affine = floats("weight", weight, n), floats("bias", bias, n)
        parts = (floats(*named, n) for named in _bend(before, slope, after))
        result = np.empty(y.shape, np.float32)
        x = floats("x", x, rows, k)
        self._run("react", floats("y", y), x, *affine, eps, *parts, None, rows, n, k, result)
        return result


def _bend(before: Floats, slope: Floats, after: Floats) -> tuple[tuple[str, Floats], ...]:
    return ("before", before), ("slope", slope), ("after", after)
