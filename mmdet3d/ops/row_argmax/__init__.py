"""Index of the greatest value of short rows, as a byte."""

from .reference import row_argmax_reference
from .row_argmax import row_argmax

__all__ = ["row_argmax", "row_argmax_reference"]
