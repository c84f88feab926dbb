"""Metrics of a model's output: one number per example.

A metric is a callable ``metric(logits, inputs=None) -> [batch]``. It reads the family's natural output: ``[batch,
classes]`` of a classifier, ``[image, text]`` of a dual encoder, ``[batch, pos, vocab]`` of a vision-language model,
``[batch, chunk, action_dim]`` of an action model. Where the output has positions, ``position="last"`` means the last
*unmasked* one, taken from the attention mask in ``inputs``; padding on either side is therefore harmless, as long as
``inputs`` is passed. Any spelling of :mod:`circuitvision.model.positions` that names one position of an example will do; what is named by what is
there (kinds, regions, functions) needs ``metric.bind(model)``, as words do. An example without the position has no value.

Answers are ids (tokens, classes, or the column of a caption) or words of one piece, in the grammar of :mod:`circuitvision.answers`. Words need a
vocabulary: ``metric.bind(model)`` returns the same metric with ids; every function of the library that takes a model and a metric binds it itself.
A metric may be given by its name (``"logit_diff"``), and without an answer where a data set has one for each example; ``kl`` without a reference is
the divergence from the run that a method compares with. Several metrics of one run are a mapping, see :mod:`circuitvision.metric_set`. What is said
of measured numbers over examples (shares of a difference, flips, transfer) is in :mod:`circuitvision.metrics.effects`.

Differences and probabilities are computed in float32 at least: subtracting two bfloat16 logits loses the answer's
last digits. Not covered: answers of several tokens.
"""

from __future__ import annotations

from circuitvision.metrics.actions import ActionDim, ActionEstimate, Success, action_dim, action_estimate, success
from circuitvision.metrics.answers import (
    Accuracy,
    InterchangeAccuracy,
    Logit,
    LogitDiff,
    LogProb,
    Margin,
    Prob,
    Rank,
    accuracy,
    interchange_accuracy,
    logit,
    logit_diff,
    logprob,
    margin,
    prob,
    rank,
)
from circuitvision.metrics.base import Metric
from circuitvision.metrics.comparisons import (
    JS,
    KL,
    ActionDistance,
    Comparison,
    TransferCoefficient,
    action_distance,
    js,
    kl,
    transfer_coefficient,
)
from circuitvision.metrics.effects import Transfer, fldd, flip_layer, restored_error, restored_share, transfer
from circuitvision.metrics.position import Position, as_output, at_position
from circuitvision.metrics.registry import NAMES, bind, by_name, call, evaluate, is_own, kept, takes_inputs

__all__ = [
    "JS",
    "KL",
    "NAMES",
    "Accuracy",
    "ActionDim",
    "ActionDistance",
    "ActionEstimate",
    "Comparison",
    "InterchangeAccuracy",
    "LogProb",
    "Logit",
    "LogitDiff",
    "Margin",
    "Metric",
    "Position",
    "Prob",
    "Rank",
    "Success",
    "Transfer",
    "TransferCoefficient",
    "accuracy",
    "action_dim",
    "action_distance",
    "action_estimate",
    "as_output",
    "at_position",
    "bind",
    "by_name",
    "call",
    "evaluate",
    "fldd",
    "flip_layer",
    "interchange_accuracy",
    "is_own",
    "js",
    "kept",
    "kl",
    "logit",
    "logit_diff",
    "logprob",
    "margin",
    "prob",
    "rank",
    "restored_error",
    "restored_share",
    "success",
    "takes_inputs",
    "transfer",
    "transfer_coefficient",
]
