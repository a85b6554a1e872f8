"""STCOcc, ResNet-50, 256 x 704, 16 frames, OpenOcc: semantic occupancy and flow.

Published result: RayIoU 40.8, mAVE 0.44, occupancy score 42.3 (nuScenes validation set).
"""
_base_ = ["../_base_/datasets/nus-3d.py", "../_base_/datasets/occupancy_steps.py", "../_base_/default_runtime.py",
          "../_base_/schedule.py", "../_base_/stcocc_r50.py"]

num_gpus = 8
samples_per_gpu = 2

dataset_name = "openocc"
num_classes = 17
foreground_idx = [0, 1, 2, 3, 4, 5, 6, 7]
# Focal loss weight of car, truck, trailer, bus, construction_vehicle, bicycle, motorcycle, pedestrian, traffic_cone,
# barrier, driveable_surface, other_flat, sidewalk, terrain, manmade, vegetation, free.
class_weights = [0.0682, 0.0823, 0.0671, 0.0594, 0.0732, 0.0806, 0.0680, 0.0762, 0.0675, 0.0633, 0.0521,
                 0.0644, 0.0557, 0.0551, 0.0535, 0.0533, 0.0464]
top_k = [12000, 2400, 450]  # finest stage first

model = dict(
    empty_idx=num_classes - 1,
    class_weights=class_weights,
    foreground_idx=foreground_idx,
    train_top_k=top_k,
    val_top_k=top_k,
    backward_projection=dict(transformer=dict(encoder=dict(predictor_num_calsses=num_classes))),
    temporal_fusion=dict(num_classes=num_classes),
    occupancy_head=dict(num_classes=num_classes),
    flow_head=dict(
        type="OccFlowHead",
        in_channels={{_base_.channels}},
        out_channels={{_base_.channels}},
        num_classes=num_classes,
        foreground_idx=foreground_idx,
    ),
)

train_pipeline = [
    dict(type="PrepareImageInputs", is_train=True, data_config={{_base_.data_config}},
         sequential=True, ship_uint8=True),
    dict(type="LoadAnnotations"),
    dict(type="LoadOccGTFromFileOpenOcc", scale_1_2=True, scale_1_4=True, scale_1_8=True),
    dict(type="BEVAug", bda_aug_conf={{_base_.bda_aug_conf}}, classes={{_base_.class_names}}, is_train=True),
    {{_base_.load_points}},
    dict(type="PointToMultiViewDepth", downsample=1, grid_config={{_base_.grid_config}}),
    dict(type="DefaultFormatBundle3D", class_names={{_base_.class_names}}),
    dict(type="Collect3D", keys=["img_inputs", "gt_depth", "voxel_semantics", "voxel_semantics_1_2",
                                 "voxel_semantics_1_4", "voxel_semantics_1_8", "voxel_flows"]),
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

# The published "12e" schedule: 12 x 4.554 passes over the training set.
num_iters_per_epoch = int(28130 // (num_gpus * samples_per_gpu) * 4.554)
total_epoch = 12
lr_config = dict(policy="step", warmup="linear", warmup_iters=200, warmup_ratio=0.001,
                 step=[num_iters_per_epoch * total_epoch])
runner = dict(type="IterBasedRunner", max_iters=num_iters_per_epoch * total_epoch)
checkpoint_config = dict(interval=num_iters_per_epoch)
custom_hooks = [dict(type="MEGVIIEMAHook", init_updates=10560, priority="NORMAL", interval=2 * num_iters_per_epoch)]
