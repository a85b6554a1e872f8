"""STCOcc: 3D semantic occupancy and scene flow from six cameras, in the mmdet3d style."""

__version__ = "1.0.0"
