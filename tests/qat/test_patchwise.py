"""Patch-wise bits: grids by hand, order of causes, rankings, costs, and a model left as it was."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import qat
from qat import Operand, QuantSpec
from qat.cost.count import cost
from qat.patchwise import (
    ClassAttention,
    Current,
    Inverse,
    PatchBits,
    PatchQuantizer,
    RandomOrder,
    Ranking,
    patchwise,
)
from qat.quantizers import Affine, Phase, quantizers, set_phase
from tests.conftest import make_tiny_vit
from tests.qat.common import assert_same_state, plan, quantized, snapshot, swin


def calibrated(bits: int = 4, **model_args: object) -> tuple[nn.Module, Tensor]:
    """The tiny ViT at some bits, and four images."""
    model, images = make_tiny_vit(**model_args), torch.randn(4, 1, 8, 8)
    qat.convert_(model, plan(bits), Affine)
    qat.calibrate(model, [images])
    return model, images


@pytest.mark.parametrize("signed", [True, False])
def test_each_token_is_quantized_in_the_common_range_at_its_own_width(signed: bool) -> None:
    own = Affine(QuantSpec(4, signed), (2,), Operand.INPUT)
    # Codes -8..7 times 0.5, or 0..15 with the zero at 5: ranges [-4, 3.5] and [-2.5, 5].
    own.set_grid(torch.tensor(0.5), None if signed else torch.tensor(5.0))
    own.phase = Phase.QUANTIZE
    current = Current()
    current.top = torch.tensor([[True, False, False]])
    part = PatchQuantizer(own, PatchBits(2, 2, 0.5), current, 1, 3)
    x = torch.tensor([[[1.1, 9.0], [1.1, 9.0], [-9.0, 1.6]]])
    if signed:  # six bits: step 3.5 / 31, codes to 31; two bits: step 3.5, codes -2..1
        step = 3.5 / 31
        expected = [[round(1.1 / step) * step, 3.5], [0.0, 3.5], [-7.0, 0.0]]
    else:  # six bits: step 7.5 / 63, zero at 21; two bits: step 2.5, zero at 1
        step = 7.5 / 63
        expected = [[round(1.1 / step) * step, 5.0], [0.0, 5.0], [-2.5, 2.5]]
    assert_close(part(x), torch.tensor([expected]), atol=1e-6, rtol=1e-6)


def test_class_token_ranks_patches_by_its_mean_attention_and_is_always_on_top() -> None:
    attention = torch.zeros(1, 2, 5, 5)
    attention[0, :, 0] = torch.tensor([[0.0, 0.1, 0.5, 0.2, 0.2], [0.0, 0.5, 0.3, 0.0, 0.2]])
    bits = PatchBits(
        share=0.6, down=2
    )  # 3 of 5 tokens: the class token, then patches 2 (.8) and 1 (.6)
    assert bits.top(attention, 1).tolist() == [[True, True, True, False, False]]
    inverse = PatchBits(share=0.6, down=2, ranking=Inverse())
    assert inverse.top(attention, 1).tolist() == [[True, False, False, True, True]]


def test_column_mean_ranks_patches_without_a_class_token() -> None:
    attention = torch.zeros(1, 1, 4, 4)
    attention[0, 0, :, 2] = torch.tensor([0.0, 1.0, 1.0, 1.0])
    attention[0, 0, 0, 1] = 1.0  # the first row alone would choose patch 1
    assert PatchBits(share=0.25).top(attention, 0).tolist() == [[False, False, True, False]]


def test_random_order_depends_on_its_seed_and_the_number_of_the_map_alone() -> None:
    attention = torch.zeros(2, 1, 9, 9)
    ranking = RandomOrder()
    assert ranking == RandomOrder() and hash(ranking) == hash(RandomOrder())
    first, again, later, other = (
        PatchBits(ranking=order).top(attention, 1, number)
        for order, number in ((ranking, 0), (ranking, 0), (ranking, 1), (RandomOrder(1), 0))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, later) and not torch.equal(first, other)
    assert first.sum(1).tolist() == [4, 4]


def test_random_orders_of_successive_maps_differ_and_come_again_in_the_next_block() -> None:
    model, images = calibrated()
    bits = PatchBits(ranking=RandomOrder())
    runs = []
    for _ in range(2):
        with patchwise(model, bits), torch.no_grad():
            runs.append([model(images), model(images)])
    assert not torch.equal(*runs[0])
    assert all(map(torch.equal, *runs))


def test_rankings_follow_the_order_of_causes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operand reads the latest map: of its own block behind it, of the one before ahead."""
    model, images = calibrated()
    maps: list[Tensor] = []
    seen: dict[str, int] = {}

    class Counting(Ranking):
        def scores(self, attention: Tensor, num_prefix: int, number: int) -> Tensor:
            assert number == len(maps)
            maps.append(attention)
            return ClassAttention().scores(attention, num_prefix, number)

    with patchwise(model, PatchBits(ranking=Counting())), torch.no_grad():
        for path, part in quantizers(model):
            if isinstance(part, PatchQuantizer):
                part.register_forward_pre_hook(
                    lambda _, __, path=path: seen.__setitem__(path, len(maps))
                )
        model(images)
    first = "attn.qkv.input", "attn.qk.left", "attn.qk.right"
    expected = {"blocks.0.attn.av.right_quantizer": 1}
    for layer in ("attn.proj", "mlp.fc1", "mlp.fc2"):
        expected |= {f"blocks.{i}.{layer}.input_quantizer": i + 1 for i in (0, 1)}
    expected |= {f"blocks.1.{name}_quantizer": 1 for name in first}
    expected |= {"blocks.1.attn.av.right_quantizer": 2}
    assert seen == expected


@pytest.mark.parametrize(
    ("share", "low_bits", "expected"), [(0.75, 4, 0.866), (0.5, 4, 0.735), (0.3, 4, 0.632)]
)
def test_cost_of_eight_and_four_bit_tokens_is_that_of_the_formula(
    share: float, low_bits: int, expected: float
) -> None:
    """DeiT-S, weights at 8 bits, relative to 8/8; hand counts of the notes."""
    bits = PatchBits(up=0, down=8 - low_bits, share=share)
    dim, tokens = 384, 197
    mean = bits.mean(8, tokens, 1)
    linear, product = tokens * 12 * dim * dim, tokens * tokens * dim
    # The notes count the map's columns by patches too; ours keeps the layer's bits.
    found = linear * 8 * mean + 2 * product * mean * mean
    assert found / (64 * (linear + 2 * product)) == pytest.approx(expected, abs=0.002)


def test_cost_of_a_model_counts_mean_bits_within_the_block_only() -> None:
    model, _ = calibrated(4)
    before = cost(model)
    with patchwise(model, PatchBits(1, 1, 0.5)):
        within = cost(model)
    top = 8  # of 17 tokens, the class token among them
    mean = (5 * top + 3 * (17 - top)) / 17
    bits = {site.name: site.bits for site in within.sites}
    assert bits["blocks.0.attn.qkv"] == (4, 4)
    assert bits["blocks.0.attn.qk"] == (4, 4)
    assert bits["blocks.0.attn.av"] == (4, pytest.approx(mean))
    assert bits["blocks.1.attn.qk"] == (pytest.approx(mean), pytest.approx(mean))
    assert bits["blocks.1.mlp.fc2"] == (pytest.approx(mean), 4)
    site = next(s for s in within.sites if s.name == "blocks.1.attn.qk")
    assert site.bops == round(site.macs * mean * mean)
    assert within.bops < before.bops
    assert cost(model) == before


def test_first_block_says_from_where_on_bits_are_spread() -> None:
    model, _ = calibrated()
    with patchwise(model, PatchBits(first_block=1)):
        names = [path for path, q in quantizers(model) if isinstance(q, PatchQuantizer)]
    assert names and all(name.startswith("blocks.1.") for name in names)


def test_model_is_as_it_was_after_the_block_and_differs_within() -> None:
    model, images = calibrated()
    before, logits = snapshot(model), model(images)
    with pytest.raises(KeyboardInterrupt), patchwise(model, PatchBits()):
        assert not torch.equal(model(images), logits)
        raise KeyboardInterrupt
    assert_same_state(snapshot(model), before)
    assert torch.equal(model(images), logits)


def test_batch_or_image_alone_gives_the_same_logits() -> None:
    model, images = calibrated()
    with patchwise(model, PatchBits()), torch.no_grad():
        whole = model(images)
        alone = torch.cat([model(image[None]) for image in images])
    assert_close(whole, alone)


@pytest.mark.parametrize("ranking", [ClassAttention(), RandomOrder(), Inverse()])
def test_model_without_a_class_token_runs(ranking: Ranking) -> None:
    model, images = calibrated(class_token=False, global_pool="avg")
    with patchwise(model, PatchBits(ranking=ranking)):
        assert model(images).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": 0.6}, "must not raise the mean: 60% .* lower the share to 0.500"),
        ({"up": 3, "down": 1}, "lower the share to 0.250"),
        ({"down": 0}, "down of at least 1"),
        ({"share": 1.0}, "share between 0 and 1"),
    ],
)
def test_spread_that_adds_bits_is_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchBits(**arguments)  # type: ignore[arg-type]


def test_what_cannot_be_spread_is_refused(images: Tensor) -> None:
    model = make_tiny_vit()
    qat.convert_(model, plan(4), Affine)
    with pytest.raises(ValueError, match="need a calibrated ViT"), patchwise(model, PatchBits()):
        pass
    windows = swin()
    qat.convert_(windows, plan(4, "layers"), Affine)
    set_phase(windows, Phase.QUANTIZE)
    with pytest.raises(ValueError, match="need a calibrated ViT"), patchwise(windows, PatchBits()):
        pass
    narrow, _ = calibrated(2)
    with (
        pytest.raises(ValueError, match="patches of 3 and 1 bits do not exist"),
        patchwise(narrow, PatchBits()),
    ):
        pass
    model, _ = calibrated()
    with (
        pytest.raises(ValueError, match="no operand of patches from block 2 on"),
        patchwise(model, PatchBits(first_block=2)),
    ):
        pass


def test_trained_scales_are_spread_too(images: Tensor) -> None:
    model = quantized(make_tiny_vit(), images, "lsq")
    before = model(images)
    with patchwise(model, PatchBits()):
        assert not torch.equal(model(images), before)


def test_factories_with_their_own_grids_are_refused(images: Tensor) -> None:
    model = make_tiny_vit()
    per_head = [{"pattern": "blocks.*.attn", "query": {"bits": 4}, "key": {"bits": 4},
                 "attention": {"bits": 4, "signed": False},
                 "value": {"bits": 4, "granularity": "per_channel"}}]  # fmt: skip
    qat.convert_(model, qat.Plan.from_list(per_head), partial(Affine))
    qat.calibrate(model, [images])
    with (
        pytest.raises(ValueError, match="with its own kind of grid"),
        patchwise(model, PatchBits()),
    ):
        pass
