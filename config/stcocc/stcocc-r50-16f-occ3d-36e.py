"""STCOcc, ResNet-50, 256 x 704, 16 frames, Occ3D: semantic occupancy.

Published result: RayIoU 41.7 (nuScenes validation set, trained without camera mask).
"""
_base_ = ["../_base_/datasets/nus-3d.py", "../_base_/datasets/occupancy_steps.py", "../_base_/default_runtime.py",
          "../_base_/schedule.py", "../_base_/stcocc_r50.py"]

num_gpus = 8
samples_per_gpu = 2

dataset_name = "occ3d"
num_classes = 18
# Focal loss weight of others, barrier, bicycle, bus, car, construction_vehicle, motorcycle, pedestrian,
# traffic_cone, trailer, truck, driveable_surface, other_flat, sidewalk, terrain, manmade, vegetation, free.
class_weights = [0.0727, 0.0692, 0.0838, 0.0681, 0.0601, 0.0741, 0.0823, 0.0688, 0.0773, 0.0681, 0.0641,
                 0.0527, 0.0655, 0.0563, 0.0558, 0.0541, 0.0538, 0.0468]
top_k = [12500, 2500, 500]  # finest stage first

model = dict(
    empty_idx=num_classes - 1,
    class_weights=class_weights,
    train_top_k=top_k,
    val_top_k=top_k,
    backward_projection=dict(transformer=dict(encoder=dict(predictor_num_calsses=num_classes))),
    temporal_fusion=dict(num_classes=num_classes),
    occupancy_head=dict(num_classes=num_classes),
)

train_pipeline = [
    dict(type="PrepareImageInputs", is_train=True, data_config={{_base_.data_config}},
         sequential=True, ship_uint8=True),
    dict(type="LoadAnnotations"),
    dict(type="LoadOccGTFromFileCVPR2023", scale_1_2=True, scale_1_4=True, scale_1_8=True),
    dict(type="BEVAug", bda_aug_conf={{_base_.bda_aug_conf}}, classes={{_base_.class_names}}, is_train=True),
    {{_base_.load_points}},
    dict(type="PointToMultiViewDepth", downsample=1, grid_config={{_base_.grid_config}}),
    dict(type="DefaultFormatBundle3D", class_names={{_base_.class_names}}),
    dict(type="Collect3D", keys=["img_inputs", "gt_depth", "voxel_semantics", "voxel_semantics_1_2",
                                 "voxel_semantics_1_4", "voxel_semantics_1_8"]),
]
test_pipeline = [
    dict(type="PrepareImageInputs", is_train=False, data_config={{_base_.data_config}},
         sequential=True, ship_uint8=True),
    dict(type="LoadAnnotations"),
    dict(type="BEVAug", bda_aug_conf={{_base_.bda_aug_conf}}, classes={{_base_.class_names}}, is_train=False),
    {{_base_.load_points}},
    dict(type="MultiScaleFlipAug3D", img_scale=(1333, 800), pts_scale_ratio=1, flip=False, transforms=[
        dict(type="DefaultFormatBundle3D", class_names={{_base_.class_names}}, with_label=False),
        dict(type="Collect3D", keys=["points", "img_inputs"]),
    ]),
]

test_dataset = dict(pipeline=test_pipeline, dataset_name=dataset_name)
data = dict(
    samples_per_gpu=samples_per_gpu,
    workers_per_gpu=4,
    test_dataloader=dict(runner_type="IterBasedRunnerEval"),
    train=dict(pipeline=train_pipeline, dataset_name=dataset_name),
    val=test_dataset,
    test=test_dataset,
)

num_iters_per_epoch = int(28130 // (num_gpus * samples_per_gpu))
total_epoch = 36
lr_config = dict(policy="step", warmup="linear", warmup_iters=200, warmup_ratio=0.001,
                 step=[num_iters_per_epoch * total_epoch])
runner = dict(type="IterBasedRunner", max_iters=num_iters_per_epoch * total_epoch)
checkpoint_config = dict(interval=num_iters_per_epoch)
custom_hooks = [dict(type="MEGVIIEMAHook", init_updates=10560, priority="NORMAL", interval=2 * num_iters_per_epoch)]
