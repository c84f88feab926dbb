"""OpenVLA as transformers' own parts: its released checkpoints, processor and actions, without remote code.

``OpenVLAForActionPrediction`` (:mod:`.modeling`) reads the folders that OpenVLA is released in (:mod:`.checkpoints`, :mod:`.conversion`), and writes
them; :class:`.processing.OpenVLAProcessor` makes its inputs; :mod:`.actions` turns its tokens into actions.

Not covered: one vision backbone instead of two, other image strategies than plain resizing, training.
"""

from __future__ import annotations

from circuitvision.openvla.actions import ActionTokens, decode_actions, predict_action
from circuitvision.openvla.configuration import OpenVLAConfig
from circuitvision.openvla.modeling import OpenVLAForActionPrediction
from circuitvision.openvla.processing import OpenVLAImageProcessor, OpenVLAProcessor

__all__ = [
    "ActionTokens",
    "OpenVLAConfig",
    "OpenVLAForActionPrediction",
    "OpenVLAImageProcessor",
    "OpenVLAProcessor",
    "decode_actions",
    "predict_action",
]
