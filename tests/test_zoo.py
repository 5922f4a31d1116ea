"""Every promise about any model, on small ones of many families; slow: on all lines of a file."""

import os
from pathlib import Path

import pytest
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer
from zoo import examine, lines_of, parse
from zoo_checks import CHECKS, INITIALISING, Subject, outcome

import qat
from qat.preprocessing import Preprocessing

TINY = "img_size=32,model_args=dict(depth=1,embed_dim=32,num_heads=2)"
PIXELS = "data_config=dict(input_size=(3,64,64))"
SMALL = (
    f"vit_tiny_patch16_224 {TINY}",
    f"vit_small_patch16_dinov3 {TINY}",
    f"beit_base_patch16_224 {TINY}",
    "swin_tiny_patch4_window7_224 img_size=32,"
    "model_args=dict(window_size=4,embed_dim=16,depths=(2,1),num_heads=(2,4))",
    "swinv2_tiny_window8_256 img_size=32,"
    "model_args=dict(window_size=4,embed_dim=16,depths=(2,),num_heads=(2,))",
    f"pvt_v2_b0 {PIXELS},model_args=dict(embed_dims=(8,16,40,64),depths=(1,1,1,1))",
    f"xcit_nano_12_p16_224 {TINY}",
    "levit_128s img_size=64,model_args=dict(embed_dim=(32,48),num_heads=(2,3),depth=(1,1))",
    f"cait_xxs24_224 {TINY}",
    f"test_nfnet {PIXELS}",
    f"test_convnext {PIXELS}",
)
LARGER = ("mobilevit_xxs img_size=64", "test_maxvit img_size=64", f"efficientvit_b0 {PIXELS}")
FILE = Path(os.environ.get("LOWBIT_ASSETS", "")) / "zoo.txt"


@pytest.mark.parametrize(
    "line",
    [*SMALL, *(pytest.param(line, marks=pytest.mark.slow) for line in LARGER)],
    ids=lambda line: line.partition(" ")[0],
)
def test_small_model_of_any_family_keeps_every_promise(line: str) -> None:
    found = examine(line, CHECKS)["checks"]
    assert found == dict.fromkeys(("builds", *CHECKS), True)


def test_vision_transformer_of_torchvision_keeps_every_promise_but_a_checkpoint() -> None:
    model = VisionTransformer(32, 16, 2, 2, 32, 64, num_classes=5)
    three = (0.5, 0.5, 0.5)
    qat.adopt(
        model, preprocessing=Preprocessing((3, 32, 32), three, three, "bicubic", 1.0, "center")
    )
    subject = Subject.of(model)
    found = {name: outcome(lambda check=check: check(subject)) for name, check in CHECKS.items()}
    assert str(found.pop("saves")).startswith("ours: ValueError: the model's card does not say how")
    assert found == {name: True for name in CHECKS if name != "saves"}


class Logits(nn.Module):
    """A transformers classifier that returns its logits alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        pixels = Preprocessing((3, 32, 32), *[(0.5,) * 3] * 2, "bicubic", 1.0, "center")
        qat.adopt(self, preprocessing=pixels)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images).logits


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_vision_transformer_of_transformers_keeps_every_promise_but_a_checkpoint(
    attention: str,
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    images = {"image_size": 32, "patch_size": 16, "intermediate_size": 64, "num_labels": 5}
    config = transformers.ViTConfig(**sizes, **images, attn_implementation=attention)
    subject = Subject.of(Logits(transformers.ViTForImageClassification(config).eval()))
    found = {name: outcome(lambda check=check: check(subject)) for name, check in CHECKS.items()}
    assert str(found.pop("saves")).startswith("ours: ValueError: the model's card does not say how")
    assert found == {name: True for name in CHECKS if name != "saves"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("resnet18", ("resnet18", {})),
        (
            "a img_size=None,model_args=dict(depth=4,dims=[1,2],heads=(3,))",
            ("a", {"img_size": None, "model_args": {"depth": 4, "dims": [1, 2], "heads": (3,)}}),
        ),
    ],
)
def test_line_names_a_model_and_its_arguments(line: str, expected: tuple[str, object]) -> None:
    assert parse(line) == expected


@pytest.mark.parametrize(
    "line", ["a x=open('/etc/passwd')", "a x=b", "a model_args=dict([(1, 2)])"]
)
def test_line_holds_data_alone(line: str) -> None:
    with pytest.raises(ValueError, match="malformed"):
        parse(line)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of timm, for models that it deprecates
@pytest.mark.parametrize("line", lines_of(FILE) if FILE.is_file() else ())
def test_model_keeps_every_promise(line: str) -> None:
    found = examine(line, (*CHECKS, *INITIALISING))["checks"]
    if str(found["builds"]).startswith("timm cannot build it"):
        pytest.skip(str(found["builds"]))
    refused = {name for name in INITIALISING if str(found[name]).startswith("ours: ValueError")}
    assert {k: v for k, v in found.items() if k not in refused} == {
        name: True for name in ("builds", *CHECKS, *INITIALISING) if name not in refused
    }
