"""Where values lie in memory: storage of their own for what is kept, and the layout of the value they replace for what goes on.

Kernels add in the order of memory, by vectors, so equal values elsewhere can give other bits; and a small view keeps all of the tensor it was cut
from.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes that the widest vector registers want an address to be a multiple of."""


def compact(value: Tensor) -> Tensor:
    """``value``, detached, and copied where it is a view into a storage larger than itself."""
    # A detached view no longer says that it is one.
    looks = value._is_view() or value.is_inference()
    value = value.detach() if value.requires_grad else value
    return owned(value) if looks else value


def owned(value: Tensor) -> Tensor:
    """A tensor, copied where its storage is larger than itself."""
    if not _has_memory(value):
        return value
    return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value


def match_memory_layout(value: Tensor, like: Tensor) -> Tensor:
    """``value`` in the memory layout and alignment of ``like``."""
    strides = like.stride()
    overlaps = any(stride == 0 and size > 1 for stride, size in zip(strides, like.shape, strict=True))
    if overlaps or not like.numel():
        return value
    if not (_has_memory(like) and _has_memory(value)):
        placed = torch.empty_strided(like.shape, strides, dtype=value.dtype, device=value.device)
        return value if value.stride() == strides else placed.copy_(value)
    shift = like.data_ptr() % ALIGNMENT
    if value.stride() == strides and value.data_ptr() % ALIGNMENT == shift:
        return value
    extent = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, strides, strict=True))
    room = torch.empty(extent + ALIGNMENT // like.element_size(), dtype=value.dtype, device=value.device)
    offset = (shift - room.data_ptr()) % ALIGNMENT // like.element_size()
    # No view of ``room``: autograd would follow the whole of it.
    place = torch.empty(0, dtype=value.dtype, device=value.device)
    return place.set_(room.untyped_storage(), offset, like.shape, strides).copy_(value)


def _has_memory(value: Tensor) -> bool:
    """Whether a tensor has an address: not on meta, and not wrapped by a functional transform."""
    return not (value.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(value))
