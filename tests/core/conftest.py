"""The trainings of tests are imported by tests of several folders, and so is the tiny model."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "models/detectors")]
