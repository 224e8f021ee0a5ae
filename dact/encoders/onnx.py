"""OnnxEncoder: the encoder of a folder that `dact.export` wrote, as ONNX Runtime graphs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dact.encoders.base import Batch, Given, LayeredEncoder, Made
from dact.files import replacing

try:
    import onnxruntime
except ImportError as error:
    raise ImportError(
        "an exported model runs on ONNX Runtime, which is not installed: pip install 'dact[onnx]'"
    ) from error

EMBED, POOL = "embed.onnx", "pool.onnx"


class OnnxEncoder(LayeredEncoder):
    """An encoder whose embedding, layers and pooling are graphs that ONNX Runtime runs on the CPU.

    It has no parameters: only the submodels can be trained. Steps of early exit run in parallel,
    each in one thread, with as many threads as PyTorch uses.

    Args:
        folder: Folder with the graphs.
        layers: File names of the layers' graphs, from the first layer to the last. Layers that
            share their weights share a graph.
        hidden_size: Width of the hidden state.
        vocab_size: Number of token ids, None if unknown.
        max_length: Longest input in tokens, None if there is no bound.
        counts_columns: Whether positions count from the first column, so that padding must be on
            the right.

    Raises:
        ImportError: If ONNX Runtime is not installed.
        ValueError: If a graph is missing.
    """

    # Enough for one thread. Larger steps have more padding, and leave threads idle at the end.
    step_tokens = 1024

    def __init__(
        self,
        folder: str | Path,
        *,
        layers: Sequence[str],
        hidden_size: int,
        vocab_size: int | None,
        max_length: int | None,
        counts_columns: bool = False,
    ) -> None:
        super().__init__()
        self.folder = Path(folder).absolute()
        self.num_layers = len(layers)
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.max_length = max_length
        self.counts_columns = counts_columns
        # Only file names: a downloaded configuration must not name files outside of the folder.
        self._layers = tuple(Path(name).name for name in layers)
        names = (EMBED, *dict.fromkeys(self._layers), POOL)
        self._graphs = {name: _Graph(self.folder / name) for name in names}

    def embed(self, batch: Batch) -> Tensor:
        ids = batch["input_ids"].long()
        # As in transformers, absent token types are zeros.
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
            **described(self),
        }

    def save_files(self, folder: Path) -> None:
        for name in self._graphs:
            if folder.resolve() != self.folder.resolve():
                with replacing(folder / name) as partial:
                    shutil.copyfile(self.folder / name, partial)


def described(encoder: LayeredEncoder) -> dict[str, Any]:
    """Return the arguments of `OnnxEncoder` that an export copies from `encoder`."""
    names = ("hidden_size", "vocab_size", "max_length", "counts_columns")
    return {name: getattr(encoder, name) for name in names}


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return the threads that all encoders of the process share."""
    return ThreadPoolExecutor(threads, thread_name_prefix="dact")


class _Graph:
    """One graph, from tensors by name to one tensor. Copies and pickles hold only its path."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"{path.parent} lacks the graph {path.name}: export the model again")
        options = onnxruntime.SessionOptions()
        # The steps of early exit run in parallel instead.
        options.intra_op_num_threads = 1
        providers = ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(path, options, providers=providers)
        self._inputs = [entry.name for entry in self._session.get_inputs()]
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return _Graph, (self._path,)

    def __call__(self, **tensors: Tensor) -> Tensor:
        feed = {name: tensors[name].detach().cpu().numpy() for name in self._inputs}
        (output,) = self._session.run(None, feed)
        return torch.from_numpy(output).to(next(iter(tensors.values())).device)
