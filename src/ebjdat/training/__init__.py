"""The loop, its updates and schedules, resumable state and checkpoints."""
