"""The core: specs, quantizers, plans, conversion, calibration and checkpoints.

`import qat` imports nothing else; a public name brings its module when it is first used.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qat.calibrate import Initialiser, calibrate, observing
    from qat.card import Card, card_of
    from qat.checkpoint import load, save
    from qat.convert import convert_
    from qat.fidelity import adopt
    from qat.models import timm_model
    from qat.plan import Plan, Rule
    from qat.preprocessing import Preprocessing
    from qat.quantizers import Phase, Quantizer, set_phase
    from qat.spec import Granularity, Operand, QuantSpec

__all__ = [
    "Card",
    "Granularity",
    "Initialiser",
    "Operand",
    "Phase",
    "Plan",
    "Preprocessing",
    "QuantSpec",
    "Quantizer",
    "Rule",
    "__version__",
    "adopt",
    "calibrate",
    "card_of",
    "convert_",
    "load",
    "observing",
    "save",
    "set_phase",
    "timm_model",
]

__version__ = "0.1.0"

_PUBLIC = {
    "calibrate": ("Initialiser", "calibrate", "observing"),
    "card": ("Card", "card_of"),
    "checkpoint": ("load", "save"),
    "convert": ("convert_",),
    "fidelity": ("adopt",),
    "models": ("timm_model",),
    "plan": ("Plan", "Rule"),
    "preprocessing": ("Preprocessing",),
    "quantizers": ("Phase", "Quantizer", "set_phase"),
    "spec": ("Granularity", "Operand", "QuantSpec"),
}
_HOMES = {name: module for module, names in _PUBLIC.items() for name in names}


class _Package(ModuleType):
    """This package; it finds its public names when they are used."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module '{self.__name__}' has no attribute '{name}'")
        value = getattr(import_module(f"{self.__name__}.{_HOMES[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        # The import of a submodule binds its name; `calibrate` is to remain the function.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
