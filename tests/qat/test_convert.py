"""The pass: exact in float, all or nothing, and no setting without effect."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import qat
from binaryvit import BinaryQuantizers
from qat import Operand, Phase, Plan, Quantizer, QuantSpec, convert_, set_phase
from qat.calibrate import calibrate_in_order
from qat.layers import QuantConv2d, QuantLinear
from qat.products import QuantProducts
from qat.quantizers import LSQ, Affine, quantizers
from tests.conftest import make_tiny_vit
from tests.qat.common import assert_same_state, distilled_deit, plan, snapshot, swin

FOUR = {"bits": 4}
MODELS: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "vit": (make_tiny_vit, "blocks", 8),
    "vit-dropout": (partial(make_tiny_vit, attn_drop_rate=0.5), "blocks", 8),
    "deit-distilled": (distilled_deit, "blocks", 8),
    "swin": (swin, "layers", 16),
}
EVERY_MODEL = pytest.mark.parametrize("kind", MODELS)


def _set_fused(model: nn.Module, fused: bool) -> None:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused


def _plan(*items: dict[str, Any]) -> Plan:
    return Plan.from_list(list(items))


class Factory:
    """LSQ, but refuses the operand number `fails_at`."""

    def __init__(self, fails_at: int) -> None:
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, spec: QuantSpec, shape: tuple[int, ...], operand: Operand) -> Quantizer:
        self.calls += 1
        if self.calls == self.fails_at:
            raise ValueError("no quantizer today")
        return LSQ(spec, shape, operand)


class DerivedLinear(nn.Linear):
    """A linear layer with a forward pass of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@EVERY_MODEL
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_float_phase_gives_the_bits_of_the_original(kind: str, fused: bool, training: bool) -> None:
    make, blocks, side = MODELS[kind]
    model, x = make().train(training), torch.randn(2, 1, side, side)
    _set_fused(model, fused)
    torch.manual_seed(3)  # of what is dropped in training
    expected = model(x)
    convert_(model, plan(4, blocks), LSQ)
    torch.manual_seed(3)
    found = model(x)
    if isinstance(expected, tuple):  # DeiT returns both heads in training
        expected, found = torch.stack(expected), torch.stack(found)
    assert torch.equal(found, expected)


@EVERY_MODEL
def test_quantize_phase_reaches_every_quantizer(kind: str) -> None:
    make, blocks, side = MODELS[kind]
    model = make()
    convert_(model, plan(4, blocks), LSQ)
    set_phase(model, Phase.QUANTIZE)
    model(torch.randn(2, 1, side, side)).square().sum().backward()
    assert not [name for name, found in quantizers(model) if found.scale.grad is None]


def test_shifted_windows_of_swin_carry_a_mask_into_the_twin() -> None:
    model, x = swin(), torch.randn(1, 1, 16, 16)
    convert_(model, plan(4, "layers"), LSQ)
    masked = model(x)
    model.layers[0].blocks[1].attn_mask = None
    assert not torch.equal(model(x), masked)


@EVERY_MODEL
def test_names_and_values_of_float_parameters_survive(kind: str) -> None:
    make, blocks, _ = MODELS[kind]
    model = make()
    before = snapshot(model)
    convert_(model, plan(4, blocks), LSQ)
    after = snapshot(model)
    assert_same_state({name: after[name] for name in before}, before)
    assert all("quantizer" in name for name in after.keys() - before.keys())


def test_float_weights_load_into_a_converted_model(tiny_vit: nn.Module, images: Tensor) -> None:
    convert_(tiny_vit, plan(), LSQ)
    donor = make_tiny_vit()
    result = tiny_vit.load_state_dict(donor.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all("quantizer" in name for name in result.missing_keys)
    assert torch.equal(tiny_vit(images), donor(images))


@pytest.mark.parametrize("training", [True, False])
def test_conversion_keeps_training_and_evaluation_mode(training: bool) -> None:
    model = make_tiny_vit().train(training)
    convert_(model, plan(), LSQ)
    assert {module.training for module in model.modules()} == {training}


def test_modules_get_the_quantizers_that_their_rule_names(tiny_vit: nn.Module) -> None:
    items = [
        {"pattern": "blocks.0.attn", "query": {"bits": 3}, "attention": {"bits": 5}},
        {"pattern": "patch_embed.proj", "weight": {"bits": 8, "granularity": "per_channel"}},
        {"pattern": "*.qkv", "input": {"bits": 6, "signed": False}},
    ]
    conversion = convert_(tiny_vit, _plan(*items), Affine)
    attention = tiny_vit.blocks[0].attn
    assert isinstance(attention, Attention) and isinstance(attention, QuantProducts)
    assert attention.qk.left_quantizer.spec == QuantSpec(3)
    assert attention.qk.right_quantizer is attention.av.right_quantizer is None
    assert attention.av.left_quantizer.spec == QuantSpec(5)
    assert isinstance(tiny_vit.patch_embed.proj, QuantConv2d)
    assert tiny_vit.patch_embed.proj.weight_quantizer.scale.shape == (64, 1, 1, 1)
    assert isinstance(attention.qkv, QuantLinear)
    assert attention.qkv.weight_quantizer is None
    assert attention.qkv.input_quantizer.spec == QuantSpec(6, signed=False)
    assert type(tiny_vit.blocks[1].attn) is Attention
    assert tiny_vit.card.conversion is conversion


def test_what_stays_in_float_is_listed_with_the_reason(tiny_vit: nn.Module) -> None:
    rules = (
        {"pattern": "blocks.0.*", "reason": "first block stays"},
        {"pattern": "blocks.1.attn"},
        {"pattern": "blocks.*.fc1", "weight": FOUR},
        {"pattern": "blocks.*", "input": FOUR},
    )
    kept = convert_(tiny_vit, _plan(*rules), LSQ).kept
    assert kept["blocks.0.attn.qkv"] == "first block stays"
    assert kept["blocks.1.attn"] == "rule 'blocks.1.attn' gives it no spec"
    assert kept["head"] == "no rule of the plan matches it"
    assert "blocks.1.mlp.fc1" not in kept
    assert "blocks.1.mlp.fc2" not in kept


WRONG = {
    "unused": ([{"pattern": "block.*", "weight": FOUR}], r"matches no.*nearest names: blocks\.0"),
    "shadowed": (
        [{"pattern": "blocks.*", "weight": FOUR}, {"pattern": "*.qkv", "weight": FOUR}],
        r"'\*\.qkv' has no effect.*earlier rule 'blocks\.\*'",
    ),
    "idle-spec": (
        [{"pattern": "*.fc1", "weight": FOUR, "query": FOUR}],
        r"'\*\.fc1' gives a spec to query, which none .*they have input, weight",
    ),
    "one-bit": (
        [{"pattern": "blocks.0.*", "weight": FOUR}, {"pattern": "*.fc1", "weight": {"bits": 1}}],
        r"blocks\.1\.mlp\.fc1: LSQ offers 2 to 16 bits, got 1 for the weight",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_plan_is_refused_and_leaves_the_model_untouched(
    kind: str, tiny_vit: nn.Module
) -> None:
    rules, message = WRONG[kind]
    modules, state = dict(tiny_vit.named_modules()), snapshot(tiny_vit)
    with pytest.raises(ValueError, match=message):
        convert_(tiny_vit, _plan(*rules), LSQ)
    assert dict(tiny_vit.named_modules()) == modules
    assert_same_state(snapshot(tiny_vit), state)
    assert tiny_vit.card.conversion is None


@pytest.mark.parametrize("fails_at", [1, 7, 24])
def test_factory_that_fails_on_the_way_leaves_the_model_untouched(
    fails_at: int, tiny_vit: nn.Module
) -> None:
    modules = dict(tiny_vit.named_modules())
    with pytest.raises(ValueError, match=r"blocks\.\d.*: no quantizer today"):
        convert_(tiny_vit, plan(), Factory(fails_at))
    assert dict(tiny_vit.named_modules()) == modules


def test_model_is_converted_once_only(tiny_vit: nn.Module) -> None:
    convert_(tiny_vit, plan(), LSQ)
    state = snapshot(tiny_vit)
    with pytest.raises(ValueError, match="converted already; convert the float model once"):
        convert_(tiny_vit, plan(), LSQ)
    assert_same_state(snapshot(tiny_vit), state)


class Standardized(nn.Conv2d):
    """Multiplies by another weight than its parameter, and pads by itself."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / self.weight.std()
        return F.conv2d(F.pad(x, (1, 1, 1, 1), value=1.0), weight, self.bias)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (DerivedLinear(4, 4), torch.randn(2, 4)),
        (Standardized(3, 4, 3, bias=False), torch.randn(2, 3, 5, 5)),
        (nn.Conv1d(3, 4, 3), torch.randn(2, 3, 9)),
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), torch.randn(2, 3, 5, 5)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layer_of_any_class_keeps_its_forward_pass_and_quantizes_what_it_multiplies(
    layer: nn.Module, x: Tensor
) -> None:
    model: Any = nn.Sequential(copy.deepcopy(layer))
    convert_(model, _plan({"pattern": "*", "weight": {"bits": 8}, "input": {"bits": 8}}), Affine)
    assert torch.equal(model(x), layer(x))
    assert (isinstance(model[0], type(layer)) and "0.bias" in dict(model.named_parameters())) or (
        layer.bias is None and "bias" in model[0]._parameters
    )
    qat.calibrate(model, [x])
    again = pickle.loads(pickle.dumps(copy.deepcopy(model[0])))
    assert torch.equal(again(x), model(x))
    seen: dict[str, Tensor] = {}
    for name, quantizer in quantizers(model):
        quantizer.register_forward_hook(
            lambda _, operands, __, name=name: seen.update({name: operands[0].detach()})
        )
    error = (model(x) - layer(x)).norm() / layer(x).norm()
    assert 0 < error < 0.05
    assert set(seen) == {"0.weight_quantizer", "0.input_quantizer"}
    if isinstance(layer, Standardized):
        assert seen["0.weight_quantizer"].std() == pytest.approx(1, rel=1e-5)
        assert seen["0.input_quantizer"].shape == (2, 3, 7, 7)


def test_calibration_in_order_takes_the_weight_that_is_multiplied() -> None:
    model: Any = nn.Sequential(Standardized(3, 4, 3))
    convert_(model, _plan({"pattern": "*", "weight": {"bits": 8}}), Affine)
    calibrate_in_order(model, torch.randn(2, 3, 5, 5))
    weight = (model[0].weight / model[0].weight.std()).detach()
    scale = model[0].weight_quantizer.scale.detach()
    assert float(scale * 127.5) == pytest.approx(float(weight.abs().max()), rel=1e-2)


MASKS = {
    "none": {},
    "bool": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).triu(3)},
    "added": {"attn_mask": torch.linspace(-1, 1, 25).view(5, 5)},
    "per-head": {"attn_mask": torch.linspace(-1, 1, 150).view(6, 5, 5)},
    "padding": {"key_padding_mask": torch.tensor([[False] * 4 + [True]] * 3)},
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_of_torch_quantizes_its_packed_projection_and_both_products(
    kind: str, batch_first: bool
) -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()
    model: Any = nn.ModuleDict({"odd": copy.deepcopy(module)})
    spec = {"bits": 16}
    operands = ("weight", "input", "query", "key", "attention", "value")
    convert_(model, _plan({"pattern": "*", **dict.fromkeys(operands, spec)}), Affine)
    x = torch.randn(3, 5, 8) if batch_first else torch.randn(5, 3, 8)
    options: dict[str, Any] = {"need_weights": False, **MASKS[kind]}
    expected = module(x, x, x, **options)[0]
    assert torch.equal(model["odd"](x, x, x, **options)[0], expected)
    with qat.observing(model):
        model["odd"](x, x, x, **options)
    found = model["odd"](x, x, x, **options)[0]
    assert not torch.equal(found, expected)
    assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert {"odd.in_proj_weight", "odd.out_proj.weight"} <= set(model.state_dict())
    with pytest.raises(ValueError, match="call it with need_weights=False"):
        model["odd"](x, x, x)


def test_multihead_attention_with_separate_projections_is_refused_by_name() -> None:
    model = nn.ModuleDict({"odd": nn.MultiheadAttention(8, 2, kdim=4)})
    with pytest.raises(ValueError, match=r"odd: .*keep it in float by an earlier rule"):
        convert_(model, _plan({"pattern": "*", "weight": FOUR}), LSQ)
    rules = {"pattern": "odd", "optional": True}, {"pattern": "*", "weight": FOUR}
    convert_(model, _plan(*rules), LSQ)
    assert type(model["odd"]) is nn.MultiheadAttention


@pytest.mark.parametrize("optional", [True, False])
def test_rule_without_effect_is_refused_unless_it_is_optional(optional: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    rules = (
        {"pattern": "gone", "optional": optional, "weight": FOUR},
        {"pattern": "*", "optional": optional, "weight": FOUR, "query": FOUR},
    )
    if optional:
        convert_(model, _plan(*rules), LSQ)
        assert isinstance(model[0], QuantLinear)
    else:
        with pytest.raises(ValueError, match=r"'gone' matches no .*write `optional: true`"):
            convert_(model, _plan(*rules), LSQ)


def test_layer_used_under_two_names_is_quantized_under_both() -> None:
    model = nn.ModuleDict({"first": nn.Linear(4, 4)})
    model["second"] = model["first"]
    convert_(model, _plan({"pattern": "*", "weight": FOUR}), LSQ)
    assert isinstance(model["first"], QuantLinear)
    assert model["second"] is model["first"]


def test_factory_dispatches_on_the_operand(tiny_vit: nn.Module) -> None:
    convert_(tiny_vit, plan(1), BinaryQuantizers())
    kinds = {(found.operand, type(found).__name__) for _, found in quantizers(tiny_vit)}
    activations = (Operand.INPUT, Operand.QUERY, Operand.KEY, Operand.VALUE)
    assert kinds == {
        (Operand.WEIGHT, "BinaryWeight"),
        (Operand.ATTENTION, "BinaryAttentionMap"),
        *((operand, "BinaryActivation") for operand in activations),
    }
