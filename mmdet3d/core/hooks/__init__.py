"""What happens around an iteration: optimizer, logs, checkpoints, averaged weights, evaluation."""
