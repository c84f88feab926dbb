"""Runs that compute only what an edit can change: where a run can be resumed, what it hands back, and sweeps of many edits.

:mod:`routes` says from which block on, and from which part of it, an edit can change anything; :mod:`resume` records the unedited run, and
:mod:`resumed_run` runs what lies behind the edits while every module before them hands back what it gave (:mod:`replay`). :mod:`prepared` is that run
for one start, with gradients; :mod:`sweeps` is many of them, one metric each.
"""
