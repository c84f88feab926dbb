"""Sweeps: metrics under many edits, computing only what each edit can change.

``run`` measures groups of edits on inputs in memory, ``study`` does so over a data set and keeps finished parts in a ``store``; ``plan`` says what
was computed for each group, and ``result`` is what comes out.
"""
