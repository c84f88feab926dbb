"""The link of an output head: what turns its numbers into probabilities.

``"softmax"``: one of the columns is true (classes, tokens, captions of CLIP). ``"sigmoid"``: every column is a yes or no of its own (multi-label
classifiers, SigLIP). ``"none"``: the numbers are no probabilities (regression, actions, hidden states). The model says which one its head has
(``model.link``); metrics learn it when they are bound, and from outputs of the model, which carry it. An output that says nothing is taken to be a
softmax's.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from circuitvision.errors import InputError

Link = Literal["softmax", "sigmoid", "none"]
_MARK = "_circuitvision_link"


def marked(output: Tensor, link: Link) -> Tensor:
    """The same tensor, carrying the link of its head."""
    setattr(output, _MARK, link)
    return output


def link_of(output: Any) -> Link:
    """The link that an output carries; ``"softmax"`` where it carries none."""
    return getattr(output, _MARK, "softmax")


def check_probable(link: Link, columns: int, what: str = "prob") -> None:
    """Raise InputError where a head's numbers make no probabilities."""
    if link == "none":
        raise InputError(
            f"This model's output is no distribution (regression, actions or hidden states), so it has no {what}: use its numbers. "
            "A head of one yes or no is config.problem_type='multi_label_classification'."
        )
    if link == "softmax" and columns == 1:
        raise InputError(
            f"A softmax over one column is 1 whatever the model says, so it has no {what}: give two or more columns, or read the logit."
        )


def check_ranked(link: Link, columns: int, what: str) -> None:
    """Raise InputError where the columns of an output are no classes of which one can be ahead of the others."""
    if link == "none":
        raise InputError(
            f"This model's output is no scores of classes (regression, actions or hidden states), so there is no {what}: read its numbers, "
            "metrics.logit(column) or metrics.logit_diff(column, other column)."
        )
    if columns == 1:
        raise InputError(
            f"An output of one column has no other class, so there is no {what}: read metrics.logit(0), or of a yes or no metrics.prob(0)."
        )


def log_probabilities(logits: Tensor, link: Link) -> Tensor:
    """The log-probability of every column, in nats; InputError where there is none."""
    check_probable(link, logits.shape[-1], "log-probability")
    return nn.functional.logsigmoid(logits) if link == "sigmoid" else logits.log_softmax(-1)


def probabilities(logits: Tensor, link: Link) -> Tensor:
    """The probability of every column; InputError where there is none."""
    check_probable(link, logits.shape[-1], "probability")
    return logits.sigmoid() if link == "sigmoid" else logits.softmax(-1)


def divergence(reference: Tensor, logits: Tensor, link: Link) -> Tensor:
    """KL(reference || logits) in nats over the last axis; of yes-or-no columns the sum of theirs. InputError where there is none."""
    wanted, said = log_probabilities(reference, link), log_probabilities(logits, link)
    found = wanted.exp() * (wanted - said)
    if link == "sigmoid":
        no, said_no = log_probabilities(-reference, link), log_probabilities(-logits, link)
        found = found + no.exp() * (no - said_no)
    return found.sum(-1)


def shared_divergence(reference: Tensor, logits: Tensor, link: Link) -> Tensor:
    """Jensen–Shannon divergence in nats over the last axis, 0 … ln 2; of yes-or-no columns the sum of theirs. InputError where there is none."""
    found = _shared(log_probabilities(reference, link), log_probabilities(logits, link))
    if link == "sigmoid":
        found = found + _shared(log_probabilities(-reference, link), log_probabilities(-logits, link))
    return found.sum(-1)


def _shared(one: Tensor, other: Tensor) -> Tensor:
    """The terms of the Jensen–Shannon divergence of two log-probabilities."""
    middle = torch.logaddexp(one, other) - math.log(2)
    return (one.exp() * (one - middle) + other.exp() * (other - middle)) / 2
