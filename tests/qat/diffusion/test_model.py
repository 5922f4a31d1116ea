"""The DiT: adaLN-zero, patches, conditions, conversion, costs and checkpoints."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import qat
from qat.cost.count import cost
from qat.diffusion import DiT, dit
from qat.diffusion.model import TimeEmbed
from qat.products import QuantProducts
from qat.quantizers import Affine, set_phase
from tests.qat.diffusion.common import ARGUMENTS, converted, inputs, plan, tiny_dit


def test_fresh_blocks_pass_tokens_and_a_fresh_model_predicts_zero() -> None:
    model = dit(**ARGUMENTS)
    tokens, condition = torch.randn(2, 4, 24), torch.randn(2, 24)
    assert torch.equal(model.blocks[0](tokens, condition), tokens)
    assert torch.equal(model(*inputs()), torch.zeros(6, 1, 8, 8))


def test_block_is_modulated_attention_and_modulated_mlp() -> None:
    block = tiny_dit().blocks[0]
    tokens, condition = torch.randn(2, 4, 24), torch.randn(2, 24)
    vectors = block.modulation.linear(torch.nn.functional.silu(condition)).unflatten(1, (6, 24))
    g1, b1, a1, g2, b2, a2 = (v[:, None] for v in vectors.unbind(1))

    def norm(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) / (
            x.var(-1, keepdim=True, correction=0) + 1e-5
        ).sqrt()

    x = tokens + a1 * block.attn(norm(tokens) * (1 + g1) + b1)
    x = x + a2 * block.mlp(norm(x) * (1 + g2) + b2)
    assert_close(block(tokens, condition), x, rtol=1e-5, atol=1e-5)


def test_time_embedding_tells_neighbouring_steps_apart() -> None:
    embed = TimeEmbed(24)
    assert embed.frequencies[0] == 1 and embed.frequencies[-1] == pytest.approx(1e-4)
    found = embed(torch.tensor([0, 1, 999]))
    assert not torch.allclose(found[0], found[1])


def test_patches_return_to_their_places() -> None:
    model = tiny_dit()
    image = torch.arange(64.0).view(1, 1, 8, 8)
    patches = image.unfold(2, 4, 4).unfold(3, 4, 4).reshape(1, 4, 16)
    assert torch.equal(model._image(patches), image)


def test_prediction_depends_on_time_and_class_and_not_on_the_batch() -> None:
    model = tiny_dit()
    x, times, labels = inputs()
    out = model(x, times, labels)
    assert not torch.allclose(model(x, times, (labels + 1) % 5), out)
    assert not torch.allclose(model(x, (times + 100) % 1000, labels), out)
    assert_close(model(x[2:3], times[2:3], labels[2:3]), out[2:3], rtol=1e-4, atol=1e-4)


def test_null_class_is_one_more() -> None:
    assert tiny_dit().label_embed.num_embeddings == 6
    assert tiny_dit(null_class=False).label_embed.num_embeddings == 5


@pytest.mark.parametrize("arguments", [{"patch_size": 3}, {"dim": 25, "num_heads": 5}])
def test_sizes_that_do_not_fit_are_refused(arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must divide img_size 8"):
        DiT(**{**ARGUMENTS, **arguments})


def test_converted_model_in_float_gives_the_same_bits() -> None:
    model = tiny_dit()
    before = model(*inputs())
    assert torch.equal(converted(model)(*inputs()), before)


def test_attention_products_convert_as_in_a_vit() -> None:
    rules = plan().to_list()
    spec = {"bits": 8}
    rules.insert(0, {"pattern": "blocks.*.attn", "query": spec, "key": spec, "value": spec})
    model = tiny_dit()
    qat.convert_(model, qat.Plan.from_list(rules), Affine)
    assert isinstance(model.blocks[0].attn, QuantProducts)
    before = model(*inputs())
    qat.calibrate(model, [inputs(), inputs(seed=1)])
    gap = (model(*inputs()) - before).norm() / before.norm()
    assert 0 < gap < 0.5


def test_costs_of_a_dit_by_hand() -> None:
    """4 tokens of width 24: products of linear layers and attention; condition layers once."""
    found = cost(tiny_dit())
    tokens, dim = 4, 24
    block = tokens * dim * (3 + 1 + 4 + 4) * dim + 2 * tokens * tokens * dim + 6 * dim * dim
    rest = tokens * 16 * dim * 2 + 2 * dim * dim + 2 * dim * dim
    assert found.macs == 2 * block + rest
    assert found.uncounted == ()
    model = tiny_dit()
    assert found.num_parameters == sum(p.numel() for p in model.parameters())
    assert cost(converted(model)).coverage_macs == pytest.approx(
        2 * tokens * dim * 12 * dim / found.macs
    )


def test_checkpoint_rebuilds_the_model(tmp_path: Path) -> None:
    model = converted(tiny_dit())
    qat.calibrate(model, [inputs()])
    qat.save(model, tmp_path / "dit.ckpt")
    loaded = qat.load(tmp_path / "dit.ckpt")
    assert torch.equal(loaded(*inputs()), model(*inputs()))
    set_phase(loaded, qat.Phase.FLOAT)
    assert not torch.equal(loaded(*inputs()), model(*inputs()))
