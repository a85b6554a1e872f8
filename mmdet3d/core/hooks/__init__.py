"""Hooks of the training loop; they work with a :class:`~mmdet3d.core.runner.TrainRunner`."""
