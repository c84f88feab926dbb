"""Reading and writing a site through plain nnsight envoys: the part of the nnsight view that can travel to a server.

A *place* is a plain tuple ``(path, side, n_heads, keyword)``: the module's own path, whether the value enters it,
leaves it or is shared with the skip path, the number of heads to split off, and the keyword under which it may
arrive. :func:`nnsight_places <circuitvision.interop.nnsight_places>` lists them. The two functions below need nothing
but nnsight and torch where they run, so with ``nnsight.register("circuitvision")`` their source is sent along with a
trace and the server needs no circuitvision.

Not covered: derived sites (a norm's scale, one head's share of the output) and what exists only inside attention.
"""

from __future__ import annotations

from typing import Any

Place = tuple[str, str, int | None, str]
"""``(path, side, n_heads, keyword)``; ``side`` is "input", "output" or "shared"."""


def read(root: Any, place: Place) -> Any:
    """The value at a place, inside a trace of ``root``: a copy, so changing it changes nothing until :func:`write` puts it back.

    Heads are split off as ``row pos head d_head``, a convolution's map is flattened to ``row pos d_model``. Places are read in the
    order of the forward pass; nnsight raises OutOfOrderError otherwise.
    """
    path, side, n_heads, keyword = place
    envoy = root.get(path) if path else root
    if side == "output":
        value = envoy.output
        value = value[0] if isinstance(value, tuple) else value
        if value.ndim == 4:
            return value.flatten(2).transpose(1, 2).clone()
    else:
        args, kwargs = envoy.inputs
        value = args[0] if args else kwargs[keyword if keyword in kwargs else next(iter(kwargs))]
    return (value if n_heads is None else value.unflatten(-1, (n_heads, -1))).clone()


def write(root: Any, place: Place, value: Any) -> None:
    """Put ``value``, in the shape :func:`read` gives, back at a place, inside a trace of ``root``.

    A shared value (``hook_resid_mid``) is written in place, because the skip path holds the same tensor.
    """
    path, side, n_heads, keyword = place
    envoy = root.get(path) if path else root
    merged = value if n_heads is None else value.flatten(-2)
    if side == "output":
        whole = envoy.output
        before = whole[0] if isinstance(whole, tuple) else whole
        if before.ndim == 4:
            merged = merged.transpose(1, 2).reshape(before.shape)
        envoy.output = (merged, *whole[1:]) if isinstance(whole, tuple) else merged
        return
    args, kwargs = envoy.inputs
    key = keyword if keyword in kwargs else next(iter(kwargs), None)
    if side == "shared":
        (args[0] if args else kwargs[key]).copy_(merged)
    elif args:
        envoy.inputs = ((merged, *args[1:]), kwargs)
    else:
        envoy.inputs = (args, {**kwargs, key: merged})
