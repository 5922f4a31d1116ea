"""Callables as data: what survives, and what is refused on either side."""

import os
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from timm.layers.mlp import Mlp
from torch import nn

from binaryvit import BinaryQuantizers
from binaryvit.asm import DynamicShift
from binaryvit.convert import REACT_HANDLERS
from qat import Granularity, Operand, QuantSpec
from qat.component import build, describe
from qat.convert import HANDLERS, convert_
from qat.quantizers import LSQ, MSE, Affine, Percentile, QuantizerFactory

PLAIN = (dict, list, str, int, float, bool, type(None))


@dataclass(frozen=True)
class PerOperand:
    """A factory of our own, with an enumeration among its arguments."""

    coarse: Operand = Operand.WEIGHT

    def __call__(self, spec: QuantSpec, shape: tuple[int, ...], operand: Operand) -> LSQ:
        return LSQ(spec, shape, operand)


class NotADataclass:
    """A factory that does not say its arguments."""

    def __call__(self, spec: QuantSpec, shape: tuple[int, ...], operand: Operand) -> LSQ:
        return LSQ(spec, shape, operand)

    def method(self) -> None:
        """A bound method is no name either."""


def _assert_plain(data: Any) -> None:
    assert type(data) in PLAIN, f"{data!r} is a {type(data)}"
    if isinstance(data, dict | list):
        for item in data.values() if isinstance(data, dict) else data:
            _assert_plain(item)


@pytest.mark.parametrize(
    "value",
    [
        None,
        3,
        "text",
        LSQ,
        convert_,
        BinaryQuantizers(),
        BinaryQuantizers(shift=DynamicShift, centre=False, wider=Affine),
        HANDLERS,
        REACT_HANDLERS,
        {nn.Linear: nn.GELU, Mlp: Mlp},
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_described_value_is_plain_and_is_built_again(value: Any) -> None:
    data = describe(value)
    _assert_plain(data)
    assert build(data) == value


def test_nested_partials_build_an_equal_quantizer() -> None:
    factory = partial(Affine, observer=partial(Percentile, fraction=0.75))
    built = build(describe(factory))(QuantSpec(4, False), (3,), Operand.INPUT)
    assert isinstance(built, Affine)
    assert isinstance(built.observer, Percentile)
    assert built.observer.fraction == 0.75
    assert built.operand is Operand.INPUT


def test_partial_that_jsonargparse_makes_of_a_recipe_is_stored_as_its_class() -> None:
    parser = ArgumentParser()
    parser.add_argument("--quantizer", type=QuantizerFactory)
    observer = {"class_path": "qat.quantizers.Percentile", "init_args": {"fraction": 0.75}}
    item = {"class_path": "qat.quantizers.Affine", "init_args": {"observer": observer}}
    config = parser.parse_object({"quantizer": item})
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    observer = partial(Percentile, fraction=0.75)
    expected = partial(Affine, observer=observer, learn_scale=False)
    assert describe(instantiate(config).quantizer) == describe(expected)


@pytest.mark.parametrize("value", [Granularity.PER_CHANNEL, Operand.WEIGHT, PerOperand()], ids=str)
def test_enumeration_is_stored_as_plain_data(value: Any) -> None:
    _assert_plain(describe(value))


@pytest.mark.parametrize(
    "value",
    [
        lambda spec, shape, operand: LSQ(spec, shape, operand),
        NotADataclass(),
        NotADataclass().method,
        partial(lambda spec: None, bits=3),
        BinaryQuantizers(wider=lambda spec, shape, operand: LSQ(spec, shape, operand)),
        torch.zeros(2),
    ],
    ids=["lambda", "instance", "method", "partial-of-lambda", "dataclass-of-lambda", "tensor"],
)
def test_value_without_a_name_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"cannot store .*use a class, a module-level function"):
        describe(value)


def test_partial_with_positional_arguments_is_refused() -> None:
    with pytest.raises(ValueError, match="give a partial's arguments by keyword"):
        describe(partial(MSE, QuantSpec(4)))


@pytest.mark.parametrize("path", ["os.system", "subprocess.run", "qatx.LSQ", "torch.load", "eval"])
def test_name_outside_the_trusted_packages_is_refused_with_the_way_out(path: str) -> None:
    with pytest.raises(ValueError, match=rf"names '{path}', outside the trusted.*trust=\('its_pa"):
        build({"class_path": path, "init_args": {}})


@pytest.mark.parametrize("path", ["qat.checkpoint.os", "qat.component.partial", "qat.models.timm"])
def test_foreign_name_that_a_trusted_module_imports_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="outside the trusted packages"):
        build({"class_path": path})


def test_untrusted_module_is_not_even_imported(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_factory.py").write_text("import os\nos.environ['EVIL'] = 'ran'\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="outside the trusted packages"):
        build({"class_path": "evil_factory.Anything"})
    assert "evil_factory" not in sys.modules
    assert "EVIL" not in os.environ


def test_own_package_is_built_when_trusted(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_factory.py").write_text(
        "from qat.quantizers import LSQ\nclass Mine(LSQ): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    built = build({"class_path": "own_factory.Mine"}, trust=("own_factory",))
    assert issubclass(built, LSQ)


@pytest.mark.parametrize("path", ["qat.quantizers.Gone", "qat.gone.LSQ"])
def test_name_that_no_longer_exists_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=rf"names '{path}', which does not exist here; install"):
        build({"class_path": path})
