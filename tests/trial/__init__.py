"""A trial against plain PyTorch: random models of odd sizes, random edits, and the same arithmetic in hand-written hooks."""
