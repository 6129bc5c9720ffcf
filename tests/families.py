"""Every registered network in a small version of the same structure, and what it is fed."""

import fnmatch

import torch

import mgic

SMALL = {
    "*resnet20": {"depth": 8},
    "*resnet32": {"depth": 8},
    "*resnet44": {"depth": 8},
    "*resnet56": {"depth": 8},
    "*resnet110": {"depth": 8},
    "mgic_resnet18": {"repeats": (1, 1, 1, 1), "width": 0.25, "group_size": 8, "coarsest": 32},
    "mgic_resnet34": {"repeats": (1, 1, 2, 1), "width": 0.25, "group_size": 8, "coarsest": 32},
    "mgic_resnet50": {"repeats": (1, 1, 1, 1), "width": 0.25, "group_size": 8, "coarsest": 32},
    "mgic_resnet101": {"repeats": (1, 1, 2, 1), "width": 0.25, "group_size": 8, "coarsest": 32},
    "mgic_wide_resnet50_2": {"repeats": (1, 1, 1, 1), "width": 0.25, "group_size": 8, "coarsest": 32},
    "mgic_mobilenetv3_*": {"width": 0.35, "group_size": 8, "coarsest": 32},
    "mg_resnet_cifar": {"repeats": (1, 1, 1, 1), "group_size": 8},
    "mg_resnet34": {"channels": (16, 32, 64, 128), "repeats": (1, 1, 1, 1), "group_size": 8, "coarsest": 16},
    "mg_mobilenetv2": {"width": 0.35, "group_size": 8, "coarsest": 64},
    "mg*18": {"channels": (8, 16, 32, 32)},
    "mgiad18": {"channels": (8, 16, 32, 32), "coarsest": 8, "group_size": 4},
    "unet": {"width": 4, "depth": 3},
    "mgic_unet": {"width": 8, "depth": 3, "group_size": 2, "coarsest": 4},
    "mgic_diffgcn": {"width": 0.25, "group_size": 4, "coarsest": 4},
    "d*gcn*": {"width": 0.25},
    "*function_net": {"c_max": 32},
}
"""The first pattern that matches gives a network's small version; a network that none matches is tested as it is."""

POINTS = ("dgcnn", "diffgcn", "mgic_diffgcn")
FUNCTIONS = ("function_net", "ghost_function_net", "mgic_function_net")
SEGMENTATION = (
    *("lraspp_mobilenetv3_small", "lraspp_mobilenetv3_large", "mgic_lraspp_small", "mgic_lraspp_large"),
    *("unet", "mgic_unet"),
)
FAMILIES = (
    *("resnet20", "mgic_resnet20", "mgic_resnet50", "mgic_mobilenetv3_100"),
    *("mg_resnet_cifar", "mgnet18", "mgiad18"),
    *("mgic_lraspp_small", "mgic_unet", "dgcnn", "mgic_diffgcn", "mgic_function_net"),
)
"""One of each kind: what `make test` tries; `make faults` tries all."""


def small(name, **overrides):
    size = next((size for pattern, size in SMALL.items() if fnmatch.fnmatch(name, pattern)), {})
    return mgic.create_model(name, **{**size, **overrides})


def inputs(name, batch=2, size=(32, 32), in_chans=None):
    """Random samples; of a cloud the first number of ``size`` counts the points, points of functions have none."""
    if name in FUNCTIONS:
        return torch.randn(batch, in_chans or 5)
    return torch.randn(batch, in_chans or 3, *(size[:1] if name in POINTS else size))


def logits(output):
    """The tensor of a network's output."""
    return output["out"] if isinstance(output, dict) else output
