"""nuScenes with six cameras and occupancy labels; the model configs add the pipelines."""
data_root = "data/nuscenes/"
dataset = dict(
    type="NuScenesDatasetOccpancy",
    data_root=data_root,
    classes=["car", "truck", "construction_vehicle", "bus", "trailer", "barrier", "motorcycle", "bicycle", "pedestrian",
             "traffic_cone"],
    modality=dict(use_lidar=False, use_camera=True, use_radar=False, use_map=False, use_external=False),
    box_type_3d="LiDAR",
    filter_empty_gt=False,
    stereo=True,
    img_info_prototype="bevdet4d",
    multi_adj_frame_id_cfg=(1, 2, 1),
    use_sequence_group_flag=True,
    use_valid_flag=True,
    eval_metric="rayiou",
)
val_dataset = dict(
    ann_file=data_root + "stcocc-nuscenes_infos_val.pkl", test_mode=True, sequences_split_num=1, **dataset)
data = dict(
    train=dict(
        ann_file=data_root + "stcocc-nuscenes_infos_train.pkl", test_mode=False, sequences_split_num=2, **dataset),
    val=val_dataset,
    test=val_dataset,
)
