"""What only some jobs need is an extra; where it is missing, one line says what and for what."""

import sys
import tomllib
from collections.abc import Callable

import numpy as np
import pytest
import torch._inductor.config

from ptq_init.mgrq import MGRQ
from qat import convert_
from qat.cli.commands.adapt import StreamSettings
from qat.cli.trackers import require_package
from qat.data import sources
from qat.data.corruptions import Domain, corrupt, require
from qat.data.protocols import Arrival, Continual
from qat.quantizers import Affine
from qat.reconstruct import JointTuning
from tests.ptq_init.common import Memory, images, plan, tiny_vit
from tests.runs import ROOT

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
JOBS: dict[str, tuple[str, Callable[[], object]]] = {
    "corruptions": ("cv2", lambda: require(Domain("fog", 3))),
    "datasets": ("datasets", lambda: sources.parquet("photos.parquet")),
    "tensorboard": ("tensorboard", lambda: require_package("TensorBoardLogger")),
}
CORRUPTIONS = "qat.data.corruptions"


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Hides a module, as where it is not installed, from ours too."""

    def hide(module: str) -> None:
        for name in [name for name in sys.modules if name.startswith(f"{CORRUPTIONS}.")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, module, None)

    return hide


@pytest.mark.parametrize("extra", JOBS)
def test_missing_package_is_named_with_the_job_that_needs_it_and_its_extra(
    extra: str, hidden: Callable[[str], None]
) -> None:
    module, job = JOBS[extra]
    hidden(module)
    with pytest.raises(ValueError, match=rf"cannot .*: {module} is not installed; .*\[{extra}\]'"):
        job()
    assert extra in EXTRAS


def test_stream_of_corruptions_is_refused_before_a_model_is_trained_for_it(
    hidden: Callable[[str], None],
) -> None:
    hidden("cv2")
    assert StreamSettings(Arrival())
    with pytest.raises(ValueError, match="cv2 is not installed"):
        StreamSettings(Continual())


def test_photos_as_they_are_need_no_extra(hidden: Callable[[str], None]) -> None:
    hidden("cv2")
    image = np.zeros((2, 2, 3), np.uint8)
    assert corrupt(image, Domain("clean", 0), "imagenet", (0, 0)) is image


def test_extra_of_development_holds_every_extra_that_tests_need() -> None:
    named = " ".join(EXTRAS["dev"])
    assert all(extra in named for extra in JOBS)


def test_compiling_without_a_compiler_is_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    journal, model = Memory(), tiny_vit()
    convert_(model, plan(4), Affine)
    before = model.state_dict()["blocks.0.attn.qkv.weight"].clone()
    method = MGRQ(num_steps=1, joint=JointTuning(1, compiled=True))
    with pytest.raises(ValueError, match=r"joint\.compiled needs a C\+\+ compiler.*to false"):
        method(model, [images(4)], journal)
    assert not journal.losses and model.blocks[0].attn.qkv.weight.equal(before)
