"""Random views of preprocessed images, as CoTTA and RoTTA draw them, batched and keyed.

    colour      brightness, contrast, saturation factors in 0.6..1.4, gamma in 0.7..1.3
    geometry    rotation by up to 15 degrees, shift by up to 1/16, scale 0.9..1.1, mirrored or not
    blur        Gaussian of 5 x 5 pixels, sigma 0.001..0.5
    noise       Gaussian of standard deviation 0.005, pixels clipped to 0..1

Provenance: the transform of the CoTTA code (commit c212a20), which cannot be made with a current
torchvision; hue is left as it is, and ranges are symmetric where the original's nearly are.
"""

from math import pi

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from qat.preprocessing import Preprocessing


def view(
    images: Float[Tensor, "n c h w"], preprocessing: Preprocessing, generator: torch.Generator
) -> Float[Tensor, "n c h w"]:
    """One random view of every image.

    Args:
        images: Preprocessed images.
        preprocessing: How they were normalized.
        generator: Source of randomness, on the device of the images.
    """
    shape = (1, -1, 1, 1)
    mean = images.new_tensor(preprocessing.mean).view(shape)
    std = images.new_tensor(preprocessing.std).view(shape)
    pixels = (images * std + mean).clamp(0, 1)
    pixels = _moved(_coloured(pixels, generator), generator)
    pixels = _blurred(pixels, generator)
    noise = torch.randn(pixels.shape, generator=generator, device=pixels.device)
    return (((pixels + 0.005 * noise).clamp(0, 1) - mean) / std).to(images.dtype)


def _uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """(n, 1, 1, 1) values between two bounds."""
    draw = torch.rand(n, 1, 1, 1, generator=generator, device=generator.device)
    return low + (high - low) * draw


def _coloured(pixels: Tensor, generator: torch.Generator) -> Tensor:
    n = len(pixels)
    pixels = (pixels * _uniform(n, 0.6, 1.4, generator)).clamp(0, 1)
    middle = pixels.mean((1, 2, 3), keepdim=True)
    pixels = middle + (pixels - middle) * _uniform(n, 0.6, 1.4, generator)
    grey = pixels.mean(1, keepdim=True)
    pixels = grey + (pixels - grey) * _uniform(n, 0.6, 1.4, generator)
    return pixels.clamp(1e-8, 1).pow(_uniform(n, 0.7, 1.3, generator))


def _moved(pixels: Tensor, generator: torch.Generator) -> Tensor:
    n = len(pixels)
    angle = _uniform(n, -pi / 12, pi / 12, generator).flatten()
    scale = 1 / _uniform(n, 0.9, 1.1, generator).flatten()
    mirror = torch.where(_uniform(n, 0.0, 1.0, generator).flatten() < 0.5, -1.0, 1.0)
    # A shift by 1/16 of the side is 1/8 in coordinates that run from -1 to 1.
    across, down = (_uniform(n, -0.125, 0.125, generator).flatten() for _ in range(2))
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = (
        torch.stack((cos * mirror, -sin, across), 1),
        torch.stack((sin * mirror, cos, down), 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)


def _blurred(pixels: Tensor, generator: torch.Generator) -> Tensor:
    n, channels = pixels.shape[:2]
    sigma = rearrange(_uniform(n, 0.001, 0.5, generator), "n 1 1 1 -> n 1")
    taps = torch.arange(-2, 3, device=pixels.device)
    weights = (-(taps**2) / (2 * sigma**2)).softmax(1)
    flat = rearrange(pixels, "n c h w -> 1 (n c) h w")
    for axes, padding in (("1 1 taps", (2, 2, 0, 0)), ("1 taps 1", (0, 0, 2, 2))):
        kernels = repeat(weights, f"n taps -> (n c) {axes}", c=channels)
        flat = F.pad(flat, padding, mode="replicate")
        flat = F.conv2d(flat, kernels, groups=n * channels)
    return rearrange(flat, "1 (n c) h w -> n c h w", n=n)
