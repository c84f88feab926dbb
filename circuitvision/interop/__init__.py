"""Other libraries' tools on our models, from the same family table as our own hooks: nnsight traces and TransformerLens's analysis functions.

Both are views. The module stays one object in memory, sites keep our names, and the values read and written are those
of :meth:`~circuitvision.HookedModel.run_with_cache` and :meth:`~circuitvision.HookedModel.run_with_hooks`. The
libraries are imported when a view is first asked for, never before: importing either changes global state (nnsight
gives every object a ``save`` method).
"""

from __future__ import annotations

from circuitvision.interop.nnsight_view import nnsight, nnsight_names, nnsight_places
from circuitvision.interop.transformer_lens_view import transformer_lens

__all__ = ["nnsight", "nnsight_names", "nnsight_places", "transformer_lens"]
