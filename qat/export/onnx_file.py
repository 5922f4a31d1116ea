"""An ONNX file of ours, read: its answers, its grids one by one, and what it says of itself."""

import json
from collections.abc import Mapping
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from qat.export.onnx import FORMAT
from qat.export.runtimes import Engine, Run, onnx_runtime
from qat.extras import imported
from qat.runtime.grids import See, unseen


def is_onnx(path: str | Path) -> bool:
    """Whether a file is called an ONNX file."""
    return Path(path).suffix == ".onnx"


class OnnxModel:
    """An ONNX file that `export_onnx` wrote.

    Args:
        path: The file.
        engine: What runs it.

    Attributes:
        texts: What the file says beside its graph, by key.
        grids: Its grids, weights among them, by the names of their quantizers.
        inputs: Names of what it takes.

    Raises:
        ValueError: If it is missing, or none of ours, or packages are missing.
    """

    def __init__(self, path: str | Path, engine: Engine = onnx_runtime) -> None:
        onnx = imported("onnx", "export", "read ONNX files")
        if not Path(path).is_file():
            raise ValueError(f"no ONNX file '{path}'; `train.py export --format onnx` writes one")
        try:
            self.proto = onnx.load(path)
            kept = {one.key: one.value for one in self.proto.metadata_props}
            self.texts = {
                key.removeprefix("lowbit."): json.loads(value)
                for key, value in kept.items()
                if key.startswith("lowbit.")
            }
        except Exception as error:  # a damaged file can fail in any way while it is parsed
            line = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"'{path}' is damaged, or no ONNX file ({line:.160})") from None
        if self.texts.get("format") != FORMAT:
            raise ValueError(
                f"'{path}' is no {FORMAT} file, so that it does not say what images it takes; "
                "write one with `train.py export --format onnx`"
            )
        self.engine = engine
        try:
            grids = self.texts["grids"].items()
            self.grids = {str(name): OnnxGrid(self, **ends) for name, ends in grids}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"'{path}' is damaged: its grids are no grids ({error!s:.160})"
            ) from None
        self.inputs = [value.name for value in self.proto.graph.input]

    @property
    def content(self) -> bytes:
        """The file."""
        return self.proto.SerializeToString()

    @cached_property
    def run(self) -> Run:
        """The model as it is."""
        return self.engine(self.content)

    def __call__(self, *inputs: np.ndarray, see: See = unseen) -> np.ndarray:
        """Answers to a batch.

        Args:
            inputs: Images, and what else the model takes.
            see: Is shown the input of every grid, by the grid's name.
        """
        given = dict(zip(self.inputs, inputs, strict=True))
        if see is not unseen:
            shown = self._showing(given)
            for name, value in self._inputs_of_grids.items():
                see(name, given[value] if value in given else shown[value])
        return self.run(given)[0]

    @cached_property
    def types(self) -> dict[str, Any]:
        """Types and shapes of values, by name."""
        graph = self.proto.graph
        return {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}

    @property
    def _inputs_of_grids(self) -> dict[str, str]:
        return {name: grid.input for name, grid in self.grids.items() if grid.input is not None}

    @cached_property
    def _shows(self) -> tuple[Run, list[str]]:
        """The model with the inputs of all grids as further outputs, and their names."""
        onnx = import_module("onnx")
        proto, names = onnx.ModelProto(), dict.fromkeys(self._inputs_of_grids.values())
        proto.CopyFrom(self.proto)
        outputs = [value.name for value in proto.graph.output]
        wanted = [name for name in names if name not in (*self.inputs, *outputs)]
        proto.graph.output.extend(self.types[name] for name in wanted)
        return self.engine(proto.SerializeToString()), outputs + wanted

    def _showing(self, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        run, names = self._shows
        return dict(zip(names, run(given), strict=True))


class OnnxGrid:
    """The nodes of one grid.

    Args:
        model: The model.
        output: Name of its values.
        input: Name of what it is given; None for a weight.
    """

    def __init__(self, model: OnnxModel, output: str, input: str | None = None) -> None:
        self.model, self.input, self.output = model, input, output

    @cached_property
    def run(self) -> Run:
        """The nodes alone."""
        helper = import_module("onnx").helper
        graph = self.model.proto.graph
        makers = {name: node for node in graph.node for name in node.output}
        nodes, wanted, seen = [], [self.output], {self.input}
        while wanted:
            name = wanted.pop()
            if name not in seen and name in makers:
                nodes.append(makers[name])
                wanted += makers[name].input
            seen.add(name)
        order = {id(node): place for place, node in enumerate(graph.node)}
        nodes = sorted({id(node): node for node in nodes}.values(), key=lambda n: order[id(n)])
        types = self.model.types
        inputs = [] if self.input is None else [types[self.input]]
        kept = [each for each in graph.initializer if each.name in seen]
        made = helper.make_graph(nodes, "grid", inputs, [types[self.output]], kept)
        proto = helper.make_model(
            made,
            opset_imports=self.model.proto.opset_import,
            ir_version=self.model.proto.ir_version,
        )
        return self.model.engine(proto.SerializeToString())

    def values(self, x: np.ndarray) -> np.ndarray:
        """What the grid makes of values; of a weight, its values in the place of any."""
        if self.input is not None:
            return self.run({self.input: x})[0]
        weight = self.run({})[0]
        return weight.T if weight.ndim == 2 else weight
