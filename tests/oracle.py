"""The multigrid cycles written out with dense matrices: an independent reference for the blocks.

Nothing of the library runs here: weights are read from the modules and each grouped convolution becomes a block-diagonal
matrix on flattened ``(C, H, W)`` features.
"""

import itertools

import numpy as np


def conv_matrix(weight, groups, size):
    """Return the matrix of a grouped convolution with odd kernel, stride 1 and zero padding."""
    out_channels, per_group = weight.shape[:2]
    in_channels = per_group * groups
    kernel = weight.shape[2:]
    pixels = list(itertools.product(*(range(n) for n in size)))
    place = {pixel: i for i, pixel in enumerate(pixels)}
    matrix = np.zeros((out_channels, len(pixels), in_channels, len(pixels)))
    for o in range(out_channels):
        first = o // (out_channels // groups) * per_group
        for i in range(per_group):
            for tap in itertools.product(*(range(k) for k in kernel)):
                for pixel in pixels:
                    source = tuple(p + t - k // 2 for p, t, k in zip(pixel, tap, kernel, strict=True))
                    if source in place:
                        matrix[o, place[pixel], first + i, place[source]] += weight[(o, i, *tap)]
    n = len(pixels)
    return matrix.reshape(out_channels * n, in_channels * n)


def norm_matrix(norm, pixels):
    """Return the diagonal of a batch norm in evaluation."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return np.diag(np.repeat(scale.detach().numpy(), pixels))


def block_matrix(block, groups, size):
    """Return the matrix of a residual block of two convolutions, its activations gone."""
    pixels = int(np.prod(size))
    K1 = conv_matrix(block.conv1.weight.detach().numpy(), groups, size)
    K2 = conv_matrix(block.conv2.weight.detach().numpy(), groups, size)
    identity = np.eye(K2.shape[0])
    if type(block).__name__.startswith("PreAct"):
        return identity + K2 @ norm_matrix(block.norm2, pixels) @ K1 @ norm_matrix(block.norm1, pixels)
    return identity + norm_matrix(block.norm2, pixels) @ K2 @ norm_matrix(block.norm1, pixels) @ K1


def cycle_matrix(block, size, multiplicative=True):
    """Return the matrix of an MGICBlock: Algorithm 1, or the additive cycle (5)-(8) of 2020, level by level."""
    pixels = int(np.prod(size))

    def level(j):
        relax = block_matrix(block.relax[j], block.levels[j].groups, size)
        if j == len(block.levels) - 1:
            return relax
        groups = block.levels[j].transfer_groups
        R = conv_matrix(block.restrict[j].weight.detach().numpy(), groups, size)
        P = conv_matrix(block.prolong[j].weight.detach().numpy(), groups, size)
        N = norm_matrix(block.norm[j], pixels)
        correction = N @ P @ (level(j + 1) @ R - R)
        identity = np.eye(relax.shape[0])
        return relax @ (identity + correction) if multiplicative else relax + correction

    return level(0)
