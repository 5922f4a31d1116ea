"""Train a four-bit ViT on scikit-learn's digits with a plain Lightning `Trainer`."""

from functools import partial

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split

import qat
from qat.lightning.modules import Distillation

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
data = TensorDataset(images, torch.tensor(digits.target))
train, val = random_split(data, [0.8, 0.2], torch.Generator().manual_seed(0))
shape = {"patch_size": 2, "embed_dim": 64, "depth": 2, "num_heads": 4}
model = qat.timm_model(
    "vit_tiny_patch16_224", img_size=8, in_chans=1, num_classes=10, model_args=shape
)

adam = partial(torch.optim.AdamW, lr=3e-3)
module = Distillation(model, plan="w4a4", optimizer=adam)  # calibrated on training images
trainer = pl.Trainer(max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False)
trainer.fit(module, DataLoader(train, 32, shuffle=True), DataLoader(val, 64))
trainer.save_checkpoint("digits.ckpt")

module = Distillation.load_from_checkpoint("digits.ckpt")  # qat.load gives the model alone
logits = torch.cat(trainer.predict(module, DataLoader(val, 64)))
print("top-1:", (logits.argmax(1) == torch.tensor([y for _, y in val])).float().mean().item())
