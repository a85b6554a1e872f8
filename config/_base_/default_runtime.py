"""Logging and launch settings shared by all configs."""
log_config = dict(
    interval=50,
    hooks=[dict(type="TextLoggerHook"), dict(type="TensorboardLoggerHook")],
)
dist_params = dict(backend="nccl")
log_level = "INFO"
work_dir = None
resume_from = None
workflow = [("train", 1)]
opencv_num_threads = 0
mp_start_method = "fork"
