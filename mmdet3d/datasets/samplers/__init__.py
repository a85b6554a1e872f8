"""Orders in which frames are read: sequences in step with the temporal memory."""
