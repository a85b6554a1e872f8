"""CUDA graphs: one engine that captures and replays, for frames and for training steps."""
