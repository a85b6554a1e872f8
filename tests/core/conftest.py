"""The training of the tiny model is imported by tests of several folders."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
