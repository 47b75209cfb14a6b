"""Training: the loop, its schedule, checkpoints, evaluation and tracking."""
