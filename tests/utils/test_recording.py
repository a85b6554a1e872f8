"""What is left of a recording that fails."""

from __future__ import annotations

from mmdet3d.utils.recording import end_recording, reason


def test_without_a_pool_nothing_has_to_end():
    end_recording(None)


def test_reason_of_a_failure_names_the_error_that_the_end_of_the_recording_replaced():
    error = RuntimeError("capture was invalidated")
    assert reason(error) == "capture was invalidated"
    error.__context__ = ValueError("an op waits for the device")
    assert reason(error) == "an op waits for the device (then capture was invalidated)"
