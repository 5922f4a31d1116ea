"""Metrics: closed forms on a linear model, gradients by autograd, the divergence by hand."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

import qat
from qat import Operand
from qat.likelihood import log_likelihoods
from qat.quantizers import Affine, quantizers
from qat.quantizers.slots import Slot, slot_of
from qat.search.metrics import (
    DiagonalFisher,
    FirstOrder,
    HessianTrace,
    OutputDivergence,
    Removal,
    TaylorRemoval,
    TokenFisher,
)
from qat.search.metrics.taylor import weight_gradients
from qat.search.probe import Probe, probing
from qat.search.sensitivity import Metric, Table, monotone
from tests.conftest import make_tiny_vit
from tests.qat.common import assert_same_state, plan, snapshot

WEIGHT = Slot("layer", Operand.WEIGHT)
ALL = (
    TaylorRemoval(),
    FirstOrder(),
    DiagonalFisher(),
    TokenFisher(),
    HessianTrace(num_samples=2),
    OutputDivergence(),
    Removal(),
)


class Linear(nn.Module):
    """Logits by one linear layer: gradients and Hessian have closed forms."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))


def linear() -> tuple[nn.Module, Tensor]:
    """The model, converted at eight bits, and five images of 1x1 pixel."""
    model = Linear()
    rules = [{"pattern": "layer", "weight": {"bits": 8}, "input": {"bits": 8}}]
    qat.convert_(model, qat.Plan.from_list(rules), Affine)
    return model, torch.randn(5, 3, 1, 1)


def vit() -> tuple[nn.Module, Tensor]:
    """The tiny ViT, converted at eight bits, and four images."""
    model = make_tiny_vit()
    qat.convert_(model, plan(8), Affine)
    qat.calibrate(model, [torch.randn(4, 1, 8, 8)])
    return model, torch.randn(4, 1, 8, 8)


def table_of(metric: Metric, model: nn.Module, images: Tensor, *bits: int) -> Table:
    widths = {slot_of(path, q): bits for path, q in quantizers(model)}
    with probing(model, images, widths) as probes:
        return metric(model, probes, images)


def weight_error(model: nn.Module, images: Tensor, bits: int) -> Tensor:
    with probing(model, images, {WEIGHT: (bits,)}) as probes:
        return next(probes[WEIGHT].errors(model.layer.weight))  # type: ignore[union-attr,arg-type]


def by_hand(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Gradient of log p(top class) with respect to the weight, image by image."""
    weight = model.layer.weight.detach().clone().requires_grad_(True)  # type: ignore[union-attr]
    found = []
    for image in images:
        log_p = F.log_softmax(F.linear(image.flatten(), weight), -1)
        found.append(torch.autograd.grad(log_p.max(), weight)[0])
    return found


def test_taylor_metrics_of_a_weight_equal_their_formulas() -> None:
    model, images = linear()
    weight = model.layer.weight.detach()  # type: ignore[union-attr]
    error = weight_error(model, images, 3)
    gradients = by_hand(model, images)
    size = weight.numel()
    s = torch.stack([(g * weight).square() for g in gradients]).mean()
    expected = {
        TaylorRemoval: size * s * error.square().sum() / weight.square().sum(),
        FirstOrder: torch.stack([(g * error).sum() ** 2 for g in gradients]).mean(),
        DiagonalFisher: (torch.stack(gradients).square().mean(0) * error.square()).sum(),
    }
    for metric, value in expected.items():
        for at_once in (2, 8):  # in parts or whole
            made = metric(target="predicted", images_at_once=at_once)
            found = table_of(made, model, images, 3)[WEIGHT][3]
            assert found == pytest.approx(value.item(), rel=1e-4), metric


def test_taylor_metrics_of_an_activation_equal_their_formulas() -> None:
    model, images = linear()
    slot = Slot("layer", Operand.INPUT)
    weight = model.layer.weight.detach()  # type: ignore[union-attr]
    rows = images.flatten(1)
    with probing(model, images, {slot: (3,)}) as probes:
        errors = next(probes[slot].errors(rows))
    log_p = F.log_softmax(rows @ weight.T, -1)
    top = F.one_hot(log_p.argmax(1), 4).float()
    gradients = (top - log_p.exp()) @ weight  # d log p(y) / d x = W^T (e_y - p)
    share = errors.square().sum(1) / rows.square().sum(1)
    expected = {
        TaylorRemoval: ((gradients * rows).square().sum(1) * share).mean(),
        FirstOrder: (gradients * errors).sum(1).square().mean(),
        DiagonalFisher: (gradients * errors).square().sum(1).mean(),
    }
    for metric, value in expected.items():
        found = table_of(metric(target="predicted"), model, images, 3)[slot][3]
        assert found == pytest.approx(value.item(), rel=1e-4), metric


class Windows(nn.Module):
    """A layer that sees each image in so many windows, as its rows."""

    def __init__(self, number: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.number = nn.Linear(3, 4), number

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return self.layer(tokens.reshape(len(x) * self.number, -1, 3)).reshape(len(x), -1, 4).sum(1)


@pytest.mark.parametrize("metric", [TaylorRemoval(), FirstOrder(), TokenFisher()])
def test_windows_of_an_image_count_as_one_image(metric: Metric) -> None:
    images, tables = torch.randn(5, 3, 2, 2), []
    for number in (1, 2, 4):
        model = Windows(number)
        rules = [{"pattern": "layer", "weight": {"bits": 8}, "input": {"bits": 8}}]
        qat.convert_(model, qat.Plan.from_list(rules), Affine)
        tables.append(table_of(metric, model, images, 3))
    for slot, row in tables[0].items():
        assert [table[slot][3] for table in tables[1:]] == pytest.approx([row[3]] * 2, rel=1e-4)


def test_trace_of_an_operand_leaves_out_what_others_do_with_the_same_tensor() -> None:
    class Shortcut(Linear):
        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            return 0 * self.layer(x) + torch.cat([x, x[:, :1]], 1) ** 2

    model = Shortcut()
    rules = [{"pattern": "layer", "weight": {"bits": 8}, "input": {"bits": 8}}]
    qat.convert_(model, qat.Plan.from_list(rules), Affine)
    found = table_of(HessianTrace(num_samples=2), model, torch.randn(5, 3, 1, 1), 3)
    assert found[Slot("layer", Operand.INPUT)][3] == 0


def test_width_that_there_is_no_quantizer_for_leaves_the_model_as_it_was() -> None:
    model, images = vit()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="offers 2 to 16 bits, got 1"):
        table_of(TokenFisher(), model, images, 1)
    assert [type(module) for module in model.modules()] == before


def test_token_metric_keeps_cross_terms_inside_a_row_and_is_m4_for_weights() -> None:
    gradient = torch.tensor([[[1.0, 2.0], [3.0, -1.0]], [[0.0, 1.0], [1.0, 1.0]]])
    error = torch.tensor([[[1.0, 1.0], [2.0, 1.0]], [[1.0, -1.0], [1.0, -1.0]]])
    metric = TokenFisher()
    # Rows: 1 + 2 = 3, 6 - 1 = 5; then 0 - 1 = -1, 1 - 1 = 0.
    assert metric.score(gradient, gradient, [error]).tolist() == [9.0 + 25.0 + 1.0 + 0.0]
    weight = [error[:1]]
    expected = DiagonalFisher().score(gradient, gradient[:1], weight)
    assert expected.tolist() == [1.0 + 4 + 36 + 1 + 0 + 1 + 4 + 1]
    assert torch.equal(metric.score_weight(gradient, gradient[:1], weight), expected)


def test_trace_of_the_hessian_agrees_with_the_exact_one() -> None:
    model, images = linear()
    rows = images.flatten(1)
    weight = model.layer.weight.detach()  # type: ignore[union-attr]
    p = (rows @ weight.T).softmax(-1)
    # tr H = mean over images of |x|^2 * sum_c p_c (1 - p_c), for a weight and softmax regression.
    exact = (rows.square().sum(1) * (p * (1 - p)).sum(1)).mean()
    error = weight_error(model, images, 3).square().sum()
    expected = exact / weight.numel() * error
    found = table_of(HessianTrace(num_samples=200), model, images, 3)[WEIGHT][3]
    assert found == pytest.approx(expected.item(), rel=0.15)


def test_divergence_equals_the_mean_kl_by_hand() -> None:
    model, images = linear()
    weight = model.layer.weight.detach()  # type: ignore[union-attr]
    error = weight_error(model, images, 3)
    p = (images.flatten(1) @ weight.T).double().softmax(-1)
    q = (images.flatten(1) @ (weight + error).T).double().softmax(-1)
    expected = (p * (p / q).log()).sum(1).mean().item()
    assert table_of(OutputDivergence(), model, images, 3)[WEIGHT][3] == pytest.approx(
        expected, rel=1e-4
    )


def test_removal_is_the_change_of_the_logits_times_the_share() -> None:
    model, images = linear()
    weight = model.layer.weight.detach()  # type: ignore[union-attr]
    share = weight_error(model, images, 3).square().sum() / weight.square().sum()
    change = (images.flatten(1) @ weight.T).square().sum(1).mean()
    found = table_of(Removal(), model, images, 3)[WEIGHT][3]
    assert found == pytest.approx((change * share).item(), rel=1e-4)


def test_first_order_metric_tends_to_twice_the_divergence_for_small_errors() -> None:
    model, images = linear()
    model.double()
    truth = table_of(OutputDivergence(), model, images.double(), 8)[WEIGHT][8]
    found = [
        table_of(FirstOrder(seed=seed), model, images.double(), 8)[WEIGHT][8] for seed in range(200)
    ]
    assert sum(found) / len(found) == pytest.approx(2 * truth, rel=0.2)


def test_weight_gradients_of_a_convolution_are_those_of_autograd() -> None:
    conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
    x = torch.randn(2, 2, 6, 6)
    gradient = torch.randn(2, 3, 3, 3)
    found = weight_gradients(conv, x, gradient)
    for i in range(2):
        out = conv(x[i : i + 1])
        expected = torch.autograd.grad(out, conv.weight, gradient[i : i + 1])[0]
        assert_close(found[i], expected.flatten(1))


@pytest.mark.parametrize("metric", ALL, ids=lambda m: type(m).__name__)
def test_metric_covers_every_operand_and_leaves_the_model_as_it_was(metric: Metric) -> None:
    model, images = vit()
    before = snapshot(model)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    logits = model(images)
    table = table_of(metric, model, images, 2, 4)
    assert {slot.operand for slot in table} == set(Operand) - {Operand.LEFT, Operand.RIGHT}
    assert len(table) == 2 * (4 * 2 + 4)
    assert all(set(row) == {2, 4} and min(row.values()) >= 0 for row in table.values())
    assert_same_state(snapshot(model), before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert torch.equal(model(images), logits)


@pytest.mark.parametrize("metric", ALL, ids=lambda m: type(m).__name__)
def test_two_bits_cost_more_than_eight(metric: Metric) -> None:
    model, images = vit()
    table = table_of(metric, model, images, 2, 8)
    # The estimated trace of two random vectors may be zero for lack of curvature.
    decided = [row for row in table.values() if row[2] > 0]
    assert sum(row[2] > row[8] for row in decided) > 0.8 * len(decided) > 8


def test_key_alone_is_quantized_although_its_product_has_a_query_too() -> None:
    model, images = vit()
    key = Slot("blocks.0.attn", Operand.KEY)
    with probing(model, images, {key: (2,)}) as probes:
        assert OutputDivergence()(model, probes, images)[key][2] > 1e-9


def test_probed_model_computes_in_float_and_only_named_slots_are_held() -> None:
    model, images = vit()
    float_model = make_tiny_vit()
    float_model.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "quantizer" not in k}
    )
    with probing(model, images, {Slot("blocks.1.mlp.fc1", Operand.WEIGHT): (4,)}) as probes:
        assert list(probes) == [Slot("blocks.1.mlp.fc1", Operand.WEIGHT)]
        assert_close(model(images), float_model(images))


def test_block_that_raises_gives_the_quantizers_back() -> None:
    model, images = vit()
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt), probing(model, images, {}):
        raise KeyboardInterrupt
    assert_same_state(snapshot(model), before)


def test_one_bit_activation_is_compared_at_its_best_factor() -> None:
    from binaryvit import BinaryQuantizers

    quantizer = BinaryQuantizers()(qat.QuantSpec(1), (3,), Operand.INPUT)
    probe = Probe({1: quantizer})
    x = torch.tensor([[1.0, -2.0, 3.0]])
    probe.calibrate(torch.tensor([[1.0, -2.0, 3.0], [-1.0, 2.0, -3.0]]))  # a shift of zero
    # sign(x) = (1, -1, 1) and mean |x| = 2.
    assert_close(probe.at(1, x), torch.tensor([[2.0, -2.0, 2.0]]))


@pytest.mark.parametrize(
    "metric", [TaylorRemoval, FirstOrder, DiagonalFisher, TokenFisher, HessianTrace]
)
def test_metric_with_labels_is_refused_without_and_uses_them_with(metric: type) -> None:
    model, images = linear()
    with probing(model, images, {WEIGHT: (3,)}) as probes:
        with pytest.raises(ValueError, match=r"needs the labels.*'sampled' or 'predicted'"):
            metric(target="labels")(model, probes, images)
        found = [
            metric(target="labels")(model, probes, images, torch.tensor(labels))[WEIGHT][3]
            for labels in ([0] * 5, [1] * 5)
        ]
    if metric is not HessianTrace:  # the curvature of softmax regression knows no labels
        assert found[0] != found[1]


def test_unknown_target_is_refused() -> None:
    with pytest.raises(ValueError, match="target must be one of sampled, predicted, labels"):
        DiagonalFisher(target="label")


def test_sampled_targets_follow_the_prediction() -> None:
    logits = torch.tensor([0.7, 0.2, 0.1]).log().expand(4000, 3)
    generator = torch.Generator().manual_seed(0)
    found = log_likelihoods(logits, "sampled", None, generator).exp()
    assert (found == found.max()).float().mean().item() == pytest.approx(0.7, abs=0.03)


def test_wider_grid_that_measures_worse_gets_the_narrower_one_s_value() -> None:
    row = {4: 0.2, 2: 1.0, 3: 0.1, 8: 0.05}
    assert monotone({WEIGHT: row}) == {WEIGHT: {2: 1.0, 3: 0.1, 4: 0.1, 8: 0.05}}
