"""Who wrote the answer: the terms of a stream, and what each adds to the output."""
