"""The published OpenOcc model and its pipelines, unchanged, on the built-in synthetic world: shows that it learns.

``python tools/create_synthetic.py --out data/synthetic`` makes the data, coarse labels and info files included. Its
images may have any size: the pipelines scale them to the width of the network image, and ``src_size`` only says what
nuScenes has. The random scale is added to that factor, so it changes images of 800 x 450 half as much as those of
1600 x 900.
"""
_base_ = "./stcocc-r50-16f-openocc-12e.py"

load_from = None
samples_per_gpu = 1

data_root = "data/synthetic/"
test_dataset = dict(data_root=data_root, ann_file=data_root + "stcocc-nuscenes_infos_val.pkl")
data = dict(
    samples_per_gpu=samples_per_gpu,
    train=dict(data_root=data_root, ann_file=data_root + "stcocc-nuscenes_infos_train.pkl"),
    val=test_dataset,
    test=test_dataset,
)

max_iters = 2000
lr_config = dict(policy="step", warmup="linear", warmup_iters=100, warmup_ratio=0.001, step=[max_iters])
runner = dict(type="IterBasedRunner", max_iters=max_iters)
checkpoint_config = dict(interval=500)
# Without a head start the average forgets the random initial weights soon enough for so few iterations.
custom_hooks = [dict(type="MEGVIIEMAHook", init_updates=0, priority="NORMAL", interval=500)]
