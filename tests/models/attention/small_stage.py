"""A backward projection of one small stage, and inputs for it."""

import torch

import mmdet3d.models.attention  # noqa: F401  (registers the modules)
from mmdet3d.models.attention.backward_projection import height_mean
from mmdet3d.registry import build

X, Y, Z, CLASSES, CHANNELS, CAMS, BATCH, BINS, FEATURE = 6, 4, 2, 3, 8, 2, 2, 5, (2, 3)
QUERIES = X * Y
RANGE = [-6.0, -8.0, -1.0, 6.0, 8.0, 3.0]
GRID = {"x": [-6, 6, 2.0], "y": [-8, 8, 4.0], "z": [-1, 3, 2.0], "depth": [1.0, 6.0, 1.0]}


def config(encoder=(), **options):
    attention = {"embed_dims": CHANNELS, "num_heads": 2, "num_levels": 1, "num_points": Z, "dropout": 0.0}
    layer = {"type": "BEVFormerEncoderLayer", "conv_cfgs": {"embed_dims": CHANNELS}, "attn_cfgs": [
        {"type": "OA_TemporalAttention", **attention},
        {"type": "OA_SpatialCrossAttention", "embed_dims": CHANNELS, "num_cams": CAMS, "dbound": GRID["depth"],
         "dropout": 0.0, "deformable_attention": {"type": "OA_MSDeformableAttention3D", **attention}}]}
    encoder = {"type": "BEVFormerEncoder", "transformerlayers": layer, "num_layers": 2, "pc_range": RANGE,
               "grid_config": GRID, "data_config": {"input_size": (32, 48)}, "num_cam": CAMS,
               "predictor_in_channels": CHANNELS, "predictor_out_channels": 5, "predictor_num_calsses": CLASSES,
               **dict(encoder)}
    return {"type": "BEVFormerBackwardProjection", "bev_h": Y, "bev_w": X, "pc_range": RANGE,
            "transformer": {"type": "BEVFormer", "encoder": encoder, "embed_dims": CHANNELS, "num_cams": CAMS,
                            "use_cams_embeds": False},
            "positional_encoding": {"type": "CustormLearnedPositionalEncoding", "num_feats": CHANNELS // 2,
                                    "row_num_embed": Y, "col_num_embed": X}, **options}


def make(encoder=(), **options):
    """In evaluation mode, with weights that are the same for all options and that make every input count."""
    module = build(config(encoder, **options)).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not name.endswith("recurrence_weights"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return module


def inputs(seed=0, coarse=True, previous=True):
    """Arguments of :func:`call` beside the module."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    image_from_ego = torch.zeros(BATCH, CAMS, 4, 4)
    for n in range(CAMS):  # looking ahead and behind
        sign = 1 - 2 * n
        image_from_ego[:, n] = torch.tensor([[24.0 * sign, -20 * sign, 0, 5], [16.0 * sign, 0, -20, 30],
                                             [1.0 * sign, 0, 0, 1], [0, 0, 0, 1]])
    return {"volume": normal(BATCH, CHANNELS, Z, Y, X), "context": normal(BATCH, CAMS, CHANNELS, *FEATURE),
            "depth": normal(BATCH, CAMS, BINS, *FEATURE).softmax(2),
            "coarse_logits": normal(BATCH, X // 2, Y // 2, Z // 2, CLASSES) if coarse else None,
            "previous_volume": normal(BATCH, CHANNELS, Z, Y, X) if previous else None,
            "previous_flips": torch.zeros(BATCH, 2, dtype=torch.bool),
            "bda": torch.eye(4).expand(BATCH, 4, 4), "starts": torch.tensor([False, True]),
            "shift": torch.tensor([[0.06, -0.08], [0, 0]]), "image_from_augmented": image_from_ego}


def call(module, volume, previous_volume, previous_flips, bda, shift, image_from_augmented, starts, **arguments):
    """The module on :func:`inputs`."""
    setup = module.setup(previous_volume, previous_flips, bda, shift, image_from_augmented)
    return module(height_mean(volume), starts=starts, setup=setup, **arguments)


def flips(x, y):
    return torch.diag(torch.tensor([x, y, 1.0, 1.0]))
