"""TTAQ's forms of PEM and PCR are their formulas, and do in training what they are for."""

import copy
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ptq_init.mgrq import MGRQ
from ptq_init.repq_vit import RepQViT
from ptq_init.ttaq import TTAQ, WeakPerturbation
from ptq_init.ttaq_terms import (
    PCR,
    PEM,
    NoisyInputs,
    added_size,
    largest_gain,
    measured_gain,
    relative_size,
    size,
)
from qat import Phase, QuantSpec, convert_
from qat.layers import QuantConv2d, QuantLinear, quantized_weights
from qat.quantizers import Affine, LogSqrt2, PerOperand
from qat.reconstruct import Reconstruction, Tuning
from qat.reconstruct.stages import stages
from qat.reconstruct.terms import OutputError, Probe, QuantizedWeight, Step
from qat.reconstruct.trainable import Rounding, Steps, Weights
from qat.spec import Granularity, Operand
from tests.ptq_init.common import images, plan, tiny_vit

START = torch.tensor([[3.0, 1.2], [0.4, -2.0]])
VALUE = torch.tensor([[3.0, 1.0], [0.0, -2.0]])  # on a grid of step 1


def quantized_weight(shift: Tensor | None = None, start: Tensor = START) -> QuantizedWeight:
    """A linear layer whose weight is `start` on a grid of step 1."""
    linear = nn.Linear(start.shape[1], len(start), bias=False)
    with torch.no_grad():
        linear.weight.copy_(start)
    spec = QuantSpec(4, True, Granularity.PER_TENSOR)
    quantizer = Affine(spec, tuple(start.shape), Operand.WEIGHT)
    quantizer.phase = Phase.QUANTIZE
    return QuantizedWeight(QuantLinear(linear, quantizer), start, shift)


def converted(bits: int = 3) -> nn.Module:
    """The tiny ViT with quantizers."""
    model = tiny_vit()
    convert_(model, plan(bits), PerOperand(attention=LogSqrt2))
    return model


def started(bits: int = 3) -> Any:
    """The tiny ViT as TTAQ starts from it."""
    model = converted(bits)
    RepQViT("paper", per_token=True)(model, [images(16)])
    return model


@cache
def trained(**settings: Any) -> nn.Module:
    """The tiny ViT after TTAQ; without PEM and PCR unless asked for."""
    model = converted()
    base: dict[str, Any] = {"pem": "none", "pcr": "none", "num_steps": 10, "lr": 4e-3}
    TTAQ(**{**base, **settings})(model, [images(8)])
    return model


@pytest.mark.parametrize(
    ("penalty", "expected"),
    [
        (size, (9 + 1 + 0 + 4) / 4),
        (relative_size, (10 / (9 + 1.44) + 4 / (0.16 + 4)) / 2),
        (added_size, (0.04 + 0.16) / 4),
        (measured_gain, (0.5 * 9 + 2 * (1 + 4)) / 4),
        # Eigenvalues of W W^T = [[10, -2], [-2, 4]].
        (largest_gain, (7 + 13**0.5) / 4),
    ],
)
def test_penalties_of_a_small_weight_by_hand(
    penalty: Callable[[QuantizedWeight], Tensor], expected: float
) -> None:
    weight = quantized_weight(torch.tensor([0.5, 2.0]))
    assert torch.equal(weight.value.detach(), VALUE)
    assert penalty(weight).item() == pytest.approx(expected, rel=1e-4)


def test_size_and_added_size_pull_weights_inwards_and_back_to_where_they_were() -> None:
    weight = quantized_weight()
    size(weight).backward()
    latent: Any = weight.layer.weight
    assert_close(latent.grad, 2 * VALUE / 4)
    latent.grad = None
    added_size(weight).backward()
    assert_close(latent.grad, 2 * (VALUE - START) / 4)


def test_measured_gain_is_the_energy_that_such_errors_gain() -> None:
    generator = torch.Generator().manual_seed(0)
    shift = torch.tensor([0.5, 2.0, 0.1])
    start = torch.randn(4, 3, generator=generator) * 3
    weight = quantized_weight(shift, start)
    errors = torch.randn(200_000, 3, generator=generator) * shift.sqrt()
    energy = (errors @ weight.value.detach().T).square().sum(1).mean()
    assert (12 * measured_gain(weight)).item() == pytest.approx(energy.item(), rel=0.02)


def test_measured_gain_of_a_grouped_convolution_takes_each_groups_channels() -> None:
    conv = nn.Conv2d(4, 6, 3, groups=2, bias=False)
    shift = torch.tensor([0.1, 1.0, 2.0, 5.0])
    weight = QuantizedWeight(QuantConv2d(conv), conv.weight.detach(), shift)
    squares = conv.weight.detach().square().sum((2, 3))
    expected = (squares[:3] * shift[:2]).sum() + (squares[3:] * shift[2:]).sum()
    assert_close(measured_gain(weight).detach(), expected / conv.weight.numel())


def test_largest_gain_is_the_squared_spectral_norm() -> None:
    start = torch.randn(12, 20, generator=torch.Generator().manual_seed(1)) * 2
    weight = quantized_weight(start=start)
    norm = torch.linalg.matrix_norm(weight.value.detach(), 2)
    assert (240 * largest_gain(weight)).item() == pytest.approx(norm.item() ** 2, rel=0.03)


def step_of(
    run: Callable[[Tensor], Tensor], view: Tensor | None = None, last: bool = False
) -> Step:
    """A step of a stage `run` with inputs of two images."""
    inputs = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    probe = Probe(run, inputs, view, [], last, torch.Generator().manual_seed(0))
    target = torch.tensor([[2.0, 4.0], [5.0, -2.0]])
    return Step(run(inputs), target, target, lambda x: x, probe=probe)


def pcr(form: str, step: Step) -> list[float]:
    """The terms of a form of PCR, with the squared error over the energy of the second."""
    return [make(OutputError("tensor"))(step).item() for make in PCR[form]]


def test_consistency_terms_by_hand() -> None:
    view = torch.tensor([[1.0, 2.5], [3.0, -1.0]])
    step = step_of(lambda x: 2 * x, view)  # outputs [[2, 4], [6, -2]], of the view [[2, 5], ...]
    assert pcr("1", step) == pytest.approx([1 / (4 + 16 + 36 + 4)])
    assert pcr("3", step) == pytest.approx([(1 + 1) / (4 + 16 + 25 + 4)])
    assert pcr("1+3", step) == pytest.approx([*pcr("3", step), *pcr("1", step)])
    assert pcr("2", step) == [0]
    drops = iter((1.0, 1.5))
    step = step_of(lambda x: x * next(drops))
    assert pcr("2", step) == pytest.approx([0.25])


def test_consistency_of_logits_is_the_divergence_of_predictions() -> None:
    step = step_of(lambda x: x, torch.zeros(2, 2), last=True)
    p, q = step.output.softmax(1), torch.full((2, 2), 0.5)
    assert pcr("1", step) == pytest.approx([(p * (p / q).log()).sum(1).mean().item()])


def test_noise_on_inputs_has_the_share_of_their_deviation_that_is_asked_for() -> None:
    inputs = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    inputs *= torch.tensor([1.0, 5.0, 0.1])
    seen: list[Tensor] = []
    probe = Probe(lambda x: seen.append(x) or x, inputs, None, [], False, torch.Generator())
    step = Step(inputs, inputs, inputs, lambda x: x, probe=probe)
    NoisyInputs(OutputError("tensor"), 0.2)(step)
    assert_close((seen[0] - inputs).std(0), 0.2 * inputs.std(0), rtol=0.05, atol=0)


def test_views_are_the_perturbed_images_behind_the_quantized_stages() -> None:
    seen: list[Step] = []

    class Watch:
        needs_layers = False

        def __call__(self, step: Step) -> Tensor:
            seen.append(step)
            return step.output.square().mean()

    def perturb(x: Tensor, generator: torch.Generator) -> Tensor:
        return x + torch.randn(x.shape, generator=generator)

    model, batch = started(), images(4)
    expected, clean = perturb(batch, torch.Generator().manual_seed(0)), batch
    shifts = []
    with torch.no_grad():
        for stage in stages(model)[:2]:
            last, before = expected, clean
            expected, clean = stage.forward(expected), stage.forward(clean)
        quantizer: Any = model.get_submodule("blocks.0.attn.qkv.input_quantizer")
        norm = model.get_submodule("blocks.0.norm1")
        change = quantizer(norm(last)) - quantizer(norm(before))
        shifts.append(change.square().mean((0, 1)))
    loop = Reconstruction({"w": Watch()}, {"w": 0.0}, (Weights(0.0),), 1, 64, perturb=perturb)
    loop(model, batch)
    rows = {tuple(row.flatten().tolist()) for row in expected}
    probe = seen[2].probe
    assert probe is not None
    assert probe.view is not None
    assert {tuple(row.flatten().tolist()) for row in probe.view} <= rows
    assert [step.probe.last for step in seen if step.probe] == [False, False, False, True]
    qkv = next(w for w in seen[1].probe.weights if w.layer.out_features == 72)  # type: ignore[union-attr]
    assert qkv.shift is not None
    assert_close(qkv.shift, shifts[0])


def test_terms_that_compare_views_ask_for_a_perturbation() -> None:
    for form in (PCR["1"][0], PCR["3"][0]):
        with pytest.raises(ValueError, match="perturbs no images; set `perturb`"):
            form(OutputError())(step_of(lambda x: x))
    with pytest.raises(ValueError, match="PEM-C measures input errors on perturbed images"):
        measured_gain(quantized_weight())
    with pytest.raises(ValueError, match=r"PCR-2 compares random drops: set drop, to 0\.5"):
        TTAQ(pcr="2")


def test_without_pem_and_pcr_it_is_mgrqs_block_loss_bit_for_bit() -> None:
    ours, theirs = converted(), converted()
    TTAQ(pem="none", pcr="none", num_steps=3)(ours, [images(16)])
    MGRQ(global_weight=0.0, local_weight=0.0, num_steps=3)(theirs, [images(16)])
    for name, value in ours.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, theirs.state_dict()[name]), name


@pytest.mark.parametrize("form", [name for name in PEM if name != "E"])
def test_each_weight_penalty_lowers_what_it_penalises(form: str) -> None:
    start = {name: weight.detach() for name, weight, _ in quantized_weights(started().blocks)}
    term: Any = PEM[form](OutputError())

    def penalty(model: Any) -> float:
        weights = [
            QuantizedWeight(model.blocks.get_submodule(name), start[name], torch.ones(w.shape[1]))
            for name, w, _ in quantized_weights(model.blocks)
        ]
        return sum(term.penalty(weight).item() for weight in weights)

    # Straight through rounding, B makes weights swing about the boundary that they start near.
    how = {"rounding": "adaround", "lr": 0.3} if form == "B" else {}
    mitigated, plain = trained(pem=form, pem_weight=20.0, **how), trained(**how)
    assert penalty(mitigated) < 0.97 * penalty(plain)


def test_consistency_makes_the_logits_change_less_with_the_image() -> None:
    batch = images(16)
    view = WeakPerturbation()(batch, torch.Generator().manual_seed(5))

    def change(model: nn.Module) -> float:
        with torch.no_grad():
            clean, perturbed = (model(x).log_softmax(1) for x in (batch, view))
        return ((perturbed - clean).norm() / clean.norm()).item()

    assert change(trained(pcr="1", pcr_weight=20.0)) < 0.9 * change(trained())


def test_perturbation_is_repeatable_and_each_images_own() -> None:
    batch = images(6)
    first = WeakPerturbation()(batch, torch.Generator().manual_seed(2))
    again = WeakPerturbation()(copy.deepcopy(batch), torch.Generator().manual_seed(2))
    assert torch.equal(first, again)
    changes = (first - batch).flatten(1).std(1)
    assert len(set(changes.tolist())) == 6
    still = WeakPerturbation(noise=0.0, blur=0.0, gain=0.0, offset=0.0)
    assert_close(still(batch, torch.Generator()), batch)


@pytest.mark.parametrize("method", [MGRQ, TTAQ])
def test_methods_of_one_pass_have_what_they_hand_on_as_flat_fields(method: type) -> None:
    theirs = {field.name: field.type for field in fields(method)}
    assert {field.name: field.type for field in fields(Tuning)}.items() <= theirs.items()
    chosen = {"rounding": "adaround", "num_steps": 3, "batch_size": 5, "lr": 0.1, "step_lr": 0.2}
    chosen |= {"drop": 0.3, "exact_inputs": 0.4, "seed": 6}
    loop = method(**chosen).reconstruction()
    assert loop.train == (Rounding(lr=0.1), Steps(0.2))
    assert (loop.num_steps, loop.batch_size, loop.seed) == (3, 5, 6)
    assert (loop.drop, loop.exact_inputs) == (0.3, 0.4)
