"""Views, teacher and soft labels of `binaryvit_runs.py`, made once and kept in one file.

Imagenette at 64 pixels: every training image is decoded once into eight views (random resized
crops of 50 to 100 % of the area, each mirrored with probability one half, fixed seed). The
teacher is the ImageNet ViT-Ti with a new head, fine-tuned on those views with a fixed seed; its
logits of every view are the soft labels. A fixed tenth of the training images is also kept as
centre crops, to choose settings on; the teacher has seen their labels, the students do not.
"""

import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import qat
from qat.lightning.training import parameter_groups

SIDE, VIEWS, BATCH, TEACHER_EPOCHS = 64, 8, 64, 4
BF16 = torch.cpu._is_amx_tile_supported()  # measured faster there; rows say which it was


def autocast() -> torch.autocast:
    """Mixed precision, where the processor multiplies matrices in bfloat16."""
    return torch.autocast("cpu", torch.bfloat16, enabled=BF16)


def normalized(pixels: Tensor) -> Tensor:
    """Bytes as the ImageNet ViT expects them."""
    return pixels.float().div_(127.5).sub_(1)


def float_model() -> nn.Module:
    """ViT-Ti with the ImageNet weights and a new head of ten classes."""
    weights = f"{os.environ['LOWBIT_ASSETS']}/weights/vit_tiny_patch16_224.safetensors"
    return qat.timm_model(
        "vit_tiny_patch16_224",
        num_classes=10,
        img_size=SIDE,
        weights=weights,
        data_config={"crop_pct": 1.0},
    )


def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of right answers, and cross-entropy, in float32."""
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(normalized(part)) for part in images.split(BATCH)])
    right = (logits.argmax(-1) == labels).double().mean()
    return float(right), float(F.cross_entropy(logits, labels))


def load(path: Path) -> dict[str, Any]:
    """What `make` wrote, mapped into memory."""
    return torch.load(path, mmap=True, weights_only=True)


def make(path: Path) -> None:
    """Decode the images, fine-tune the teacher, note its answers; minutes."""
    root = f"{os.environ['LOWBIT_ASSETS']}/data/imagenette160"
    train, val = ImageFolder(f"{root}/train"), ImageFolder(f"{root}/val")
    bicubic = v2.InterpolationMode.BICUBIC
    centre = v2.Compose([v2.Resize(SIDE, bicubic), v2.CenterCrop(SIDE), v2.PILToTensor()])
    crop = v2.RandomResizedCrop(SIDE, scale=(0.5, 1.0), interpolation=bicubic)
    augment = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])
    torch.manual_seed(0)
    order = torch.randperm(len(train))
    held = order[: len(order) // 10].sort().values
    views = torch.empty(len(train), VIEWS, 3, SIDE, SIDE, dtype=torch.uint8)
    for row, (name, _) in zip(views, train.samples, strict=True):
        image = _decoded(name)
        row.copy_(torch.stack([augment(image) for _ in range(VIEWS)]))
    data: dict[str, Any] = {
        "views": views,
        "labels": torch.tensor(train.targets),
        "held": held,
        "held_images": torch.stack([centre(_decoded(train.samples[i][0])) for i in held.tolist()]),
        "val_images": torch.stack([centre(_decoded(name)) for name, _ in val.samples]),
        "val_labels": torch.tensor(val.targets),
    }
    teacher = _teacher(views, data["labels"])
    with torch.no_grad(), autocast():
        parts = views.flatten(0, 1).split(4 * BATCH)
        logits = torch.cat([teacher(normalized(part)).float() for part in parts])
    data["logits"] = logits.view(len(train), VIEWS, -1)
    data["teacher"] = teacher.state_dict()
    data["teacher_top1"], data["teacher_loss"] = evaluate(
        teacher, data["val_images"], data["val_labels"]
    )
    print("teacher", data["teacher_top1"], data["teacher_loss"], flush=True)
    torch.save(data, f"{path}.part")
    os.replace(f"{path}.part", path)


def _decoded(name: str) -> Image.Image:
    with Image.open(name) as image:
        return image.convert("RGB")


def _teacher(views: Tensor, labels: Tensor) -> nn.Module:
    """The float model after fine-tuning on labels."""
    torch.manual_seed(0)
    model = float_model().train()
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-4, weight_decay=0.05, fused=True)
    total = TEACHER_EPOCHS * (len(views) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    for _ in range(TEACHER_EPOCHS):
        drawn = torch.randint(VIEWS, (len(views),))
        for rows in torch.randperm(len(views)).split(BATCH):
            if len(rows) < BATCH:
                break
            with autocast():
                logits = model(normalized(views[rows, drawn[rows]]))
            loss = F.cross_entropy(logits.float(), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()
