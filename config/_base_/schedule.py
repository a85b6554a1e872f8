"""AdamW, gradient clipping and initial weights of the published training (8 GPUs with 2 samples each)."""
optimizer = dict(type="AdamW", lr=1e-4, weight_decay=1e-2)
optimizer_config = dict(grad_clip=dict(max_norm=5, norm_type=2))
load_from = "pretrained/forward_projection-r50-4d-stereo-pretrained.pth"
revise_keys = None
