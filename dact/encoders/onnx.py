"""OnnxEncoder: the encoder of a folder that `dact.export` wrote, with its layers as ONNX Runtime
graphs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dact.encoders.base import Batch, Given, LayeredEncoder, Made
from dact.files import file_digest, replacing

try:
    import onnxruntime
except ImportError as error:
    raise ImportError(
        "an exported model runs on ONNX Runtime, which is not installed: pip install 'dact[onnx]'"
    ) from error

EMBED, POOL = "embed.onnx", "pool.onnx"


class OnnxEncoder(LayeredEncoder):
    """An encoder whose embedding, layers and pooling are graphs that ONNX Runtime runs on the CPU.

    It keeps the contract of `LayeredEncoder`, so early exit, calibration and `TextClassifier` work
    as they do with PyTorch. It has no parameters: only the submodels can be trained. Steps of early
    exit run side by side, each in one thread, as many at a time as PyTorch uses threads.

    Args:
        folder: Folder with the graphs.
        layers: File names of the layers' graphs, from the first layer to the last. Layers that
            share their weights share a graph.
        hidden_size: Width of the hidden state.
        vocab_size: Number of token ids, None if unknown.
        max_length: Longest input in tokens, None if there is no bound.
        digests: SHA-256 of each file, in hexadecimal.
        counts_columns: Whether positions count from the first column, so that padding must be on
            the right.

    Raises:
        ImportError: If ONNX Runtime is not installed.
        ValueError: If a graph is missing or corrupted.
    """

    # enough for one thread; larger steps have more padding and leave a thread idle at the end
    step_tokens = 1024

    def __init__(
        self,
        folder: str | Path,
        *,
        layers: Sequence[str],
        hidden_size: int,
        vocab_size: int | None,
        max_length: int | None,
        digests: Mapping[str, str],
        counts_columns: bool = False,
    ) -> None:
        super().__init__()
        for name in layers:
            if Path(name).name != name:  # a folder from elsewhere must not name files outside of it
                raise ValueError(
                    f"{folder}: the name of a graph must be that of a file in this folder, got {name!r}"
                )
        self.folder = Path(folder).absolute()
        self.num_layers = len(layers)
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.counts_columns = counts_columns
        self._layers = tuple(layers)
        self._digests = dict(digests)
        self._graphs = {
            name: _Graph(self.folder / name, self._digests)
            for name in (EMBED, *dict.fromkeys(layers), POOL)
        }

    def embed(self, batch: Batch) -> Tensor:
        ids = batch["input_ids"].long()
        # Hugging Face's own default for absent token types is zeros.
        types = batch.get("token_type_ids", torch.zeros_like(ids))
        return self._graphs[EMBED](
            input_ids=ids, token_type_ids=types.long(), attention_mask=self.mask(batch).long()
        )

    def context(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return mask.long()

    def layer(self, layer: int, hidden: Tensor, context: Tensor) -> Tensor:
        return self._graphs[self._layers[layer - 1]](hidden=hidden, mask=context)

    def pool(self, layer: int, hidden: Tensor, mask: Tensor) -> Tensor:
        return self._graphs[POOL](hidden=hidden, mask=mask.long())

    def for_each(self, function: Callable[[Given], Made], steps: Sequence[Given]) -> Iterable[Made]:
        threads = torch.get_num_threads()
        if threads == 1 or len(steps) == 1:
            return map(function, steps)
        return _pool(threads).map(function, steps)

    def config(self) -> dict[str, Any]:
        return {
            "type": "OnnxEncoder",
            "layers": list(self._layers),
            "hidden_size": self.hidden_size,
            "vocab_size": self.vocab_size,
            "max_length": self.max_length,
            "counts_columns": self.counts_columns,
            "digests": self._digests,
        }

    def save_files(self, folder: Path) -> None:
        for name in self._graphs:
            if not (folder / name).exists() or not (folder / name).samefile(self.folder / name):
                with replacing(folder / name) as partial:
                    shutil.copyfile(self.folder / name, partial)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return the threads that all encoders of the process share."""
    return ThreadPoolExecutor(threads, thread_name_prefix="dact")


class _Graph:
    """One graph, from tensors by name to one tensor. Copies and pickles hold only its path."""

    def __init__(self, path: Path, digests: Mapping[str, str]) -> None:
        name = path.name
        if not path.is_file():
            raise ValueError(f"{path.parent} lacks the graph {name}: export the model again")
        if file_digest(path) != digests.get(name):
            raise ValueError(f"{path} is corrupted: its content is not what dact.export wrote")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # the steps of early exit run side by side instead
        self._session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self._inputs = [entry.name for entry in self._session.get_inputs()]
        self._origin = path, digests

    def __reduce__(self) -> tuple[Any, ...]:
        return _Graph, self._origin

    def __call__(self, **tensors: Tensor) -> Tensor:
        feed = {name: tensors[name].detach().cpu().numpy() for name in self._inputs}
        (output,) = self._session.run(None, feed)
        return torch.from_numpy(output).to(next(iter(tensors.values())).device)
