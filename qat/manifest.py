"""What a checkpoint says of its model beside the tensors: written, sealed, and read with suspicion.

Format 2 has a hash over the manifest, and in there one over the tensors. Files of format 1 have a
hash of the tensors alone and do not state the dtype; they are read with the same checks.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
from torch import Tensor

from qat.archive import digest, require_plain
from qat.card import Card, Start
from qat.component import arguments_of, build, describe, home_of, is_trusted, named
from qat.convert import HANDLERS, Handler
from qat.plan import Plan
from qat.preprocessing import Preprocessing
from qat.quantizers import QuantizerFactory

FORMAT, OLDER = "lowbit-vit/2", "lowbit-vit/1"
DTYPES = ("float32", "float64", "float16", "bfloat16")
RENAMED = {
    "timm.layers.attention.Attention": "qat.products.Pair",
    "qat.convert.quant_attention": "qat.convert.quant_pair",
    "qat.convert.quant_conv2d": "qat.convert.quant_conv",
    "binaryvit.convert.react_attention": "binaryvit.convert.react_pair",
}
"""Names in files that were written when attention had twins of its own."""
WINDOWS = "timm.models.swin_transformer.WindowAttention"


@dataclass(frozen=True)
class Manifest:
    """A manifest whose every field has been checked; what it names has not been looked up yet.

    Attributes:
        recipe: How the float model is built.
        preprocessing: What its images have gone through.
        class_names: Names of its classes.
        start: Random weights that it still has.
        dtype: Type of its floating-point tensors; None in an older file, where the tensors say it.
        conversion: Plan, factory and handlers as plain data; None for a float model.
        prefix: Prefix of the model's keys in the state dictionary.
        tensors: Hash of the tensors.
        sha256: Hash of the manifest, that of the tensors included; in an older file of the latter.
        versions: Versions that wrote it.
        content: All of it as it stands in the file.
    """

    recipe: dict[str, Any]
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None
    start: Start | None
    dtype: torch.dtype | None
    conversion: dict[str, Any] | None
    prefix: str
    tensors: str
    sha256: str
    versions: dict[str, Any]
    content: dict[str, Any]

    @staticmethod
    def of(content: Any) -> "Manifest":
        """Check a manifest.

        Raises:
            ValueError: Naming the field that is missing or wrong.
        """
        require_plain(content)
        preprocessing, start = _field(content, "preprocessing", dict), content.get("start")
        dtype = content.get("dtype")
        if dtype not in (*DTYPES, None) or (dtype is None and content["format"] == FORMAT):
            raise ValueError(f"field 'dtype' must be one of {', '.join(DTYPES)}, got {dtype!r:.80}")
        conversion = content.get("conversion")
        if conversion is not None:
            for key, kind in (("plan", list), ("make_quantizer", dict), ("handlers", dict)):
                _field(_field(content, "conversion", dict), key, kind)
        return Manifest(
            _field(content, "model", dict),
            Preprocessing(**_all_of(Preprocessing, preprocessing)),
            build(content.get("class_names"), tuple[str, ...] | None),
            None if start is None else Start(**_all_of(Start, start)),
            None if dtype is None else getattr(torch, dtype),
            conversion,
            _field(content, "prefix", str),
            _field(content, "sha256" if content["format"] == OLDER else "tensors", str),
            _field(content, "sha256", str),
            _field(content, "versions", dict),
            content,
        )

    @staticmethod
    def of_card(card: Any) -> "Manifest":
        """Check what an exported file says of its model, which has no hash of its own.

        Raises:
            ValueError: Naming the field that is missing or wrong.
        """
        return Manifest.of({"format": OLDER, "prefix": "", "sha256": "", **card})

    def require_sealed(self, state: Mapping[str, Any]) -> None:
        """Refuse tensors, or a manifest, that are not those that were written.

        Raises:
            ValueError: If so.
        """
        if self.content["format"] == FORMAT and self.sha256 != _hash(self.content):
            raise ValueError("it is damaged: its manifest does not match its hash")
        if self.tensors != digest(state):
            raise ValueError("it is damaged: its tensors do not match their hash")

    def converting(self, trust: tuple[str, ...]) -> tuple[Plan, QuantizerFactory, Any]:
        """Plan, factory and handlers, looked up.

        Raises:
            ValueError: If one is of no kind that a file may name.
        """
        assert self.conversion is not None
        return (
            Plan.from_list(self.conversion["plan"]),
            build(self.conversion["make_quantizer"], QuantizerFactory, trust),
            dict(_handlers(_renamed(self.conversion["handlers"]), trust)),
        )


def written(card: Card, state: Mapping[str, Any], prefix: str, **more: Any) -> dict[str, Any]:
    """The manifest of a model and its tensors, sealed.

    Args:
        card: The model's card, with a recipe and preprocessing.
        state: The model's own tensors.
        prefix: What stands before their names in the file.
        more: Further fields.

    Raises:
        ValueError: If the recipe is no plain data, or a factory or handler cannot be named.
    """
    assert card.recipe is not None and card.preprocessing is not None
    for key, value in card.recipe.items():
        try:
            require_plain(value)
        except ValueError:
            raise ValueError(
                f"the model was built with {key} {value!r:.160}, which is no plain data, so a "
                "checkpoint cannot hold it; use numbers, strings, lists and mappings"
            ) from None
    conversion = card.conversion and {
        "plan": card.conversion.plan.to_list(),
        "make_quantizer": describe(card.conversion.make_quantizer),
        "handlers": describe(card.conversion.handlers),
    }
    content = {
        "format": FORMAT,
        "model": dict(card.recipe),
        "preprocessing": card.preprocessing.to_dict(),
        "start": card.start and asdict(card.start),
        "class_names": card.class_names and list(card.class_names),
        "dtype": str(card.dtype).removeprefix("torch."),
        "conversion": conversion,
        "prefix": prefix,
        "versions": {"torch": str(torch.__version__), "timm": timm.__version__},
        **more,
    }
    return sealed(content, state)


def sealed(content: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with the hash of the tensors, and over both its own."""
    whole = {**content, "tensors": digest(state)}
    return {**whole, "sha256": _hash(whole)}


def _hash(content: Mapping[str, Any]) -> str:
    open_ = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(open_, sort_keys=True).encode()).hexdigest()


def selected(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The part of a state dictionary below a prefix, under its own names."""
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def floating_dtype(state: Mapping[str, Any]) -> torch.dtype:
    """Type of the first floating-point tensor."""
    floating = (v.dtype for v in state.values() if isinstance(v, Tensor) and v.is_floating_point())
    return next(floating, torch.float32)


def _field(content: Any, key: str, kind: type) -> Any:
    value = content.get(key) if isinstance(content, dict) else None
    if not isinstance(value, kind):
        raise ValueError(f"field '{key}' is {value!r:.80}, expected a {kind.__name__}")
    return value


def _all_of(kind: type, data: Any) -> dict[str, Any]:
    """Every field of a dataclass, each of its type."""
    found = arguments_of(kind, data)
    if missing := kind.__annotations__.keys() - found:
        raise ValueError(f"{kind.__name__} lacks {', '.join(sorted(missing))}")
    return found


def _renamed(handlers: Any) -> Any:
    """Handlers of a file under the names of today; those of windows have gone into the others."""
    kept = [pair for pair in _field(handlers, "items", list) if WINDOWS not in str(pair)]
    return [_todays(pair) for pair in kept]


def _todays(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _todays(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_todays(item) for item in data]
    return RENAMED.get(data, data) if isinstance(data, str) else data


def _handlers(items: list[Any], trust: tuple[str, ...]) -> Iterator[tuple[type, Handler]]:
    """What our tables, or with trust the caller's packages, have under the names in a file."""
    for item in items:
        kind, handler = item if isinstance(item, list) and len(item) == 2 else ({}, {})
        stated = _field(handler, "init_args", dict)
        function = _field(_field(stated, "build", dict), "class_path", str)
        tables = [HANDLERS, *_tables_beside(function, trust)]
        functions = {describe(h.build)["class_path"]: h.build for t in tables for h in t.values()}
        kinds = {describe(key)["class_path"]: key for table in tables for key in table}
        key = _known(kinds, _field(kind, "class_path", str), trust)
        operands = build(stated.get("operands"), tuple[str, ...])
        yield key, Handler(_known(functions, function, trust), operands)


def _known(table: Mapping[str, Any], path: str, trust: tuple[str, ...]) -> Any:
    if path not in table and not is_trusted(path, trust):
        raise ValueError(
            f"the checkpoint names '{path:.80}', which is in no table of handlers; if it is yours, "
            "load with trust=('its_package',)"
        )
    return table[path] if path in table else named(path, trust)


def _tables_beside(function: str, trust: tuple[str, ...]) -> Iterator[Mapping[type, Handler]]:
    """The tables of handlers in the module of a function."""
    for table in vars(home_of(function, trust)).values():
        if isinstance(table, Mapping) and all(isinstance(h, Handler) for h in table.values()):
            yield table
