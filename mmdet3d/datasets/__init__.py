"""Data sets, pipelines, samplers, metrics and the synthetic world. Importing this package imports no framework."""


def __getattr__(name: str):
    """``build_dataset`` and ``build_pipeline``, whose module registers every data set and step."""
    if name in ("build_dataset", "build_pipeline"):
        from mmdet3d.datasets import builder

        return getattr(builder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
