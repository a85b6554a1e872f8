"""A tiny STCOcc that a CPU can train: the same modules, 64 x 176 images, 40 x 40 x 8 voxels of 2 m x 2 m x 0.8 m.

For tests and for the built-in synthetic world, which ``python tools/create_synthetic.py --out data/synthetic`` makes;
its scores say nothing about nuScenes. The labels are those of the files, coarsened while they are loaded.
"""
_base_ = ["../_base_/datasets/nus-3d.py", "../_base_/datasets/occupancy_steps.py", "../_base_/default_runtime.py",
          "../_base_/schedule.py", "../_base_/stcocc_r50.py"]

dataset_name = "openocc"
num_classes = 17
foreground_idx = [0, 1, 2, 3, 4, 5, 6, 7]
load_from = None

# A whole data_config of its own: a value of a base file would be the one before this file changes it.
data_config = dict(
    cams=["CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT"],
    Ncams=6,
    input_size=(64, 176),
    src_size=(450, 800),
    resize=(-0.02, 0.04),
    rot=(-5.4, 5.4),
    flip=True,
    crop_h=(0.0, 0.0),
    resize_test=0.0,
)
input_size = (64, 176)
# Those of the published config: without them the cross entropy hides the losses that care for rare classes.
class_weights = [0.0682, 0.0823, 0.0671, 0.0594, 0.0732, 0.0806, 0.0680, 0.0762, 0.0675, 0.0633, 0.0521,
                 0.0644, 0.0557, 0.0551, 0.0535, 0.0533, 0.0464]
# Finest stage; labels are twice as fine: 40 x 40 x 8, blocks of 5 x 5 x 2 voxels of the files.
coarsen = (5, 5, 2)
grid_config = dict(x=[-40, 40, 4.0], y=[-40, 40, 4.0], z=[-1, 5.4, 1.6], depth=[1.0, 45.0, 2.0])
bev_h, bev_w, bev_z = 20, 20, 4
channels, context_channels = 16, 8
top_k = [240, 30]  # finest stage first
attention = dict(embed_dims=channels, num_levels=1, num_points=bev_z, dropout=0.0)
temporal_attention = dict(type="OA_TemporalAttention", **attention)
spatial_attention = dict(type="OA_SpatialCrossAttention", embed_dims=channels, dbound=grid_config["depth"], dropout=0.0,
                         deformable_attention=dict(type="OA_MSDeformableAttention3D", **attention))

model = dict(
    num_stage=2,
    bev_h=bev_h,
    bev_w=bev_w,
    bev_z=bev_z,
    history_frame_num=[4, 2],
    backward_num_layer=[2, 2],
    intermediate_pred_loss_weight=[1.0, 0.5, 0.25],
    empty_idx=num_classes - 1,
    class_weights=class_weights,
    foreground_idx=foreground_idx,
    train_top_k=top_k,
    val_top_k=top_k,
    forward_projection=dict(
        adjust_channel=channels,
        img_backbone=dict(_delete_=True, type="ResNet", depth=18, base_channels=16, num_stages=4,
                          out_indices=(0, 2, 3), norm_cfg=dict(type="BN", requires_grad=True), norm_eval=False,
                          with_cp=False, style="pytorch"),
        img_neck=dict(in_channels=[64, 128], out_channels=32),
        img_view_transformer=dict(
            grid_config=grid_config,
            input_size=input_size,
            in_channels=32,
            out_channels=context_channels,
            depthnet_cfg=dict(aspp_mid_channels=16),
        ),
        img_bev_encoder_backbone=dict(
            numC_input=2 * context_channels,
            num_layer=[1, 1],
            num_channels=[channels, 32],
            stride=[1, 2],
            backbone_output_ids=[0, 1],
            adjust_number_channel=channels,
        ),
    ),
    backward_projection=dict(
        bev_h=bev_h,
        bev_w=bev_w,
        bev_z=bev_z,
        transformer=dict(
            embed_dims=channels,
            encoder=dict(
                grid_config=grid_config,
                data_config=dict(input_size=input_size),
                predictor_in_channels=channels,
                predictor_out_channels=channels,
                predictor_num_calsses=num_classes,
                transformerlayers=dict(
                    attn_cfgs=[temporal_attention, spatial_attention], conv_cfgs=dict(embed_dims=channels)),
            ),
        ),
        positional_encoding=dict(num_feats=channels // 2, row_num_embed=bev_h, col_num_embed=bev_w),
    ),
    temporal_fusion=dict(single_bev_num_channels=channels, num_classes=num_classes, occ_embedims=8),
    occupancy_head=dict(in_channels=channels, out_channels=channels, num_classes=num_classes),
    flow_head=dict(type="OccFlowHead", in_channels=channels, out_channels=channels, num_classes=num_classes,
                   foreground_idx=foreground_idx),
)

load_images = dict(type="PrepareImageInputs", is_train=True, data_config=data_config, sequential=True, ship_uint8=True)
after_images = [
    dict(type="LoadOccGTFromFileOpenOcc", scale_1_2=True, scale_1_4=True, compute_scales=True, coarsen=coarsen),
    dict(type="BEVAug", bda_aug_conf={{_base_.bda_aug_conf}}, classes={{_base_.class_names}}, is_train=True),
    {{_base_.load_points}},
    dict(type="PointToMultiViewDepth", downsample=1, grid_config=grid_config),
    dict(type="DefaultFormatBundle3D", class_names={{_base_.class_names}}),
    dict(type="Collect3D", keys=["img_inputs", "gt_depth", "voxel_semantics", "voxel_semantics_1_2",
                                 "voxel_semantics_1_4", "voxel_flows"]),
]
train_pipeline = [load_images, *after_images]
test_pipeline = [
    dict(type="PrepareImageInputs", is_train=False, data_config=data_config, sequential=True, ship_uint8=True),
    dict(type="BEVAug", bda_aug_conf={{_base_.bda_aug_conf}}, classes={{_base_.class_names}}, is_train=False),
    dict(type="MultiScaleFlipAug3D", img_scale=(1333, 800), pts_scale_ratio=1, flip=False, transforms=[
        dict(type="DefaultFormatBundle3D", class_names={{_base_.class_names}}, with_label=False),
        dict(type="Collect3D", keys=["img_inputs"]),
    ]),
]

data_root = "data/synthetic/"
shared = dict(data_root=data_root, dataset_name=dataset_name, label_options=dict(coarsen=coarsen))
test_dataset = dict(ann_file=data_root + "stcocc-nuscenes_infos_val.pkl", pipeline=test_pipeline, **shared)
data = dict(
    samples_per_gpu=1,
    workers_per_gpu=2,
    test_dataloader=dict(runner_type="IterBasedRunnerEval"),
    train=dict(ann_file=data_root + "stcocc-nuscenes_infos_train.pkl", pipeline=train_pipeline, **shared),
    val=test_dataset,
    test=test_dataset,
)

max_iters = 1800  # 5 to 6 minutes on two CPU cores
optimizer = dict(lr=2e-3)
lr_config = dict(policy="step", warmup="linear", warmup_iters=20, warmup_ratio=0.001, step=[max_iters * 4 // 5])
runner = dict(type="IterBasedRunner", max_iters=max_iters)
checkpoint_config = dict(interval=300, max_keep_ckpts=2)
