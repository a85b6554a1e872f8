"""What runs around the model: hooks, evaluation, visualisation."""
