"""What a step takes, told by torch itself: autograd's saved tensors, and every tensor's birth and end.

The CUDA kernels' memory is tracked without a GPU, on the meta device: shapes, dtypes and autograd's formulas are those
of the real step, and the kernels that only CUDA has are called by name.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def saved_for_backward(*known: torch.Tensor) -> Iterator[dict[int, torch.UntypedStorage]]:
    """Storages that autograd keeps of what runs inside, those of `known` apart."""
    own = {tensor.untyped_storage()._cdata for tensor in known}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage  # held, so that no other storage gets its address
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


class Tracker(TorchDispatchMode):
    """Bytes of all tensors that live, the most there were, and what operations read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.now_bytes = self.peak_bytes = self.traffic_bytes = self.operations = 0
        self._known: set[int] = set()

    def note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now_bytes -= size

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        result = function(*arguments, **(keywords or {}))
        for tensor in _tensors(result):
            self.note(tensor)
        if not function.is_view:
            self.operations += 1
            name = function.name()
            if "mm" not in name and "attention" not in name:
                self.traffic_bytes += sum(map(_bytes, _tensors((arguments, keywords, result))))
        return result


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@pytest.fixture
def cuda_kernels_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, what torch chooses on a GPU: fused dropout and memory-efficient attention."""

    def attention(query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: float) -> torch.Tensor:
        found: tuple[torch.Tensor, ...] = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p
        )
        return found[0]

    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)  # meta has none
    monkeypatch.setattr(
        functional, "dropout", lambda hidden, probability: torch.native_dropout(hidden, probability, True)[0]
    )
    monkeypatch.setattr(functional, "scaled_dot_product_attention", attention)
