"""Training: batches, objective, EMA, checkpoints and the trainer."""
