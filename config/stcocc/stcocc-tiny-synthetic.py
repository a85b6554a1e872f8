"""A tiny STCOcc that a CPU can train: the same modules, 64 x 176 images, 40 x 40 x 8 voxels of 2 m x 2 m x 0.8 m.

For tests and for the built-in synthetic world; its scores say nothing about nuScenes.
"""
_base_ = ["../_base_/datasets/nus-3d.py", "../_base_/datasets/occupancy_steps.py", "../_base_/default_runtime.py",
          "../_base_/schedule.py", "../_base_/stcocc_r50.py"]

dataset_name = "openocc"
num_classes = 17
foreground_idx = [0, 1, 2, 3, 4, 5, 6, 7]
load_from = None

data_config = dict(input_size=(64, 176), resize=(-0.02, 0.04))
input_size = (64, 176)
# Finest stage; labels are twice as fine: 40 x 40 x 8.
grid_config = dict(x=[-40, 40, 4.0], y=[-40, 40, 4.0], z=[-1, 5.4, 1.6], depth=[1.0, 45.0, 2.0])
bev_h, bev_w, bev_z = 20, 20, 4
channels, context_channels = 16, 8
top_k = [240, 30]  # finest stage first
attention = dict(embed_dims=channels, num_levels=1, num_points=bev_z, dropout=0.0)

model = dict(
    num_stage=2,
    bev_h=bev_h,
    bev_w=bev_w,
    bev_z=bev_z,
    history_frame_num=[4, 2],
    backward_num_layer=[2, 2],
    intermediate_pred_loss_weight=[1.0, 0.5, 0.25],
    empty_idx=num_classes - 1,
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
                    attn_cfgs=[
                        dict(type="OA_TemporalAttention", **attention),
                        dict(type="OA_SpatialCrossAttention", embed_dims=channels, dbound=grid_config["depth"],
                             dropout=0.0, deformable_attention=dict(type="OA_MSDeformableAttention3D", **attention)),
                    ],
                    conv_cfgs=dict(embed_dims=channels),
                ),
            ),
        ),
        positional_encoding=dict(num_feats=channels // 2, row_num_embed=bev_h, col_num_embed=bev_w),
    ),
    temporal_fusion=dict(single_bev_num_channels=channels, num_classes=num_classes, occ_embedims=8),
    occupancy_head=dict(in_channels=channels, out_channels=channels, num_classes=num_classes),
    flow_head=dict(type="OccFlowHead", in_channels=channels, out_channels=channels, num_classes=num_classes,
                   foreground_idx=foreground_idx),
)
lr_config = dict(policy="step", warmup="linear", warmup_iters=20, warmup_ratio=0.001, step=[400])
runner = dict(type="IterBasedRunner", max_iters=400)
checkpoint_config = dict(interval=100)
