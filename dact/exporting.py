"""Export: a fitted model whose encoder runs on ONNX Runtime instead of PyTorch."""

from __future__ import annotations

import math
import os
import shutil
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
from dact.encoders.onnx import EMBED, POOL, OnnxEncoder
from dact.encoders.quantization import quantize as quantize_graph
from dact.files import file_digest, read_json, replacing_folder
from dact.model import DACT
from dact.model_card import CARD_NAME, is_written_by_dact
from dact.saving import CONFIG_NAME

Quantization = Literal["int8"]
OPSET = 17  # the first with a layer normalisation of its own
# What an export writes; tokenizers have a few kinds of files.
WRITTEN = (
    "*.onnx",
    "config.json",
    "model.safetensors",
    CARD_NAME,
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.codes",
    "*.jinja",
)
TOLERANCE = 1e-4  # largest difference of a graph from PyTorch, as a share of the largest value


@dataclass(frozen=True)
class Export:
    """What `export` wrote.

    Args:
        folder: The folder.
        quantize: ``"int8"``, or None for float32.
        megabytes: Size of the graphs on disk, in millions of bytes.
        difference: Largest difference of a float32 graph from PyTorch, as a share of its largest
            value.
        quantized_difference: The same after quantisation, root mean square over root mean square;
            None for float32.
        promise_dropped: Whether the model had a promise, which does not carry over.
    """

    folder: Path
    quantize: Quantization | None
    megabytes: float
    difference: float
    quantized_difference: float | None
    promise_dropped: bool

    def __str__(self) -> str:
        checked = f"within {self.difference:.0e} of PyTorch"
        if self.quantized_difference is not None:
            checked = f"int8, {self.quantized_difference:.1%} from PyTorch (float32: {checked})"
        lines = [f"{self.folder}: {self.megabytes:.1f} MB of graphs, {checked}"]
        if self.promise_dropped:
            lines.append(
                "it leaves early as before, but its promise was dropped, since answers differ a little. Renew it with "
                "dact calibrate on this folder"
            )
        return "\n".join(lines)


def export(
    model_dir: str | Path, output: str | Path, quantize: Quantization | None = None
) -> Export:
    """Write a model folder whose encoder runs on ONNX Runtime, and return what was written.

    The embedding, each layer and the pooling become graphs of any batch size and length, each
    compared with PyTorch before the folder appears. `DACT.from_pretrained` and
    `TextClassifier.from_pretrained` read the folder like any other. The halting rule stays. A promise
    that `dact.calibrate` made is dropped, since answers differ a little: calibrate the new folder to
    renew it.

    Args:
        model_dir: Folder with a fitted model, as ``dact fit`` and ``dact tune`` leave it.
        output: Folder to write. An earlier export there is replaced.
        quantize: ``"int8"`` for weights of 8 bits, with one scale per channel, and for activations
            that are quantised at run time, with one scale per token; float32 if left out. It is
            meant for processors with VNNI instructions; others lose some accuracy.

    Raises:
        ImportError: If ONNX Runtime or onnx is not installed.
        FileNotFoundError: If there is no model in `model_dir`.
        ValueError: If `quantize` is unknown, `output` holds something else, the model is exported
            already, or a graph differs from PyTorch.
    """
    if quantize is not None:
        check_choice("export: quantize", quantize, Quantization)
    model_dir, output = Path(model_dir).expanduser(), Path(output).expanduser().absolute()
    _check_output(output)
    config = read_json(model_dir / CONFIG_NAME) if (model_dir / CONFIG_NAME).is_file() else None
    if isinstance(config, dict) and not config.get("encoder", True):
        raise ValueError(
            f"export: {model_dir} has an encoder of your own, and only those of dact can be exported"
        )
    model = DACT.from_pretrained(model_dir)
    encoder = model.encoder
    if isinstance(encoder, OnnxEncoder):
        raise ValueError(f"export: {model_dir} was exported already: give the folder of the fit")
    had_promise = model.calibration is not None
    model.calibration = None  # the halting rule stays
    with replacing_folder(output) as folder, torch.no_grad():
        layers = _write_graphs(encoder, model.num_layers, folder)
        exported = _open(folder, layers, encoder)
        pairs = _outputs(encoder, exported)
        difference = _largest((got - right).abs().max() / right.abs().max() for right, got in pairs)
        if not difference <= TOLERANCE:
            raise ValueError(
                f"export: a graph differs from PyTorch by {difference:.1e} of its largest value, where at most "
                f"{TOLERANCE:.0e} was expected: this encoder cannot be exported"
            )
        quantized_difference = None
        if quantize is not None:
            for path in sorted(folder.iterdir()):
                quantize_graph(path)
            exported = _open(folder, layers, encoder)
            pairs = _outputs(encoder, exported)
            quantized_difference = _largest(
                (got - right).norm() / right.norm() for right, got in pairs
            )
            if not math.isfinite(quantized_difference):
                raise ValueError(
                    "export: with int8 some outputs are no numbers: export this model without quantize"
                )
        size = sum(path.stat().st_size for path in folder.iterdir())
        model.encoder = exported
        card = output / CARD_NAME
        if card.is_file() and not is_written_by_dact(card):
            shutil.copy(card, folder)  # which saving keeps
        model.save_pretrained(folder)
        if any(
            (model_dir / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")
        ):
            load_tokenizer(str(model_dir.resolve())).save_pretrained(folder)
    return Export(output, quantize, size / 1e6, difference, quantized_difference, had_promise)


def _largest(differences: Iterable[Tensor]) -> float:
    """Return the largest difference; NaN if one is, which `max` may overlook."""
    return torch.stack([*differences]).max().item()


def _check_output(output: Path) -> None:
    """Raise an error if `output` is something that no export wrote, since it would be replaced."""
    if os.path.ismount(output.resolve()):
        raise ValueError(
            f"export: {output} is a mount point, which cannot be replaced: give a folder in it, such as "
            f"{output / 'model'}"
        )
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    config = read_json(output / CONFIG_NAME) if (output / CONFIG_NAME).is_file() else None
    encoder = config.get("encoder") if isinstance(config, dict) else None
    if not isinstance(encoder, dict) or encoder.get("type") != "OnnxEncoder":
        raise ValueError(
            f"export: {output} exists and was not written by dact export: give another folder"
        )
    others = sorted(
        path.name for path in output.iterdir() if path.is_dir() or not any(map(path.match, WRITTEN))
    )
    if others:
        raise ValueError(
            f"export: {output} holds {', '.join(others)}, which no export wrote, and would be replaced: give another "
            "folder"
        )


class _Traced(nn.Module):
    """One method of an encoder as a module, since only modules can be traced."""

    def __init__(self, encoder: LayeredEncoder, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.encoder = encoder
        self.run = run
        # the exporter restores the mode of what it traced: that of the encoder must not change
        self.eval()

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.run(*tensors)


def _write_graphs(encoder: LayeredEncoder, num_layers: int, folder: Path) -> list[str]:
    """Write the graphs of the first layers of an encoder, and return the file names of these
    layers."""
    model: Any = getattr(encoder, "model", None)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(
            "eager"
        )  # the fused one guards against cases that never occur here
    ids, mask = (
        torch.ones(2, 5, dtype=torch.int64),
        torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    )
    inputs = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": mask}
    states = {"hidden": encoder.embed(inputs), "mask": mask}
    _write_graph(
        folder / EMBED,
        encoder,
        lambda *given: encoder.embed(dict(zip(inputs, given, strict=True))),
        inputs,
    )
    names: dict[str, str] = {}  # layers that share their weights give the same graph
    layers = []
    for n in range(1, num_layers + 1):
        path = folder / f"layer_{n}.onnx"
        _write_graph(
            path, encoder, lambda h, m, n=n: encoder.layer(n, h, encoder.context(h, m)), states
        )
        layers.append(names.setdefault(file_digest(path), path.name))
        if layers[-1] != path.name:
            path.unlink()
    # One graph serves all layers: the norm before it, where there is one, is the same for all.
    _write_graph(folder / POOL, encoder, lambda h, m: encoder.pool(1, h, m), states)
    return layers


def _write_graph(
    path: Path, encoder: LayeredEncoder, run: Callable[..., Tensor], inputs: dict[str, Tensor]
) -> None:
    with warnings.catch_warnings():
        # The tracer warns, and the exporter is deprecated; the graph itself is compared with
        # PyTorch.
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
            # the newer exporter needs another package and fixes the sizes that its example has
            dynamo=False,
        )


def _open(folder: Path, layers: list[str], encoder: LayeredEncoder) -> OnnxEncoder:
    return OnnxEncoder(
        folder,
        layers=layers,
        hidden_size=encoder.hidden_size,
        vocab_size=encoder.vocab_size,
        max_length=encoder.max_length,
        counts_columns=encoder.counts_columns,
        digests={path.name: file_digest(path) for path in sorted(folder.iterdir())},
    )


def _outputs(encoder: LayeredEncoder, exported: OnnxEncoder) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the outputs of PyTorch and of each graph for the same input, for batches of other sizes
    than traced."""
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
