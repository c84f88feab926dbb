"""Reading activations without changing them: the logit lens."""

from __future__ import annotations

from circuitvision.readout.lens import LensResult, lens_sites, logit_lens

__all__ = ["LensResult", "lens_sites", "logit_lens"]
