"""Callables as data: what survives, and what is refused on either side."""

import os
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import pytest
import torch
from jsonargparse import ArgumentParser

from binaryvit import BinaryQuantizers
from binaryvit.asm import DynamicShift
from qat import Granularity, Operand, QuantSpec
from qat.component import build, describe
from qat.quantizers import (
    LSQ,
    MSE,
    Affine,
    Factory,
    Percentile,
    PerOperand,
    QuantizerFactory,
    TwinLog,
)

PLAIN = (dict, list, str, int, float, bool, type(None))


@dataclass(frozen=True)
class Own:
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
    ("value", "kind"),
    [
        (None, int | None),
        (3, int | None),
        ("text", str),
        (2, float),
        ((1, 2), tuple[int, ...]),
        (Operand.KEY, Operand),
        ("gelu", Literal["relu", "gelu"]),
        (LSQ, QuantizerFactory),
        (BinaryQuantizers(), QuantizerFactory),
        (PerOperand(weight=TwinLog), Factory | QuantizerFactory),
        (BinaryQuantizers(shift=DynamicShift, centre=False, wider=Affine), QuantizerFactory),
    ],
    ids=str,
)
def test_described_value_is_plain_and_is_built_again(value: Any, kind: Any) -> None:
    data = describe(value)
    _assert_plain(data)
    assert build(data, kind) == value


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (None, int),
        (True, int),
        (1, bool),
        ("1", float),
        (1.5, int),
        ([1], tuple[int, int]),
        ([1, "b"], tuple[int, ...]),
        ("colour", Operand),
        ("gelu", Literal["relu"]),
        ([], QuantizerFactory),
        ({"class_path": 3}, QuantizerFactory),
        ({"class_path": "qat.quantizers.LSQ", "more": 1}, QuantizerFactory),
    ],
    ids=str,
)
def test_value_of_another_type_than_declared_is_refused(data: Any, kind: Any) -> None:
    with pytest.raises(ValueError, match=r"is no |names '3'"):
        build(data, kind)


@pytest.mark.parametrize(
    "path",
    [
        "qat.quantizers.MinMax",
        "qat.quantizers.Quantizer",
        "qat.quantizers.quantizers",
        "qat.quantizers.base.Codes",
        "qat.convert.convert_",
        "qat.convert.Maker",
        "binaryvit.asm.DynamicShift",
        "binaryvit.grs.GRS",
        "ptq_init.minmax.MinMaxRange",
    ],
)
def test_name_of_another_kind_is_refused_where_a_quantizer_is_wanted(path: str) -> None:
    with pytest.raises(ValueError, match="makes no Quantizer"):
        build({"class_path": path}, QuantizerFactory)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learn_scale": "yes"}, "learn_scale: yes is no bool"),
        ({"learn": True}, "Affine has no argument 'learn'"),
        ({"spec": 4}, "Affine has no argument 'spec'"),
        ({"operand": "weight"}, "Affine has no argument 'operand'"),
        ({"observer": {"class_path": "qat.quantizers.LSQ"}}, "makes no Observer"),
        (
            {"observer": {"class_path": "qat.quantizers.MSE", "init_args": {"smallest": []}}},
            "observer: smallest: .* is no float",
        ),
        ([], "are no arguments by name"),
    ],
)
def test_argument_is_checked_against_the_signature(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build({"class_path": "qat.quantizers.Affine", "init_args": arguments}, QuantizerFactory)


def test_nested_partials_build_an_equal_quantizer() -> None:
    factory = partial(Affine, observer=partial(Percentile, fraction=0.75))
    built = build(describe(factory), QuantizerFactory)(QuantSpec(4, False), (3,), Operand.INPUT)
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


@pytest.mark.parametrize("value", [Granularity.PER_CHANNEL, Operand.WEIGHT, Own()], ids=str)
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


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "subprocess.run",
        "qatx.LSQ",
        "torch.load",
        "torch.nn.GELU",
        "timm.create_model",
        "timm.models._helpers.load_state_dict",
        "qat.cli.main.main",
        "qat.checkpoint.load",
        "qat.models.timm_model",
        "eval",
        "",
        ".",
        "qat.quantizers..LSQ",
        "qat.quantizers./etc.LSQ",
        "qat.quantizers.base.torch",
        "qat.convert.dataclass",
    ],
)
def test_name_outside_the_homes_of_our_kinds_is_refused_with_the_way_out(path: str) -> None:
    with pytest.raises(ValueError, match=r"which is none of the quant.*trust=\('its_pa"):
        build({"class_path": path, "init_args": {}}, QuantizerFactory)


def test_untrusted_module_is_not_even_imported(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_factory.py").write_text("import os\nos.environ['EVIL'] = 'ran'\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="which is none of"):
        build({"class_path": "evil_factory.Anything"}, QuantizerFactory)
    assert "evil_factory" not in sys.modules
    assert "EVIL" not in os.environ


def test_own_package_is_built_when_trusted(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_factory.py").write_text(
        "from qat.quantizers import LSQ\n"
        "class Mine(LSQ): ...\n"
        "def make(spec, shape, operand, wider): return wider(spec, shape, operand)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    trust = ("own_factory",)
    assert issubclass(build({"class_path": "own_factory.Mine"}, QuantizerFactory, trust), LSQ)
    wider = {"wider": {"class_path": "qat.quantizers.Affine"}}
    make = build({"class_path": "own_factory.make", "init_args": wider}, QuantizerFactory, trust)
    assert isinstance(make(QuantSpec(4), (3,), Operand.INPUT), Affine)


@pytest.mark.parametrize("path", ["qat.quantizers.Gone", "qat.quantizers.gone.LSQ"])
def test_name_that_no_longer_exists_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=rf"names '{path}', which does not exist here; install"):
        build({"class_path": path}, QuantizerFactory)
