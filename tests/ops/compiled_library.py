"""For tests of the compiled operators."""

import pytest

from mmdet3d.ops._library import AVAILABLE

needs_library = pytest.mark.skipif(not AVAILABLE, reason="operators are not compiled")
