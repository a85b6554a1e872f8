"""STCOcc with ResNet-50: the model of both data sets, without what depends on the classes.

A config that uses it sets ``num_classes`` in four places of ``model`` (occupancy_head, flow_head, temporal_fusion and
``predictor_num_calsses`` of the encoder), ``empty_idx``, ``class_weights`` and the ``top_k`` lists.
"""
data_config = dict(
    cams=["CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT"],
    Ncams=6,
    input_size=(256, 704),  # (H, W) of the network image
    src_size=(900, 1600),
    resize=(-0.06, 0.11),
    rot=(-5.4, 5.4),  # degrees
    flip=True,
    crop_h=(0.0, 0.0),
    resize_test=0.00,
)
point_cloud_range = [-40.0, -40.0, -1.0, 40.0, 40.0, 5.4]  # metres, ego frame
grid_config = dict(x=[-40, 40, 0.8], y=[-40, 40, 0.8], z=[-1, 5.4, 0.8], depth=[1.0, 45.0, 0.5])  # finest stage

bev_h, bev_w, bev_z = 100, 100, 8
context_channels = 80
channels = 96
history_frame_num = [16, 8, 4]  # finest stage first
attention = dict(embed_dims=channels, num_levels=1, num_points=bev_z)
temporal_attention = dict(type="OA_TemporalAttention", dropout=0.0, **attention)
spatial_attention = dict(
    type="OA_SpatialCrossAttention",
    embed_dims=channels,
    pc_range=point_cloud_range,
    dbound=grid_config["depth"],
    dropout=0.0,
    deformable_attention=dict(type="OA_MSDeformableAttention3D", **attention),
)

model = dict(
    type="STCOcc",
    num_stage=3,
    bev_w=bev_w,
    bev_h=bev_h,
    bev_z=bev_z,
    history_frame_num=history_frame_num,
    backward_num_layer=[2, 2, 2],  # coarsest stage first
    intermediate_pred_loss_weight=[1.0, 0.5, 0.25, 0.125],
    forward_projection=dict(
        type="BEVDetStereoForwardProjection",
        align_after_view_transfromation=False,
        return_intermediate=True,
        num_adj=1,
        adjust_channel=channels,
        img_backbone=dict(
            type="ResNet",
            depth=50,
            num_stages=4,
            out_indices=(0, 2, 3),
            frozen_stages=-1,
            norm_cfg=dict(type="BN", requires_grad=True),
            norm_eval=False,
            with_cp=True,
            style="pytorch",
        ),
        img_neck=dict(
            type="CustomFPN", in_channels=[1024, 2048], out_channels=256, num_outs=1, start_level=0, out_ids=[0]),
        img_view_transformer=dict(
            type="LSSVStereoForwardPorjection",
            grid_config=grid_config,
            input_size=data_config["input_size"],
            in_channels=256,
            out_channels=context_channels,
            downsample=16,
            cv_downsample=4,
            collapse_z=False,
            loss_depth_weight=0.5,
            depthnet_cfg=dict(use_dcn=False, aspp_mid_channels=96, stereo=True, bias=5.0),
        ),
        img_bev_encoder_backbone=dict(
            type="CustomResNet3D",
            numC_input=2 * context_channels,
            num_layer=[1, 2, 4],
            num_channels=[96, 160, 320],
            stride=[1, 2, 2],
            backbone_output_ids=[0, 1, 2],
            adjust_number_channel=channels,
            with_cp=False,
        ),
    ),
    # The finest stage; each coarser one has half its sizes.
    backward_projection=dict(
        type="BEVFormerBackwardProjection",
        bev_h=bev_h,
        bev_w=bev_w,
        bev_z=bev_z,
        pc_range=point_cloud_range,
        transformer=dict(
            type="BEVFormer",
            use_cams_embeds=False,
            embed_dims=channels,
            encoder=dict(
                type="BEVFormerEncoder",
                num_layers=2,
                pc_range=point_cloud_range,
                grid_config=grid_config,
                data_config=data_config,
                predictor_in_channels=channels,
                predictor_out_channels=channels,
                use_temporal=True,
                return_intermediate=False,
                transformerlayers=dict(
                    type="BEVFormerEncoderLayer",
                    attn_cfgs=[temporal_attention, spatial_attention],
                    conv_cfgs=dict(embed_dims=channels),
                    operation_order=("predictor", "self_attn", "norm", "cross_attn", "norm", "conv"),
                ),
            ),
        ),
        positional_encoding=dict(
            type="CustormLearnedPositionalEncoding",
            num_feats=channels // 2,
            row_num_embed=bev_h,
            col_num_embed=bev_w,
        ),
    ),
    temporal_fusion=dict(type="SparseFusion", single_bev_num_channels=channels),
    occupancy_head=dict(type="OccHead", in_channels=channels, out_channels=channels),
)
