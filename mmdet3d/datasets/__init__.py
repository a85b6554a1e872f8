"""Data sets, pipelines, samplers, metrics and the synthetic world. Importing this package imports no framework."""
