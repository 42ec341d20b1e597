"""Measurements of a network that takes [0, 1] images and returns logits. Each returns plain values."""
