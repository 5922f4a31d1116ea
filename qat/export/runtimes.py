"""Runtimes of ONNX files: ONNX Runtime and OpenVINO."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import numpy as np

from qat.extras import imported

Run = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]
"""From inputs by name to outputs in order."""
Engine = Callable[[bytes], Run]
SETTINGS = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
"""Of OpenVINO: it would compute floating-point numbers in fewer bits, and quantize more of them."""


def onnx_runtime(content: bytes) -> Run:
    """A file in ONNX Runtime, on the processor.

    Raises:
        ValueError: If ONNX Runtime is missing, or does not take the file.
    """
    session = session_of(content)
    return lambda inputs: session.run(None, dict(inputs))


def session_of(content: bytes, **options: Any) -> Any:
    """A session of ONNX Runtime.

    Args:
        content: The file.
        options: Attributes of its session options.
    """
    runtime = imported("onnxruntime", "export", "run ONNX files")
    settings = runtime.SessionOptions()
    settings.log_severity_level = 3
    for name, value in options.items():
        setattr(settings, name, value)
    try:
        return runtime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # a family of classes of its own, none of which it names
        raise ValueError(f"ONNX Runtime refuses the file ({error!s:.200})") from None


def openvino(content: bytes) -> Run:
    """A file in OpenVINO, on the processor, in its most exact mode."""
    compiled = compiled_of(content)
    return lambda inputs: list(compiled(dict(inputs)).values())


def compiled_of(content: bytes) -> Any:
    """A model compiled by OpenVINO, which computes floating-point numbers in 32 bits."""
    core = import_module("openvino").Core()
    return core.compile_model(core.read_model(content), "CPU", SETTINGS)


def has_openvino() -> bool:
    """Whether OpenVINO is installed."""
    try:
        import_module("openvino")
    except ImportError:
        return False
    return True
