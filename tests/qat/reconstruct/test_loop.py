"""The reconstruction engine: stages, terms, trainable sets, resuming."""

import copy
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from ptq_init.dopq_vit import DopQViT
from ptq_init.mgrq import MGRQ, LocalSupervision, LogitSupervision, TokenSupervision
from ptq_init.minmax import MinMaxRange
from ptq_init.repq_vit import RepQViT
from ptq_init.ttaq import TTAQ
from qat import Phase, Plan, convert_
from qat.calibrate import Initialiser
from qat.models import timm_model
from qat.quantizers import LSQ, Affine, LogSqrt2, PerOperand, TanQ, quantizers
from qat.reconstruct import JointTuning, Reconstruction, activation_bytes
from qat.reconstruct.data import token_importance
from qat.reconstruct.stages import stages
from qat.reconstruct.terms import OutputError, Step
from qat.reconstruct.trainable import Rounding, SoftRounding, Steps, Weights
from tests.ptq_init.common import Memory, images, plan, tiny_swin, tiny_vit

LOG = PerOperand(attention=LogSqrt2)
METHODS = [
    MGRQ(num_steps=3, batch_size=4),
    MGRQ(
        num_steps=3,
        batch_size=4,
        supervision="logits",
        rounding="adaround",
        drop=0.5,
        normalise=False,
    ),
    DopQViT(num_steps=2, batch_size=4),
    TTAQ(num_steps=2, batch_size=4, pem="C"),
    MGRQ(num_steps=1, batch_size=4, joint=JointTuning(num_steps=2, batch_size=4)),
]
NAMES = ["mgrq", "adaround", "dopq", "ttaq", "joint"]
BUILDS = [tiny_vit, tiny_swin]


def _converted(build: Callable[[], nn.Module] = tiny_vit, bits: int = 4) -> nn.Module:
    model = build()
    convert_(model, plan(bits), LOG)
    return model


def _same(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    return list(left) == list(right) and all(
        torch.equal(v, right[k]) if isinstance(v, Tensor) else v == right[k]
        for k, v in left.items()
    )


@pytest.mark.parametrize("build", BUILDS)
def test_stages_compose_to_the_model(build: Callable[[], nn.Module]) -> None:
    model = build()
    with torch.no_grad():
        x = expected = images(2)
        expected = model(expected)
        for stage in stages(model):
            x = stage.forward(x)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("build", BUILDS)
def test_stages_cover_every_quantizer_once(build: Callable[[], nn.Module]) -> None:
    model = _converted(build)
    covered = [q for s in stages(model) for m in s.modules for _, q in quantizers(m)]
    assert sorted(map(id, covered)) == sorted(id(q) for _, q in quantizers(model))


def test_architecture_without_a_chain_of_its_own_is_divided_all_the_same() -> None:
    model = timm_model("mobilenetv3_small_050", num_classes=4).eval()
    x = torch.randn(2, 3, 224, 224)
    y = x
    for stage in stages(model):
        y = stage.forward(y)
    assert torch.equal(y, model(x))


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_method_runs_on_every_architecture_and_leaves_plain_quantizers(
    build: Callable[[], nn.Module], method: Initialiser
) -> None:
    model, batch = _converted(build), images(8)
    types = [type(module) for module in model.modules()]
    flags = [(name, p.requires_grad) for name, p in model.named_parameters()]
    method(model, list(batch.split(4)))
    assert [type(module) for module in model.modules()] == types
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(after[name] == flag for name, flag in flags)
    assert all(q.phase is Phase.QUANTIZE for _, q in quantizers(model))
    with torch.no_grad():
        assert torch.isfinite(model(batch)).all()


@pytest.mark.parametrize("trained", ["weights", "rounding", "steps"])
def test_training_brings_each_block_closer_to_its_float_output(trained: str) -> None:
    choices = {
        "weights": Weights(3e-3),
        "rounding": Rounding(3e-2, strength=1e-5),
        "steps": Steps(3e-2),
    }
    batch, model = images(32), _converted(bits=3)
    original = copy.deepcopy(model)
    RepQViT()(model, [batch])
    journal = Memory()
    loop = Reconstruction(
        {"block": OutputError()}, {"block": 1.0}, (choices[trained],), 60, batch_size=32
    )
    loop(model, batch, journal, original)
    for part in ("blocks.0", "blocks.1"):
        losses = [values["block"] for name, _, values in journal.losses if name == part]
        assert sum(losses[-5:]) < 0.97 * sum(losses[:5]), part


def test_joint_tuning_brings_all_outputs_closer_together() -> None:
    batch, model = images(32), _converted(bits=3)
    original = copy.deepcopy(model)
    RepQViT()(model, [batch])
    journal = Memory()
    JointTuning(60, batch_size=32, lr=2e-3)(model, batch, original, journal)
    for term in ("output", "logits"):
        losses = [values[term] for name, _, values in journal.losses if name == "joint"]
        assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), term


COMPILED = """
import copy, torch
from ptq_init.repq_vit import RepQViT
from qat.reconstruct import JointTuning
from tests.ptq_init.common import Memory, images
from tests.qat.reconstruct.test_loop import _converted
first = []
for compiled in (False, True):
    model, batch, journal = _converted(), images(16), Memory()
    original = copy.deepcopy(model)
    RepQViT()(model, [batch])
    JointTuning(2, batch_size=16, compiled=compiled)(model, batch, original, journal)
    first.append(journal.losses[0][2]["loss"])
print(first[1] / first[0])
"""


@pytest.mark.slow
def test_compiled_joint_tuning_has_the_loss_of_the_eager_one_but_for_bfloat16() -> None:
    """In a process of its own: the tests' checks of types do not compile."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], check=True, capture_output=True, text=True
    )
    assert float(done.stdout) == pytest.approx(1.0, rel=0.1)


def test_targets_come_from_the_float_model_and_inputs_from_the_quantized_prefix() -> None:
    seen: list[Step] = []

    class Watch:
        needs_layers = True

        def __call__(self, step: Step) -> Tensor:
            seen.append(step)
            return step.output.square().mean()

    model, batch = _converted(), images(4)
    original = tiny_vit()
    RepQViT()(model, [batch])
    with torch.no_grad():
        exact, quantized = batch, batch
        goals, starts = [], []
        for ours, theirs in zip(stages(copy.deepcopy(model)), stages(original), strict=True):
            starts.append(ours.forward(quantized))
            exact, quantized = theirs.forward(exact), starts[-1]
            goals.append(exact)
    loop = Reconstruction({"watch": Watch()}, {"watch": 0.0}, (Weights(0.0),), 1, 64)
    loop(model, batch, original=tiny_vit())
    rows = {tuple(row.flatten().tolist()) for row in goals[1]}
    assert {tuple(row.flatten().tolist()) for row in seen[1].target} <= rows
    rows = {tuple(row.flatten().tolist()) for row in starts[2]}
    assert {tuple(row.flatten().tolist()) for row in seen[2].output.detach()} <= rows
    assert [len(step.layers) for step in seen] == [0, 4, 4, 1]
    assert_close(seen[1].remainder(seen[1].target), seen[1].logits)


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_interrupted_method_leaves_the_model_untouched_and_resumes_to_the_same_weights(
    method: Initialiser,
) -> None:
    batches = list(images(8).split(4))
    straight = _converted()
    method(straight, batches)
    model, journal = _converted(), Memory(stop_after=3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt):
        method(model, batches, journal)
    assert _same(model.state_dict(), before)
    journal.stop_after = 1000
    steps = len(journal.losses)
    method(model, batches, journal)
    assert _same(model.state_dict(), straight.state_dict())
    assert len(journal.losses) > steps
    assert not {part for part, *_ in journal.losses[steps:]} & {*list(journal.parts)[:3]}


def test_weights_of_terms_are_normalised_at_the_first_step_of_each_stage() -> None:
    class Constant:
        needs_layers = False

        def __init__(self, value: float) -> None:
            self.value = value

        def __call__(self, step: Step) -> Tensor:
            return self.value + 0 * step.output.sum()

    terms = {"first": Constant(2.0), "second": Constant(0.05)}
    model, totals = _converted(), {}
    RepQViT()(model, [images(2)])
    for normalise in (True, False):
        journal = Memory()
        loop = Reconstruction(
            terms, {"first": 1.0, "second": 0.5}, (Weights(1e-3),), 1, 2, normalise
        )
        loop(copy.deepcopy(model), images(2), journal)
        totals[normalise] = [values["loss"] for _, _, values in journal.losses]
        assert all(values["second"] == pytest.approx(0.05) for _, _, values in journal.losses)
    assert totals[True] == pytest.approx([3.0] * 4)
    assert totals[False] == pytest.approx([2.025] * 4)


def test_output_error_per_token_is_blind_to_the_size_of_a_token() -> None:
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(2, 3, 16, generator=generator)
    output = target + 0.1 * torch.randn(2, 3, 16, generator=generator)
    big = torch.ones(2, 3, 1)
    big[0, 0] = 1000

    def error(scope: Any, out: Tensor, goal: Tensor) -> Tensor:
        return OutputError(scope)(Step(out, goal, goal, lambda x: x))

    plain = error("token", output, target)
    assert_close(error("token", output * big, target * big), plain, rtol=1e-3, atol=0)
    assert_close(
        error("tensor", output, target), (output - target).square().sum() / target.square().sum()
    )
    assert error("token", target, target) == 0


def test_tokens_of_an_image_of_features_are_normalised_over_its_channels() -> None:
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    goal = x * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1) + 1  # other channels, same positions
    last = OutputError().between(x.movedim(1, -1), goal.movedim(1, -1), -1)
    assert_close(OutputError().between(x, goal, 1), last)
    assert last > 0.1 > 100 * OutputError().between(x, goal, -1)


def test_rounding_of_weights_that_it_cannot_train_is_refused() -> None:
    model = tiny_vit()
    convert_(model, Plan.uniform(4, 4, zero_point=False), LSQ)
    MinMaxRange()(model, [images(2)])
    with pytest.raises(ValueError, match=r"has LSQ; take rounding 'ste'"):
        Rounding().attach((model,))


def test_global_supervision_is_the_divergence_of_logits() -> None:
    ours, theirs = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    step = Step(ours, ours, theirs, lambda x: x)
    p = torch.tensor([[0.0, 1.0]]).softmax(1)
    q = torch.tensor([[0.5, 0.0]]).softmax(1)
    assert_close(LogitSupervision(2.0)(step), 4 * (p * (p / q).log()).sum())
    assert LogitSupervision()(Step(theirs, theirs, theirs, lambda x: x)).abs() < 1e-7


def test_importance_of_tokens_is_the_share_of_each_in_the_gradient_of_the_models_own_answer() -> (
    None
):
    model = tiny_vit().eval().requires_grad_(False)
    shares = token_importance(stages(model), images(6), torch.Generator().manual_seed(0), 4)
    *blocks, logits = shares
    assert logits is None
    for share in blocks:
        assert share is not None and share.shape == (6, 17)
        assert_close(share.sum(1), torch.ones(6))
    last = blocks[-1]
    assert last is not None and last[:, 0].min() == 1  # the classifier reads the class token alone
    one, two = (
        token_importance(stages(model), images(6), torch.Generator().manual_seed(0), n)
        for n in (1, 6)
    )
    for a, b in zip(one[:-1], two[:-1], strict=True):
        assert a is not None and b is not None
        assert_close(a, b, rtol=1e-3, atol=1e-6)  # however many at once


def test_global_supervision_by_tokens_weighs_each_tokens_error() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(2, 3, 8, generator=generator) for _ in range(2))
    importance = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]])
    step = Step(ours, theirs, theirs, lambda x: x, importance=lambda: importance)

    def error(image: int, token: int) -> Tensor:
        return OutputError()(Step(ours[image, token], theirs[image, token], theirs, lambda x: x))

    expected = (error(0, 0) + (error(1, 1) + error(1, 2)) / 2) / 2
    assert_close(TokenSupervision()(step), expected)
    assert TokenSupervision()(Step(ours, theirs, theirs, lambda x: x)) == 0


def test_local_supervision_is_the_mean_divergence_of_softened_layer_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 5, 4, generator=generator) for _ in range(2))
    step = Step(a, a, a, lambda x: x, [(a, b), (b, b)])
    p, q = (b / b.std()).softmax(-1), (a / b.std()).softmax(-1)
    assert_close(LocalSupervision()(step), (p * (p / q).log()).sum(-1).mean() / 2)
    assert LocalSupervision()(Step(a, a, a, lambda x: x)) == 0


def test_soft_rounding_starts_at_the_weight_and_ends_on_the_grid() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = _converted().blocks[0].mlp.fc1
    quantizer = layer.weight_quantizer
    assert isinstance(quantizer, Affine)
    weight = torch.randn(layer.weight.shape, generator=generator)
    quantizer.observe(weight)
    quantizer.freeze()
    quantizer.phase = Phase.QUANTIZE
    soft = SoftRounding(weight, quantizer)
    step = quantizer.scale.detach()
    codes = quantizer.codes(weight).values
    inside = (codes > 0) & (codes < 15)
    assert ((soft(weight) - weight).abs() <= 0.011 * step)[inside].all()
    assert torch.equal(soft.rounded(), quantizer(soft.rounded()))
    assert ((soft.rounded() - weight).abs() <= 0.5001 * step)[inside].all()
    with torch.no_grad():
        soft.v.copy_(torch.where(torch.rand(soft.v.shape, generator=generator) > 0.5, 9.0, -9.0))
    assert soft.indecision(2.0) == 0
    assert torch.equal(soft(weight), soft.rounded())


def test_dropping_mixes_quantized_and_float_values() -> None:
    outputs = []

    class Watch:
        needs_layers = False

        def __call__(self, step: Step) -> Tensor:
            outputs.append(step.output.detach())
            return F.mse_loss(step.output, step.target)

    model = _converted()
    RepQViT()(model, [images(4)])
    for drop in (0.0, 0.5):
        loop = Reconstruction({"w": Watch()}, {"w": 1.0}, (Weights(0.0),), 1, 4, drop=drop)
        loop(copy.deepcopy(model), images(4))
    assert not torch.equal(outputs[1], outputs[5])


def test_exact_inputs_are_those_of_the_float_model() -> None:
    """With all of them, the only error left in a stage is its own."""
    errors = {}
    for share in (0.0, 1.0):
        model, batch = _converted(), images(4)
        original = tiny_vit()
        RepQViT()(model, [batch])
        terms, weights = {"block": OutputError()}, {"block": 1.0}
        journal = Memory()
        loop = Reconstruction(terms, weights, (Weights(0.0),), 1, 32, exact_inputs=share)
        loop(model, batch, journal, original)
        errors[share] = [values["block"] for _, _, values in journal.losses]
    assert errors[0.0][0] == errors[1.0][0]  # the images themselves
    assert errors[1.0][2] < 0.8 * errors[0.0][2]


def test_kept_activations_are_counted() -> None:
    model = tiny_vit()
    journal = Memory()
    quantized = _converted()
    RepQViT()(quantized, [images(4)])
    loop = Reconstruction({"b": OutputError()}, {"b": 1.0}, (Weights(1e-3),), 1, 2)
    loop(quantized, images(8), journal)
    assert journal.notes["activation_bytes"] == 4 * 3 * 8 * 17 * 24
    assert activation_bytes(stages(model), images(8)) == 4 * 3 * 8 * 17 * 24
    assert activation_bytes(stages(model), images(8), views=True) == 4 * 4 * 8 * 17 * 24


@pytest.mark.parametrize("wrong", [{"num_steps": 0}, {"batch_size": 0}, {"drop": 1.0}])
def test_settings_without_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="num_steps and batch_size of at least 1 and drop"):
        Reconstruction({}, {}, (), **{"num_steps": 1, **wrong})
    with pytest.raises(ValueError, match="joint tuning needs num_steps and batch_size"):
        JointTuning(num_steps=0)
    with pytest.raises(ValueError, match=r"exact_inputs must be in \[0, 1\]"):
        Reconstruction({}, {}, (), 1, exact_inputs=1.5)
    with pytest.raises(ValueError, match="need weights"):
        Reconstruction({"block": OutputError()}, {}, (), 1)


def test_tanq_models_reconstruct() -> None:
    model = tiny_vit()
    convert_(model, plan(3), PerOperand(attention=TanQ))
    DopQViT(num_steps=2, batch_size=4)(model, [images(8)])
    assert model.blocks[0].attn.av.left_quantizer.scale > 0
