"""The README's Python runs as it stands, on a small model."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import qat
from qat.tta import Adapter
from qat.tta.store import Store
from tests.conftest import make_tiny_vit

README = Path(__file__).parents[1] / "README.md"


def test_python_of_the_readme_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quantizing, adapting = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    batches = [torch.rand(4, 1, 8, 8) * 2 - 1 for _ in range(2)]
    names: dict[str, Any] = {"batches": batches, "stream": batches}
    tiny = make_tiny_vit().eval()
    monkeypatch.setattr(qat, "timm_model", lambda *_, **__: tiny)
    quantizing = quantizing.replace("configs/", f"{README.parent}/configs/")
    monkeypatch.chdir(tmp_path)
    exec(quantizing, names)
    exec(adapting, names)
    assert names["answer"].logits.shape == (4, 10)
    tensors, counts, problems = Store("stream", {"model": "model.ckpt"}).load()
    assert counts["images"] == 8 and problems == []
    resumed = Adapter(names["model"], names["adapter"].method, guard=names["adapter"].guard)
    resumed.load_state_dict({"state": tensors, "counts": counts})
    again = resumed.adapt(batches[0]).logits
    assert torch.equal(again, names["adapter"].adapt(batches[0]).logits)
