"""What the weights say without an input: value vectors, agreement, and the circuits of heads."""
