"""What the class of a voxel adds to its hidden values: noise, softmax and two linear layers in one pass."""

from .class_guidance import class_guidance, kernel_serves
from .noise import gumbel_noise, gumbel_noise_reference, uniform_noise
from .reference import class_guidance_reference

__all__ = ["class_guidance", "class_guidance_reference", "gumbel_noise", "gumbel_noise_reference", "kernel_serves",
           "uniform_noise"]
