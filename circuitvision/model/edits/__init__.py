"""Edits: values that say where a run is changed, and how; the public names are in :mod:`circuitvision.edits`."""
