"""Whether the table of a family tells the truth about a model: :func:`check_model`."""

from circuitvision.checks.model import Check, ModelCheck, check_model

__all__ = ["Check", "ModelCheck", "check_model"]
