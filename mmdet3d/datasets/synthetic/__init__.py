"""Drawn data in the nuScenes layout, for trying things without a download."""
