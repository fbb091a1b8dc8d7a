#!/usr/bin/env python3
"""Write resnet.npz: what timm's ResNetV2, the one in its hybrids, gives for weights and images made by a formula.

Run it in an environment with PyTorch, timm and NumPy (minivit is not needed):

    python tests/goldens/make_resnet.py            # writes resnet.npz beside this file

The committed file was made with PyTorch 2.13.0 (CPU) and timm 1.0.31, in float64. README.md lists the arrays.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from timm.layers import StdConv2dSame
from timm.models.resnetv2 import ResNetV2


def wave(shape: tuple[int, ...], number: int) -> np.ndarray:
    """Return numbers that look random enough: 1.0 to begin with where there is one axis, a norm's weight or bias."""
    n = np.arange(np.prod(shape, dtype=int), dtype=np.float64)
    return (np.sin(n * n * 0.37 + 1.3 * number) + (len(shape) == 1)).reshape(shape)


def main(path: Path) -> None:
    """Compute the features of two images, and each parameter's gradient along a direction."""
    model = ResNetV2(
        layers=(1, 1), channels=(128, 256), num_classes=0, global_pool="", in_chans=2, preact=False, stem_type="same",
        stem_chs=32, conv_layer=partial(StdConv2dSame, eps=1e-8),
    ).double()  # fmt: skip
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for i, p in enumerate(parameters.values()):
            p.copy_(torch.from_numpy(wave(tuple(p.shape), i)))
    images = torch.from_numpy(wave((2, 2, 21, 30), 100)).requires_grad_()
    features = model(images)
    cotangent = wave(tuple(features.shape), 200)
    features.backward(torch.from_numpy(cotangent))
    along = [float((p.grad.numpy() * wave(tuple(p.shape), 300)).sum()) for p in parameters.values()]
    np.savez_compressed(
        path, features=features.detach().numpy(), image_gradient=images.grad.numpy(),
        names=np.array(list(parameters)), along=np.array(along),
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("resnet.npz"))
