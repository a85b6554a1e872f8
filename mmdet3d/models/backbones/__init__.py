"""Backbones."""

from .resnet import ResNet
from .resnet3d import BasicBlock3D, CustomResNet3D

__all__ = ["BasicBlock3D", "CustomResNet3D", "ResNet"]
