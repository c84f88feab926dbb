"""Data with known ground truth: synthetic scenes with every object's attributes, box and mask, and minimal pairs of them."""
