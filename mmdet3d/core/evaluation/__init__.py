"""Evaluation of a model on a data set: streaming, over any number of processes, with the same result."""

from mmdet3d.core.evaluation.evaluator import Evaluation, Evaluator, EvaluatorOptions

__all__ = ["Evaluation", "Evaluator", "EvaluatorOptions"]
