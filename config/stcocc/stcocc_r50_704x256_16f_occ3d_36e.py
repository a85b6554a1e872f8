"""stcocc-r50-16f-occ3d-36e under the official file name."""
_base_ = "./stcocc-r50-16f-occ3d-36e.py"
