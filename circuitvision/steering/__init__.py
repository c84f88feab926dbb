"""Steering policies: what moves a robot, from the words that its neurons promote to the episodes it succeeds in.

Recipes over :mod:`circuitvision.edits` and data sets of pairs; each is held against a control. ``neurons`` and ``clusters`` choose neurons by what
they promote, ``directions`` builds directions from data, ``response`` measures effect against scale beside random sets, ``injection`` puts one run's
activations into another, ``prompts`` asks whether the instruction is listened to, ``rollouts`` closes the loop. ``acting`` is the one call by which
a policy acts, whatever way it says its actions.

Called ``(tower, …)`` for weights and ``(model, data, …)`` for experiments.
"""

from __future__ import annotations

from circuitvision.metrics.effects import Transfer, transfer
from circuitvision.steering.acting import act
from circuitvision.steering.clusters import ValueVectorClusters, value_vector_clusters
from circuitvision.steering.directions import Direction, random_directions, steering_direction
from circuitvision.steering.injection import InjectionResult, inject
from circuitvision.steering.neurons import NeuronSet, promoting_neurons, random_neurons
from circuitvision.steering.prompts import PromptConditions, prompt_conditions, reworded
from circuitvision.steering.response import SteeringResponse, steering_response
from circuitvision.steering.rollouts import ClosedLoop, Rollouts, closed_loop, rollouts

__all__ = [
    "ClosedLoop",
    "Direction",
    "InjectionResult",
    "NeuronSet",
    "PromptConditions",
    "Rollouts",
    "SteeringResponse",
    "Transfer",
    "ValueVectorClusters",
    "act",
    "closed_loop",
    "inject",
    "promoting_neurons",
    "prompt_conditions",
    "random_directions",
    "random_neurons",
    "reworded",
    "rollouts",
    "steering_direction",
    "steering_response",
    "transfer",
    "value_vector_clusters",
]
