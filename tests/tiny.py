"""A data set and a network that train in milliseconds, shared by the tests of training."""

import torch
from torch import nn

from mgic.data import Data, Images, classification
from mgic.training import Recipe

STEPS_PER_EPOCH = 8
RECIPE = Recipe(
    model="tiny",
    data="stripes",
    epochs=4,
    batch_size=8,
    lr=0.1,
    schedule="onecycle",
    ema_decay=0.9,
    crop_padding=1,
    flip=True,
    checkpoint_every=3,
    keep_checkpoints=3,
)


def stripes(train: int = 67, test: int = 20) -> Data:
    """8x8 images of 3 classes; 67 training images leave 3 that do not fill a batch."""
    generator = torch.Generator().manual_seed(7)

    def images(count: int) -> Images:
        labels = torch.arange(count) % 3
        noise = torch.randint(0, 100, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
        phase = torch.arange(8)[None] % (labels[:, None] + 2) == 0
        return Images(noise + 100 * phase[:, None, None, :].to(torch.uint8), labels)

    return Data("stripes", images(train), images(test), classification(3), (1, 8, 8), "made up", (0.3,), (0.2,))


def tiny() -> nn.Module:
    """Batch statistics, random dropout and two kinds of weights: all that a resumed run can get wrong."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 3),
    )
