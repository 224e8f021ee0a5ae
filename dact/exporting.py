"""Export: a fitted model whose encoder runs on ONNX Runtime instead of PyTorch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dact.checks import check_choice
from dact.data.tokenizers import load_tokenizer
from dact.encoders.base import LayeredEncoder
from dact.encoders.onnx import EMBED, POOL, OnnxEncoder, described
from dact.encoders.quantization import quantize as quantize_graph
from dact.files import file_digest, replacing_folder
from dact.hub import local_folder
from dact.model import DACT

Quantization = Literal["int8"]
OPSET = 17  # the first with an operator for layer normalization
# Largest allowed difference of a graph from PyTorch, as a share of the largest value.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Export:
    """What `export` wrote.

    Args:
        folder: The folder.
        megabytes: Size of the graphs on disk, in millions of bytes.
        difference: Largest difference of a float32 graph from PyTorch, as a share of its largest
            value.
        quantized_difference: The same after quantization, root mean square over root mean square;
            None for float32.
        promise_dropped: Whether the model had a promise, which was dropped.
        replaced: Whether the folder held an earlier export.
    """

    folder: Path
    megabytes: float
    difference: float
    quantized_difference: float | None
    promise_dropped: bool
    replaced: bool

    def __str__(self) -> str:
        checked = f"within {self.difference:.0e} of PyTorch"
        if self.quantized_difference is not None:
            states = f"each state within {self.quantized_difference:.1%} of PyTorch's"
            checked = f"int8, {states} (before int8: {checked})"
        text = f"{self.folder}: {self.megabytes:.1f} MB of graphs, {checked}"
        if self.replaced:
            text += "\nAn earlier export in this folder was replaced."
        if self.promise_dropped:
            text += "\nThe halting rule stays. The promise was dropped (dact calibrate renews it)."
        return text


def export(
    model_dir: str | Path, output: str | Path, quantize: Quantization | None = None
) -> Export:
    """Write a model folder whose encoder runs on ONNX Runtime, and return what was written.

    The embedding, each layer and the pooling become graphs of any batch size and length, each
    compared with PyTorch before the folder appears. The halting rule stays. A promise is dropped,
    since answers differ a little: `dact.calibrate` renews it.

    Args:
        model_dir: Folder of a run, its model/ folder, or Hub id ``"OWNER/NAME"``.
        output: Folder to write. An earlier export there is replaced.
        quantize: ``"int8"`` for 8-bit weights and activations that are quantized at run time;
            float32 if left out. On processors without VNNI instructions, int8 loses some accuracy.

    Raises:
        ImportError: If ONNX Runtime or onnx is not installed.
        FileNotFoundError: If there is no model in `model_dir`.
        ValueError: If `quantize` is unknown, `output` holds something else, the encoder is not one
            of dact's, the model was exported already, or a graph differs from PyTorch.
    """
    if quantize is not None:
        check_choice("export: quantize", quantize, Quantization)
    model_dir, output = local_folder(model_dir), Path(output).expanduser().absolute()
    replaced = (output / EMBED).is_file()
    if output.exists() and not replaced and (output.is_file() or any(output.iterdir())):
        raise ValueError(
            f"export: {output} exists and was not written by dact export: give another folder"
        )
    model = DACT.from_pretrained(model_dir)
    encoder = model.encoder
    if isinstance(encoder, OnnxEncoder):
        raise ValueError(f"export: {model_dir} was exported already: give the folder of the fit")
    had_promise = model.calibration is not None
    model.calibration = None
    quantized_difference = None
    with replacing_folder(output) as folder, torch.no_grad():
        layers = _write_graphs(encoder, model.num_layers, folder)
        exported = OnnxEncoder(folder, layers=layers, **described(encoder))
        difference = _largest(
            (got - expected).abs().max() / expected.abs().max()
            for expected, got in _outputs(encoder, exported)
        )
        if not difference <= TOLERANCE:
            raise ValueError(
                f"export: a graph differs from PyTorch by {difference:.1e} of its largest value, "
                f"where at most {TOLERANCE:.0e} was expected: this encoder cannot be exported"
            )
        if quantize is not None:
            for path in sorted(folder.iterdir()):
                quantize_graph(path)
            exported = OnnxEncoder(folder, layers=layers, **described(encoder))
            quantized_difference = _largest(
                (got - expected).norm() / expected.norm()
                for expected, got in _outputs(encoder, exported)
            )
        size = sum(path.stat().st_size for path in folder.iterdir())
        model.encoder = exported
        model.save_pretrained(folder)
        if (model_dir / "tokenizer_config.json").is_file():
            load_tokenizer(str(model_dir.resolve())).save_pretrained(folder)
    return Export(output, size / 1e6, difference, quantized_difference, had_promise, replaced)


def _largest(differences: Iterable[Tensor]) -> float:
    """Return the largest difference, or NaN if any is NaN, which `max` may miss."""
    return torch.stack([*differences]).max().item()


class _Traced(nn.Module):
    """One method of an encoder as a module, since only modules can be traced."""

    def __init__(self, encoder: LayeredEncoder, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.encoder = encoder
        self.run = run
        # The exporter restores the mode of this module; the encoder's mode must not change.
        self.eval()

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.run(*tensors)


def _write_graphs(encoder: LayeredEncoder, num_layers: int, folder: Path) -> list[str]:
    """Write the graphs of an encoder, and return the file names of its first layers."""
    model: Any = getattr(encoder, "model", None)
    if hasattr(model, "set_attn_implementation"):
        # Fused attention guards against cases that never occur here.
        model.set_attn_implementation("eager")
    ids = torch.ones(2, 5, dtype=torch.int64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    inputs = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": mask}
    states = {"hidden": encoder.embed(inputs), "mask": mask}
    _write_graph(
        folder / EMBED,
        encoder,
        lambda *given: encoder.embed(dict(zip(inputs, given, strict=True))),
        inputs,
    )
    # Layers that share their weights give the same graph.
    names: dict[str, str] = {}
    layers = []
    for n in range(1, num_layers + 1):
        path = folder / f"layer_{n}.onnx"
        _write_graph(
            path, encoder, lambda h, m, n=n: encoder.layer(n, h, encoder.context(h, m)), states
        )
        layers.append(names.setdefault(file_digest(path), path.name))
        if layers[-1] != path.name:
            path.unlink()
    # One graph serves all layers: if a norm precedes the pooling, it is the same for all.
    _write_graph(folder / POOL, encoder, lambda h, m: encoder.pool(1, h, m), states)
    return layers


def _write_graph(
    path: Path, encoder: LayeredEncoder, run: Callable[..., Tensor], inputs: dict[str, Tensor]
) -> None:
    with warnings.catch_warnings():
        # The tracer warns, and the exporter is deprecated; each graph is compared with PyTorch.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Traced(encoder, run),
            tuple(inputs.values()),
            path,
            input_names=list(inputs),
            output_names=["output"],
            dynamic_axes={name: {0: "batch", 1: "length"} for name in inputs}
            | {"output": {0: "batch"}},
            opset_version=OPSET,
            # The newer exporter needs another package, and fixes the sizes of its example inputs.
            dynamo=False,
        )


def _outputs(encoder: LayeredEncoder, exported: OnnxEncoder) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the outputs of PyTorch and of each graph, for batches of sizes other than traced."""
    generator = torch.Generator().manual_seed(0)
    longest = min(80, encoder.max_length or 80)
    for rows, length in ((3, min(17, longest)), (1, longest), (1, 1)):
        ids = torch.randint(0, encoder.vocab_size or 2, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[1:, (length + 1) // 2 :] = 0
        batch, valid = {"input_ids": ids, "attention_mask": mask}, mask.bool()
        hidden = encoder.embed(batch)
        yield hidden[valid], exported.embed(batch)[valid]
        context = encoder.context(hidden, mask)
        for n in range(1, exported.num_layers + 1):
            after = encoder.layer(n, hidden, context)
            yield after[valid], exported.layer(n, hidden, mask)[valid]
            hidden = after
            yield encoder.pool(n, hidden, mask), exported.pool(n, hidden, mask)
