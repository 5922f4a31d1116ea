"""The cost formula: exact counts by hand, agreement with torch's counter, an untouched model."""

from collections.abc import Callable

import pytest
import timm.layers.config
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import qat
from binaryvit import BinaryQuantizers
from binaryvit.convert import react_
from qat import Phase, Plan, set_phase
from qat.cost.count import Cost, Site, activation_bytes, cost
from qat.preprocessing import Preprocessing
from qat.quantizers import LSQ
from tests.conftest import make_tiny_vit
from tests.qat.common import (
    FACTORIES,
    assert_same_state,
    converted,
    distilled_deit,
    plan,
    quantized,
    snapshot,
    swin,
)

# DeiT-S: width, blocks, tokens, hidden width, pixels of a patch with their channels, classes.
D, BLOCKS, N, F, PATCH, CLASSES = 384, 12, 197, 1536, 3 * 16 * 16, 1000
# The tiny ViT of the fixtures.
TINY_D, TINY_BLOCKS, TINY_N, TINY_F, TINY_PATCH, TINY_CLASSES = 64, 2, 17, 256, 4, 10


def macs_of(costs: Cost, *endings: str) -> int:
    """MACs of the sites whose names end so."""
    return sum(site.macs for site in costs.sites if site.name.endswith(endings))


def tiny_block_macs() -> tuple[int, int]:
    """MACs of the linear layers, and of the products, of one block of the tiny ViT."""
    linear = TINY_N * (4 * TINY_D * TINY_D + 2 * TINY_D * TINY_F)
    return linear, 2 * TINY_N * TINY_N * TINY_D


@pytest.fixture(scope="module")
def deit_small() -> nn.Module:
    """DeiT-S with random weights."""
    return qat.timm_model("deit_small_patch16_224").eval()


def of_preprocessing(model: nn.Module, size: tuple[int, int, int]) -> nn.Module:
    """`model` with the input size that `cost` asks for."""
    qat.adopt(model, preprocessing=Preprocessing(size, (0.5,), (0.5,), "bicubic", 1.0, "center"))
    return model


def test_macs_of_deit_small_are_those_of_its_formula(deit_small: nn.Module) -> None:
    found = cost(deit_small)
    linear = BLOCKS * N * (3 * D * D + D * D + 2 * D * F)
    product = BLOCKS * N * N * D
    patch, head = (N - 1) * PATCH * D, D * CLASSES
    assert macs_of(found, "qkv", "attn.proj", "fc1", "fc2") == linear == 4_183_031_808
    assert macs_of(found, ".qk") == macs_of(found, ".av") == product == 178_831_872
    assert macs_of(found, "patch_embed.proj") == patch == 57_802_752
    assert macs_of(found, "head") == head == 384_000
    assert found.macs == linear + 2 * product + patch + head == 4_598_882_304
    assert len(found.sites) == 12 * 6 + 2


def test_parameters_of_deit_small_are_those_of_its_formula(deit_small: nn.Module) -> None:
    found = cost(deit_small)
    weights = BLOCKS * (4 * D * D + 2 * D * F) + PATCH * D + D * CLASSES
    assert sum(site.num_weights for site in found.sites) == weights
    assert found.num_other == {
        "position": N * D + D,
        "norm": (2 * BLOCKS + 1) * 2 * D,
        "bias": BLOCKS * (3 * D + D + F + D) + D + CLASSES,
        "quantizer": 0,
        "transform": 0,
        "other": 0,
    }
    assert found.num_parameters == 22_050_664
    assert found.size_bytes == 4 * 22_050_664


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_macs_agree_with_the_counter_of_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The counter sees the two products of attention only where they are not fused.
    monkeypatch.setattr(timm.layers.config, "_USE_FUSED_ATTN", 0)
    model = qat.timm_model(name).eval()
    found = cost(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.to("meta")(torch.zeros(1, 3, 224, 224, device="meta"))
    assert found.macs == pytest.approx(counter.get_total_flops() / 2, rel=1e-3)


@pytest.mark.parametrize(
    "build", [make_tiny_vit, swin, distilled_deit], ids=["vit", "swin", "distilled"]
)
def test_parameters_of_a_float_model_are_all_counted_once(build: Callable[[], nn.Module]) -> None:
    model = build()
    found = cost(model)
    assert found.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.size_bytes == 4 * found.num_parameters
    assert found.num_other["other"] == 0
    assert found.uncounted == ()


def test_layers_shared_by_two_blocks_are_stored_once_and_run_twice(tiny_vit: nn.Module) -> None:
    once = cost(tiny_vit).macs
    tiny_vit.blocks[1] = tiny_vit.blocks[0]
    found = cost(tiny_vit)
    assert found.macs == once
    assert found.num_parameters == sum(p.numel() for p in tiny_vit.parameters())


@pytest.mark.parametrize("build", [make_tiny_vit, swin], ids=["vit", "swin"])
@pytest.mark.parametrize("factory", ["lsq", "binary-DynamicShift"])
def test_conversion_changes_no_macs(build: Callable[[], nn.Module], factory: str) -> None:
    model = build()
    before = cost(model)
    bits = 1 if factory.startswith("binary") else 4
    qat.convert_(model, plan(bits, blocks="*blocks"), FACTORIES[factory])
    after = cost(model)
    assert [(s.name, s.macs, s.num_weights) for s in after.sites] == [
        (s.name, s.macs, s.num_weights) for s in before.sites
    ]


def test_products_of_swin_run_within_windows() -> None:
    found = {site.name: site.macs for site in cost(swin()).sites}
    # 8x8 tokens of width 16 in four windows of 16, then 4x4 tokens of width 32 in one.
    assert found["layers.0.blocks.1.attn.qk"] == 4 * 16 * 16 * 16
    assert found["layers.1.blocks.0.attn.av"] == 1 * 16 * 16 * 32


def test_bops_of_a_binary_model_are_its_macs_and_1024_for_each_in_float(
    deit_small: nn.Module,
) -> None:
    model = qat.timm_model("deit_small_patch16_224").eval()
    qat.convert_(model, plan(1), BinaryQuantizers())
    found, original = cost(model), cost(deit_small)
    in_float = (N - 1) * PATCH * D + D * CLASSES
    assert found.bops == (found.macs - in_float) + 1024 * in_float == 64_123_929_600
    assert original.bops == 1024 * original.macs
    assert found.coverage_macs == pytest.approx(1 - in_float / original.macs)
    assert original.coverage_macs == 0


def test_bops_multiply_the_widths_of_both_operands(tiny_vit: nn.Module) -> None:
    rules = [
        {"pattern": "blocks.0.attn", "query": {"bits": 8}, "key": {"bits": 3}},
        {"pattern": "blocks.0.*", "weight": {"bits": 2}, "input": {"bits": 8}},
        {"pattern": "blocks.1.attn", "attention": {"bits": 5, "signed": False}},
        {"pattern": "blocks.1.*", "weight": {"bits": 4}},
    ]
    qat.convert_(tiny_vit, Plan.from_list(rules), LSQ)
    found = cost(tiny_vit)
    linear, product = tiny_block_macs()
    in_float = (TINY_N - 1) * TINY_PATCH * TINY_D + TINY_D * TINY_CLASSES
    first = 2 * 8 * linear + (8 * 3 + 32 * 32) * product // 2
    second = 4 * 32 * linear + (32 * 32 + 5 * 32) * product // 2
    assert found.bops == first + second + 1024 * in_float
    # Low-bit are the linear layers and Q K^T of the first block only.
    total = TINY_BLOCKS * (linear + product) + in_float
    assert found.coverage_macs == pytest.approx((linear + product / 2) / total)
    precision = {site.name.removeprefix("blocks."): site.precision for site in found.sites}
    assert precision == {
        "patch_embed.proj": "float",
        **{f"0.{name}": "w2a8" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")},
        **{f"1.{name}": "w4a32" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")},
        "0.attn.qk": "a8a3",
        "0.attn.av": "float",
        "1.attn.qk": "float",
        "1.attn.av": "a5a32",
        "head": "float",
    }


@pytest.mark.parametrize(
    ("bits", "low"),
    [((1, 1), True), ((15, 15), True), ((15, 16), False), ((16, 4), False), ((32, 4), False)],
)
def test_product_is_low_bit_if_both_operands_have_fewer_than_16_bits(
    bits: tuple[int, int], low: bool
) -> None:
    assert Site("x", "Linear", 1, bits, 1).low_bit is low


def _tiny_floats() -> int:
    """Numbers of the tiny ViT that stay at 32 bits under a plan of all blocks."""
    layers = TINY_PATCH * TINY_D + TINY_D * TINY_CLASSES
    position = TINY_N * TINY_D + TINY_D
    norms = (2 * TINY_BLOCKS + 1) * 2 * TINY_D
    biases = TINY_BLOCKS * (5 * TINY_D + TINY_F) + TINY_D + TINY_CLASSES
    return layers + position + norms + biases


TINY_WEIGHTS = TINY_BLOCKS * (4 * TINY_D * TINY_D + 2 * TINY_D * TINY_F)
TINY_CHANNELS = TINY_BLOCKS * (3 * TINY_D + TINY_D + TINY_F + TINY_D)  # of weight scales


def test_size_of_w4a4_is_half_a_byte_a_weight_and_four_for_everything_else(
    tiny_vit: nn.Module,
) -> None:
    found = cost(converted(tiny_vit, "lsq"))
    scales = TINY_BLOCKS * (4 + 4)  # one for the input of each layer and each operand of a product
    assert found.num_other["quantizer"] == scales
    expected = TINY_WEIGHTS / 2 + 4 * (TINY_CHANNELS + _tiny_floats() + scales)
    assert found.size_bytes == expected == 69_480


def test_size_of_a_binary_model_is_a_bit_a_weight_and_four_bytes_for_everything_else(
    tiny_vit: nn.Module,
) -> None:
    found = cost(converted(tiny_vit, "binary-StaticShift"))
    # Thresholds of the inputs of four layers and of Q, K and V, and the scale of the attention map.
    state = TINY_BLOCKS * (3 * TINY_D + TINY_F + 3 * TINY_D + 1)
    assert found.num_other["quantizer"] == state
    expected = TINY_WEIGHTS / 8 + 4 * (TINY_CHANNELS + _tiny_floats() + state)
    assert found.size_bytes == expected == 37_680


def test_unsigned_affine_weights_store_a_zero_point_beside_each_scale(tiny_vit: nn.Module) -> None:
    weight = {"bits": 4, "signed": False, "granularity": "per_channel"}
    rules = Plan.from_list([{"pattern": "blocks.0.mlp.fc1", "weight": weight}])
    qat.convert_(tiny_vit, rules, FACTORIES["affine"])
    site = next(site for site in cost(tiny_vit).sites if site.name == "blocks.0.mlp.fc1")
    assert site.num_scales == 2 * TINY_F


def test_parts_of_react_blocks_are_counted_beside_the_plain_model(tiny_vit: nn.Module) -> None:
    plain = cost(converted(make_tiny_vit(), "binary-StaticShift"))
    react_(tiny_vit, plan(1), FACTORIES["binary-StaticShift"])
    found = cost(tiny_vit)
    channels = TINY_BLOCKS * (3 * TINY_D + TINY_D + TINY_F + TINY_D)
    head_dim = 16
    extra = {"norm": 2 * (channels + TINY_BLOCKS * head_dim), "other": 3 * channels}
    assert found.num_other == {k: v + extra.get(k, 0) for k, v in plain.num_other.items()}
    assert found.size_bytes == plain.size_bytes + 4 * sum(extra.values())
    assert (found.macs, found.bops, found.uncounted) == (plain.macs, plain.bops, ())


class SelfBilinear(nn.Module):
    """A bilinear layer on two copies of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(TINY_D, TINY_D, TINY_D)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x, x)


class Mix(nn.Module):
    """A product with a parameter that no layer holds."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(TINY_D))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


def test_module_whose_products_cannot_be_counted_is_listed_and_its_weight_counted(
    tiny_vit: nn.Module,
) -> None:
    before = cost(tiny_vit)
    tiny_vit.fc_norm = SelfBilinear()
    found = cost(tiny_vit)
    assert found.uncounted == ("fc_norm.bilinear",)
    assert found.num_other["other"] == TINY_D**3
    assert found.macs == before.macs
    assert found.num_parameters == sum(p.numel() for p in tiny_vit.parameters())


def test_product_with_a_parameter_that_no_layer_holds_is_counted(tiny_vit: nn.Module) -> None:
    before = cost(tiny_vit)
    tiny_vit.fc_norm = Mix()
    found = cost(tiny_vit)
    (site,) = set(found.sites) - set(before.sites)
    assert (site.name, site.macs, site.bits) == ("fc_norm.product", TINY_D**2, (32, 32))
    assert found.uncounted == ()
    assert found.num_other["other"] == TINY_D**2


@pytest.mark.parametrize("kind", ["lsq", "react"])
@pytest.mark.parametrize("phase", list(Phase))
@pytest.mark.parametrize("count", [cost, activation_bytes])
def test_counting_leaves_the_model_untouched(
    count: Callable[[nn.Module], object], kind: str, phase: Phase, images: Tensor
) -> None:
    model = quantized(make_tiny_vit(depth=1), images, kind).train()
    set_phase(model, phase)
    before = snapshot(model)
    count(model)
    assert_same_state(snapshot(model), before)
    assert all(module.training for module in model.modules())
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_model_without_preprocessing_is_refused() -> None:
    with pytest.raises(ValueError, match="the model has no card"):
        cost(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        # The image (4 numbers) for the weight of the first layer; the input of GELU (3) for its
        # derivative; its output (3) for the weight of the second layer.
        (nn.GELU, 4 * (4 + 3 + 3)),
        # ReLU keeps its output, which is also the second layer's input: one storage.
        (nn.ReLU, 4 * (4 + 3)),
    ],
)
def test_activation_bytes_of_two_layers_equal_a_hand_count(
    activation: type[nn.Module], expected: int
) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), activation(), nn.Linear(3, 2))
    assert activation_bytes(of_preprocessing(model, (1, 2, 2))) == expected


@pytest.mark.parametrize("kind", ["float", "lsq"])
def test_activation_bytes_grow_by_the_same_amount_with_every_block(kind: str) -> None:
    models = [make_tiny_vit(depth=depth) for depth in (1, 2, 3)]
    found = [activation_bytes(m if kind == "float" else converted(m, kind)) for m in models]
    assert found[2] - found[1] == found[1] - found[0] > 0


def test_activation_bytes_are_those_of_the_quantizing_phase(
    tiny_vit: nn.Module, images: Tensor
) -> None:
    in_float = activation_bytes(tiny_vit)
    quantized(tiny_vit, images, "lsq")
    quantizing = activation_bytes(tiny_vit)
    set_phase(tiny_vit, Phase.FLOAT)
    assert activation_bytes(tiny_vit) == quantizing > in_float
