"""Diffusion transformers: a model of our own, its noise schedule, sampling, and judgement."""

from qat.diffusion.build import dit
from qat.diffusion.model import DiT
from qat.diffusion.schedule import NoiseSchedule

__all__ = ["DiT", "NoiseSchedule", "dit"]
