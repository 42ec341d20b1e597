"""How fast a training step is, beside a naive one, and what share of the machine's rate it reaches."""
