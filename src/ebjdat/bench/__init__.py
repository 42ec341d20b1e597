"""How fast a training step is, beside a plainly written one, and what share of the machine it uses."""
