"""A second device made of the CPU: it computes there, but minds what a GPU minds.

Its tensors do not mix with those of the CPU, and every time the host has to wait for a value is
counted. So a test on any machine finds a tensor that was made on the wrong device, or a wait that a
GPU would pay for. It knows no kernels, no memory and no speed of a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretended")
DEVICE = torch.device("pretended", 0)
# operations that take both devices
MIXING = {"copy_", "_to_copy", "index", "index_put_", "_index_put_impl_"}
# operations whose result the host must see
WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}


class There(torch.Tensor):
    """A tensor of the second device."""

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> There:
        return torch.Tensor._make_wrapper_subclass(
            cls, here.shape, here.stride(), here.storage_offset(), dtype=here.dtype, device=DEVICE
        )

    def __init__(self, here: torch.Tensor) -> None:
        self.here = here

    def tolist(self) -> Any:
        return self.cpu().tolist()  # PyTorch's own refuses tensors of a subclass

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside of SecondDevice")


class _MakingTensors(TorchFunctionMode):
    """``torch.tensor`` and ``torch.as_tensor`` hide their copy to a device from dispatch modes:
    make it visible."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


class SecondDevice(TorchDispatchMode):
    """Within it there are two devices, the CPU and `DEVICE`.

    Attributes:
        waits: How often the host waited for the second device.
        dtypes: Of the tensors that were made there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0
        self.dtypes: set[torch.dtype] = set()
        self._making = _MakingTensors()

    def __enter__(self) -> SecondDevice:
        self._making.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._making.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        found: list[torch.Tensor] = []
        tree_map_only(torch.Tensor, found.append, (args, kwargs))
        there = [isinstance(tensor, There) for tensor in found]
        if any(there) and name not in MIXING:
            strangers = [
                t for t, is_there in zip(found, there, strict=True) if not is_there and t.dim() > 0
            ]
            assert not strangers, (
                f"{name} mixes devices: it got {len(strangers)} tensors of the CPU, too"
            )
        asked = kwargs.get("device")
        goes_there = any(there) if asked is None else asked == DEVICE or asked.type == DEVICE.type
        if asked is not None and goes_there:
            kwargs["device"] = torch.device("cpu")
        copies = name == "_to_copy" and any(there) != goes_there and not kwargs.get("non_blocking")
        self.waits += (any(there) and name in WAITING) or copies
        plain_args, plain_kwargs = tree_map_only(There, lambda tensor: tensor.here, (args, kwargs))
        result = func(*plain_args, **plain_kwargs)
        if name.endswith("_") and isinstance(args[0], There):  # in place
            return args[0]
        if not goes_there:
            return result
        tree_map_only(torch.Tensor, lambda tensor: self.dtypes.add(tensor.dtype), result)
        return tree_map_only(torch.Tensor, There, result)


def move(module: torch.nn.Module) -> torch.nn.Module:
    """Put the weights and buffers of a module on the second device."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                tensors[name] = None if tensor is None else There(tensor.detach())  # type: ignore[assignment]
    return module
