#!/usr/bin/env python3
"""Write options_timm.npz: small models of timm's with its options, for minivit's tests to agree with.

Run it by hand in an environment with timm, PyTorch and NumPy (minivit is not needed):

    python tests/goldens/make_options.py            # writes options_timm.npz beside this file

The committed file was made with timm 1.0.31 and PyTorch 2.14.1 (CPU). README.md lists the arrays.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.layers import RmsNorm, SwiGLUPacked
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock, VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

SIZES = {
    "img_size": (12, 8), "patch_size": 4, "in_chans": 2, "num_classes": 3, "embed_dim": 8, "depth": 2, "num_heads": 2,
}  # fmt: skip
RELATIVE = SIZES | {"mlp_ratio": 1.5, "class_token": True, "global_pool": "token", "init_values": None,
                    "fc_norm": False, "rel_pos_type": "bias"}  # fmt: skip
vit = partial(VisionTransformer, **SIZES, mlp_ratio=1.5)
MODELS = {
    "layer_scale": lambda: vit(init_values=0.1),
    "qk_norm": lambda: vit(qk_norm=True),
    "registers": lambda: vit(reg_tokens=2),
    "registers_apart": lambda: vit(reg_tokens=2, no_embed_class=True),
    "avg": lambda: vit(global_pool="avg"),
    "avg_norm_first": lambda: vit(global_pool="avg", fc_norm=False, class_token=False),
    "map": lambda: vit(global_pool="map", class_token=False),
    "distilled": lambda: VisionTransformerDistilled(**SIZES, mlp_ratio=1.5),
    "swiglu": lambda: vit(mlp_layer=SwiGLUPacked, act_layer=nn.SiLU),
    "rms": lambda: vit(norm_layer=partial(RmsNorm, eps=1e-6), qk_norm=True),
    "res_post": lambda: vit(block_fn=ResPostBlock),
    "parallel": lambda: vit(block_fn=ParallelScalingBlock, init_values=0.1),
    "relative": lambda: VisionTransformerRelPos(**RELATIVE),
    "relative_shared": lambda: VisionTransformerRelPos(**RELATIVE, shared_rel_pos=True),
}


def random_weights(model: nn.Module, seed: int) -> None:
    """Draw weights where nothing is neutral: no norm weight is 1, no bias 0, so that leaving one out shows."""
    rng = np.random.default_rng(seed)
    for name, p in model.named_parameters():
        draw = rng.standard_normal(p.shape) * (0.3 if p.ndim < 2 else 0.5)
        p.data = torch.from_numpy(draw.astype(np.float32) + ("norm" in name and name.endswith("weight"))).double()


def renamed(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the weights of timm's parallel blocks, which are in one matrix, apart: as those of its other blocks."""
    found = {}
    for name, value in weights.items():
        block, _, part = name.rpartition(".in_proj.")
        if block:  # the MLP's rows, and then those of queries, keys and values
            found[f"{block}.mlp.fc1.{part}"], found[f"{block}.attn.qkv.{part}"] = value[:-24], value[-24:]
            continue
        for old, new in {
            ".in_norm.": ".norm1.",
            ".attn_out_proj.": ".attn.proj.",
            ".mlp_out_proj.": ".mlp.fc2.",
        }.items():
            name = name.replace(old, new)
        if name.endswith(".ls.gamma"):  # of the sum: of either part
            found[name.replace(".ls.", ".ls1.")] = found[name.replace(".ls.", ".ls2.")] = value
            continue
        found[name] = value
    return found


def make() -> dict[str, np.ndarray]:
    """Return every array of the file, by its name there."""
    out: dict[str, np.ndarray] = {}
    for number, (case, build) in enumerate(MODELS.items()):
        torch.manual_seed(0)
        model = build().double().eval()
        random_weights(model, 100 + number)
        rng = np.random.default_rng(number)
        images = rng.standard_normal((3, SIZES["in_chans"], *SIZES["img_size"])).astype(np.float32)
        labels = rng.integers(SIZES["num_classes"], size=3)
        logits = model(torch.from_numpy(images).double())
        F.cross_entropy(logits, torch.from_numpy(labels)).backward()
        arrays = {name: p.detach().numpy().astype(np.float32) for name, p in model.named_parameters()}
        grads = {name: p.grad.numpy() for name, p in model.named_parameters()}
        if case == "parallel":
            arrays, grads = renamed(arrays), renamed(grads)
        out[f"{case}/names"] = np.array(list(arrays))
        out[f"{case}/weights"] = np.concatenate([value.ravel() for value in arrays.values()])
        out[f"{case}/grads"] = np.concatenate([grads[name].ravel() for name in arrays])
        out |= {f"{case}/images": images, f"{case}/labels": labels, f"{case}/logits": logits.detach().numpy()}
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    path = Path(__file__).with_name("options_timm.npz")
    np.savez_compressed(path, **make())
    versions = f"timm {timm.__version__} and PyTorch {torch.__version__}"
    sys.stdout.write(f"{path.name}: {path.stat().st_size:,} bytes, made with {versions}\n")
