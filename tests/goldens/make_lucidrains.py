#!/usr/bin/env python3
"""Write lucidrains.npz: small random models of today's vit-pytorch, and what they compute.

Run it by hand where make_other_systems.py runs, whose weights and batches it draws, with a vit-pytorch from 1.26 on:

    python tests/goldens/make_lucidrains.py         # writes lucidrains.npz beside this file

The committed file was made with PyTorch 2.14.1 (CPU) and vit-pytorch 1.26.11. README.md lists the arrays.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from make_other_systems import CLASSES, DEPTH, DIM, HEADS, MLP, PATCH, randomised, torch_case
from vit_pytorch import SimpleViT, ViT

CASES = {"lucidrains_now": (ViT, {}), "lucidrains_mean": (ViT, {"pool": "mean"}), "simple_vit_now": (SimpleViT, {})}


def make() -> dict[str, np.ndarray]:
    """Return every array of the file, by its name there."""
    out: dict[str, np.ndarray] = {}
    for case, (kind, options) in CASES.items():
        model = randomised(
            kind(image_size=16, patch_size=PATCH, num_classes=CLASSES, dim=DIM, depth=DEPTH, heads=HEADS, mlp_dim=MLP,
                 dim_head=6, **options)
        )  # fmt: skip
        arrays = {f"array/{name}": a.float().numpy() for name, a in model.state_dict().items()}
        out |= {f"{case}/{name}": a for name, a in (arrays | torch_case(model, model, (16, 16))).items()}
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    path = Path(__file__).with_name("lucidrains.npz")
    np.savez_compressed(path, **make())
    sys.stdout.write(f"{path.name}: {path.stat().st_size:,} bytes, made with PyTorch {torch.__version__}\n")
