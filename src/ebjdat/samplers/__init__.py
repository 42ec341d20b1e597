"""Chains, replay buffer and projected gradients: everything that moves images, never weights."""
