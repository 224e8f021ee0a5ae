"""Quantization of ONNX graphs to 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from dact.files import replacing

LEVELS = 127  # levels of a weight on either side of zero
# Level that stands for zero among the 256 unsigned levels of an activation; it is lower for the
# output of GELU.
ZERO, ZERO_OF_GELU = 128, 32
LEAST_GELU = -0.17  # GELU never falls below it
# rows this many times as large as the median row of a matrix would spoil the scales of the others
OUTLIER = 8.0


def quantize(path: Path) -> None:
    """Replace a graph with one that multiplies 8-bit integers.

    Weights have a scale per output channel. The inputs of a matrix have one per token, computed at
    run time: some tokens, such as BERT's first, hold values ten times as large as all others (Sun
    et al. 2024, arXiv 2402.17762). One scale for all tokens, as in ONNX Runtime's dynamic
    quantization, would leave the others few levels. Such values come from single rows of a matrix
    with large weights, and these rows stay in float32. Embeddings are looked up in 16 bits, which
    is as fast as 8 bits and more accurate."""
    model = onnx.load(path)
    rewriting = _Rewriting(model.graph)
    rewriting.run()
    if not any(entry.domain == "com.microsoft" for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with replacing(path) as partial:
        onnx.save(model, partial)


class _Rewriting:
    """A graph whose nodes are replaced one by one."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.constants = {entry.name: numpy_helper.to_array(entry) for entry in graph.initializer}
        self.nodes: list[Any] = []
        self.makers = {name: node for node in graph.node for name in node.output}
        # By tensor: its values in 8 bits, their scales and their zero.
        self.inputs: dict[str, tuple[str, str, str]] = {}

    def run(self) -> None:
        for node in self.graph.node:
            if (
                node.op_type == "MatMul"
                and self._is_matrix(node.input[1])
                and node.input[0] not in self.constants
            ):
                self._multiply(node.input[0], node.input[1], node.output[0])
            elif node.op_type == "Gather" and self._is_matrix(node.input[0]) and not _axis(node):
                self._look_up(node.input[0], node.input[1], node.output[0])
            else:
                self.nodes.append(node)
        used = {name for node in self.nodes for name in node.input}
        del self.graph.node[:], self.graph.initializer[:]
        self.graph.node.extend(self.nodes)
        self.graph.initializer.extend(
            numpy_helper.from_array(value, name)
            for name, value in self.constants.items()
            if name in used
        )

    def _is_matrix(self, name: str) -> bool:
        constant = self.constants.get(name)
        return constant is not None and constant.ndim == 2 and constant.dtype == np.float32

    def _multiply(self, x: str, matrix: str, output: str) -> None:
        """Write ``x @ matrix`` as a product of integers, scaled by channel and by token."""
        weights = self.constants[matrix]
        rows = np.abs(weights).max(axis=1)
        outliers = np.flatnonzero(rows > OUTLIER * np.median(rows))
        part = x
        if len(outliers):
            kept = np.ones(len(rows), np.float32)
            kept[outliers] = 0
            part = self._node("Mul", x, self._constant(f"{matrix}.kept", kept))
            few = self._node("Gather", x, self._constant(f"{matrix}.outliers", outliers), axis=-1)
            rest = self._node("MatMul", few, self._constant(f"{matrix}.rows", weights[outliers]))
            weights = weights * kept[:, None]
        scales = np.abs(weights).max(axis=0) / LEVELS
        values = np.round(weights / np.where(scales == 0, 1, scales)).astype(np.int8)
        if part not in self.inputs:
            self.inputs[part] = self._by_token(part, len(rows), self._is_gelu(x))
        tokens, token_scales, zero = self.inputs[part]
        product = self._node(
            "MatMulIntegerToFloat",
            tokens,
            self._constant(f"{matrix}.int8", values),
            self._constant("dact.one", np.float32(1)),
            self._constant(f"{matrix}.scales", scales),
            zero,
            domain="com.microsoft",
        )
        if len(outliers):
            product = self._node("Mul", product, token_scales)
            self._node("Add", product, rest, output=output)
        else:
            self._node("Mul", product, token_scales, output=output)

    def _is_gelu(self, x: str) -> bool:
        """Return whether ``x`` is GELU as PyTorch exports it, ``u (erf(u / √2) + 1) 0.5``, with no
        gate on top."""
        maker = self.makers.get(x)
        halved = maker is not None and any(self._ends_in(name, "Constant") for name in maker.input)
        return halved and self._ends_in(x, "Mul", "Mul", "Add", "Erf")

    def _ends_in(self, x: str, kind: str, *before: str) -> bool:
        """Return whether a node of this kind makes ``x``, preceded by nodes of the kinds
        `before`."""
        maker = self.makers.get(x)
        if maker is None or maker.op_type != kind:
            return False
        return not before or any(self._ends_in(name, *before) for name in maker.input)

    def _by_token(self, x: str, width: int, gelu: bool) -> tuple[str, str, str]:
        """Return ``x`` in 8 bits, ``[..., width]``, its scales, ``[..., 1]``, and its zero."""
        level = ZERO_OF_GELU if gelu else ZERO
        largest = self._node(
            "ReduceMax", x if gelu else self._node("Abs", x), axes=[-1], keepdims=1
        )
        scales = self._node(
            "Mul", largest, self._constant(f"dact.share_{level}", np.float32(1 / (255 - level)))
        )
        if gelu:
            least = self._constant("dact.least_gelu", np.float32(-LEAST_GELU / level))
            scales = self._node("Max", scales, least)
        flat_scales = self._node("Reshape", scales, self._constant("dact.flat", np.array([-1])))
        zero = self._constant(f"dact.zero_{level}", np.uint8(level))
        zeros = self._node("Expand", zero, self._node("Shape", flat_scales))
        # Scales are per token, so all axes but the last are flattened into one.
        flat = self._node("Reshape", x, self._constant(f"dact.rows_{width}", np.array([-1, width])))
        tokens = self._node("QuantizeLinear", flat, flat_scales, zeros, axis=0)
        return self._node("Reshape", tokens, self._node("Shape", x)), scales, zero

    def _look_up(self, table: str, rows: str, output: str) -> None:
        """Write a look-up in a 16-bit table, with a 32-bit result."""
        half = self._constant(f"{table}.half", self.constants[table].astype(np.float16))
        self._node("Cast", self._node("Gather", half, rows), to=1, output=output)

    def _constant(self, name: str, value: Any) -> str:
        self.constants[name] = np.asarray(value)
        return name

    def _node(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        output = output or f"dact.{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output


def _axis(node: Any) -> int:
    return next((int(entry.i) for entry in node.attribute if entry.name == "axis"), 0)
