"""The published OpenOcc model and its pipelines, unchanged, on the built-in synthetic world: shows that it learns.

The data, 21 scenes to train on and 7 to evaluate, of 14 frames each, come from one command::

    python tools/create_synthetic.py --out data/synthetic-large --version v1.0-trainval --scenes 28 --frames 14 \
        --image-size 800x450

Images may have any size: the pipelines scale them to the width of the network image, and ``src_size`` only says what
nuScenes has. The random scale is added to that factor, so it changes images of 800 x 450 half as much as those of
1600 x 900.

The schedule is for one GPU and weights that are random at the start. A shorter or longer training needs both numbers:
``--cfg-options runner.max_iters=1000 lr_config.step=[800]``. Bfloat16: ``precision=bf16``. docs/results.md has scores.
"""
_base_ = "./stcocc-r50-16f-openocc-12e.py"

load_from = None
num_gpus = 1
samples_per_gpu = 2
precision = "fp32"

data_root = "data/synthetic-large/"
test_dataset = dict(data_root=data_root, ann_file=data_root + "stcocc-nuscenes_infos_val.pkl")
data = dict(
    samples_per_gpu=samples_per_gpu,
    # Whole scenes, as in the evaluation: they are shorter than the halves of those of nuScenes.
    train=dict(data_root=data_root, ann_file=data_root + "stcocc-nuscenes_infos_train.pkl", sequences_split_num=1),
    val=test_dataset,
    test=test_dataset,
)

max_iters = 3000
optimizer = dict(lr=3e-4)
lr_config = dict(policy="step", warmup="linear", warmup_iters=200, warmup_ratio=0.001, gamma=0.1,
                 step=[max_iters * 4 // 5])
runner = dict(type="IterBasedRunner", max_iters=max_iters)
checkpoint_config = dict(interval=500, max_keep_ckpts=2)
log_config = dict(interval=20)
# With --validate, which the schedule above does not need.
evaluation = dict(interval=1000, use_ema=True, pictures=dict(interval=1000, samples=[6, 20], history=6))
# With this start the average reaches back 52 iterations at first and 197 after 3000: far enough to smooth, not so far
# that the random weights still count.
custom_hooks = [dict(type="MEGVIIEMAHook", init_updates=8000, priority="NORMAL", interval=-1)]
