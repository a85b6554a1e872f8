"""stcocc-r50-16f-openocc-12e under the official file name."""
_base_ = "./stcocc-r50-16f-openocc-12e.py"
