"""Pipeline steps that the occupancy configs share."""
# Only flips: the labels follow flips, but no rotation or scale.
bda_aug_conf = dict(rot_lim=(-0.0, 0.0), scale_lim=(1.0, 1.0), flip_dx_ratio=0.5, flip_dy_ratio=0.5)
class_names = ["car", "truck", "construction_vehicle", "bus", "trailer", "barrier", "motorcycle", "bicycle",
               "pedestrian", "traffic_cone"]
load_points = dict(type="LoadPointsFromFile", coord_type="LIDAR", load_dim=5, use_dim=3,
                   file_client_args=dict(backend="disk"))
