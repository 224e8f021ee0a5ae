"""Graphs that compute in 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from dact.files import replacing

CENTRE, LEVELS = 128, 127  # activations are unsigned, which the kernels want, and symmetric around the centre


def quantize(path: Path) -> None:
    """Replace a graph by one that multiplies integers of 8 bits.

    Weights have a scale per output channel. The inputs of a matrix have one per token, computed as they come: some
    tokens, such as BERT's first, hold values ten times as large as all others (Sun et al. 2024, arXiv 2402.17762),
    and one scale for all tokens, as in ONNX Runtime's own dynamic quantisation, would leave the others few levels.
    Embeddings are looked up in 16 bits, which is as fast as 8 and more accurate.
    """
    import onnx

    model = onnx.load(path)
    rewriting = _Rewriting(model.graph)
    rewriting.run()
    if not any(entry.domain == "com.microsoft" for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    with replacing(path) as partial:
        onnx.save(model, partial)


class _Rewriting:
    """A graph whose nodes are replaced one by one."""

    def __init__(self, graph: Any) -> None:
        from onnx import numpy_helper

        self.graph = graph
        self.constants = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
        self.nodes: list[Any] = []
        self.inputs: dict[str, tuple[str, str]] = {}  # of a matrix: its values in 8 bits, and their scales

    def run(self) -> None:
        from onnx import numpy_helper

        for node in self.graph.node:
            if node.op_type == "MatMul" and self._is_matrix(node.input[1]) and node.input[0] not in self.constants:
                self._multiply(*node.input, node.output[0])
            elif node.op_type == "Gather" and self._is_matrix(node.input[0]) and not _axis(node):
                self._look_up(*node.input, node.output[0])
            else:
                self.nodes.append(node)
        used = {name for node in self.nodes for name in node.input}
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend(
            numpy_helper.from_array(value, name) for name, value in self.constants.items() if name in used
        )

    def _is_matrix(self, name: str) -> bool:
        constant = self.constants.get(name)
        return constant is not None and constant.ndim == 2 and constant.dtype == np.float32

    def _multiply(self, x: str, matrix: str, output: str) -> None:
        """Write ``x @ matrix`` as a product of integers, scaled by channel and by token."""
        values, scales = self._quantized(matrix)
        if x not in self.inputs:
            self.inputs[x] = self._by_token(x, len(self.constants[matrix]))
        tokens, token_scales = self.inputs[x]
        one, centre = self._constant("dact.one", np.float32(1)), self._constant("dact.centre", np.uint8(CENTRE))
        product = self._node("MatMulIntegerToFloat", tokens, values, one, scales, centre, domain="com.microsoft")
        self._node("Mul", product, token_scales, output=output)

    def _by_token(self, x: str, width: int) -> tuple[str, str]:
        """Return ``x`` in 8 bits, ``[..., width]``, and its scales, ``[..., 1]``."""
        level = self._constant("dact.level", np.float32(1 / LEVELS))
        largest = self._node("ReduceMax", self._node("Abs", x), axes=[-1], keepdims=1)
        scales = self._node("Mul", largest, level)
        flat_scales = self._node("Reshape", scales, self._constant("dact.flat", np.array([-1])))
        centre = self._constant("dact.centre", np.uint8(CENTRE))
        centres = self._node("Expand", centre, self._node("Shape", flat_scales))
        # Scales along an axis that is no longer one token's only once all others are flattened into it.
        flat = self._node("Reshape", x, self._constant(f"dact.rows_{width}", np.array([-1, width])))
        tokens = self._node("QuantizeLinear", flat, flat_scales, centres, axis=0)
        return self._node("Reshape", tokens, self._node("Shape", x)), scales

    def _look_up(self, table: str, rows: str, output: str) -> None:
        """Write the rows of a table of 16 bits as numbers of 32."""
        half = self._constant(f"{table}.half", self.constants[table].astype(np.float16))
        self._node("Cast", self._node("Gather", half, rows), to=1, output=output)

    def _quantized(self, matrix: str) -> tuple[str, str]:
        """Add the integers of a matrix and the scales of its columns; return their names."""
        weights = self.constants[matrix]
        scales = np.abs(weights).max(axis=0) / LEVELS
        values = np.round(weights / np.where(scales == 0, 1, scales)).astype(np.int8)
        return self._constant(f"{matrix}.int8", values), self._constant(f"{matrix}.scales", scales)

    def _constant(self, name: str, value: Any) -> str:
        self.constants[name] = np.asarray(value)
        return name

    def _node(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        from onnx import helper

        output = output or f"dact.{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output


def _axis(node: Any) -> int:
    return next((int(entry.i) for entry in node.attribute if entry.name == "axis"), 0)
