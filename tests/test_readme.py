"""The Python of README and quickstart runs as it stands, on a small model."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import qat
from qat.tta import Adapter
from qat.tta.store import Store
from tests import runs
from tests.conftest import make_tiny_vit


def _snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (runs.ROOT / page).read_text(), re.DOTALL)


def _batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(4, 1, 8, 8, generator=generator) * 2 - 1 for _ in range(2)]


def test_readme_is_short_and_its_sentences_are() -> None:
    text = (runs.ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    assert len(text.splitlines()) <= 110
    prose = re.sub(r"```.*?```|^(    |\||#|!|<).*?$", "", text, flags=re.DOTALL | re.MULTILINE)
    for sentence in re.split(r"(?<=[.!?:])\**\s+", prose):
        assert len(sentence.split()) <= 25, sentence


def test_python_of_readme_and_quickstart_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (quantizing,) = _snippets("README.md")
    adapting, adopting = _snippets("docs/quickstart.md")
    names: dict[str, Any] = {"batches": _batches(), "stream": _batches()}
    tiny = make_tiny_vit()
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(qat, "timm_model", lambda *_, **__: tiny)
        exec(quantizing, names)
    exec(adapting, names)
    assert names["answer"].logits.shape == (4, 10)
    tensors, counts, problems = Store("stream", {"model": "model.ckpt"}).load()
    assert counts["images"] == 8 and problems == []
    resumed = Adapter(names["model"], names["adapter"].method, guard=names["adapter"].guard)
    resumed.load_state_dict({"state": tensors, "counts": counts})
    again = resumed.adapt(_batches()[0]).logits
    assert torch.equal(again, names["adapter"].adapt(_batches()[0]).logits)
    names["model"] = make_tiny_vit()
    exec(adopting, names)
    assert names["model"](_batches()[0]).shape == (4, 10)
