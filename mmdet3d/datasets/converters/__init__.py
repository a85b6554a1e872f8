"""Builders of what training reads: info files, coarse labels, and the check of both."""
