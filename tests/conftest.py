"""Shared fixtures: a tiny ViT, runs of a session, and a hypothesis profile without deadlines."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import nn

import qat

settings.register_profile("dev", deadline=None, max_examples=40)
settings.register_profile("ci", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make_tiny_vit(**model_args: object) -> nn.Module:
    """Two blocks of width 64 on 8x8 one-channel images, ten classes."""
    return qat.timm_model(
        "vit_tiny_patch16_224",
        img_size=8,
        in_chans=1,
        num_classes=10,
        data_config={"crop_pct": 1.0, "mean": (0.5,), "std": (0.5,)},
        model_args={"patch_size": 2, "embed_dim": 64, "depth": 2, "num_heads": 4, **model_args},
    ).eval()


@pytest.fixture
def tiny_vit() -> nn.Module:
    """A fresh tiny float ViT in evaluation mode."""
    return make_tiny_vit()


@pytest.fixture
def images() -> torch.Tensor:
    """Four random images for the tiny ViT."""
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of the digits teacher after one epoch; trained once in a session."""
    from tests import runs  # the command line takes seconds to import, which few tests need

    folder = tmp_path_factory.getbasetemp() / "teacher"
    runs.fit("configs/digits_teacher.yaml", folder, "--trainer.max_epochs", 1)
    return folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="session")
def lsq_run(teacher: Path) -> Path:
    """Run folder of a W4A4 student."""
    from tests import runs

    return runs.student("lsq", teacher)


@pytest.fixture(scope="session")
def binary_run(teacher: Path) -> Path:
    """Run folder of a binary student."""
    from tests import runs

    return runs.student("binary", teacher)
