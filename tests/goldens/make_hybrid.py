#!/usr/bin/env python3
"""Write hybrid.npz: what small hybrids of timm's and of Google's compute, for weights and images made by a formula.

Run it by hand in an environment with timm, PyTorch, JAX and NumPy (minivit is not needed):

    python tests/goldens/make_hybrid.py            # writes hybrid.npz beside this file

The committed file was made with timm 1.0.31, PyTorch 2.14.1 and JAX 0.10.2 (CPU), in float64. README.md lists the
arrays. Google's model is written here anew, from the paper and from what its files hold.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.layers import StdConv2dSame
from timm.models.resnetv2 import ResNetV2, create_resnetv2_stem
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import HybridEmbed

IMAGE, CHANNELS, DIM, DEPTH, HEADS, HIDDEN, CLASSES, WIDTH = (16, 24), 2, 12, 2, 2, 20, 3, 32
DIRECTIONS = 3


def wave(shape: tuple[int, ...], number: int, centre: float = 0.0, scale: float = 1.0) -> np.ndarray:
    """Return numbers that look random enough, which any language can make."""
    n = np.arange(np.prod(shape, dtype=int), dtype=np.float64)
    return (np.sin(n * n * 0.37 + 1.3 * number) * scale + centre).reshape(shape)


def weight(name: str, shape: tuple[int, ...], number: int) -> np.ndarray:
    """Return an array of a state: norms' weights around 1, no bias 0."""
    norm = name.endswith("/scale") or (name.endswith("weight") and len(shape) == 1)
    return wave(shape, number, float(norm), 0.3).astype(np.float32).astype(np.float64)


def along(gradients: dict[str, np.ndarray]) -> np.ndarray:
    """Return each array's products with a few directions."""
    return np.array([[(g * wave(g.shape, 500 + i)).sum() for i in range(DIRECTIONS)] for g in gradients.values()])


def told(case: str, weights: dict[str, np.ndarray], logits: np.ndarray, gradients: dict[str, np.ndarray]) -> dict:
    """Return the arrays of the file for a case."""
    shapes = np.array([list(a.shape) + [0] * (4 - a.ndim) for a in weights.values()])
    return {
        f"{case}/names": np.array(list(weights)), f"{case}/shapes": shapes, f"{case}/logits": logits,
        f"{case}/along": along({name: gradients[name] for name in weights}),
    }  # fmt: skip


IMAGES, LABELS = wave((2, CHANNELS, *IMAGE), 900).astype(np.float32), np.array([2, 0])


# ---- timm ------------------------------------------------------------------------------------------------------------


def of_timm(case: str, layers: tuple[int, ...], patch: int) -> dict[str, np.ndarray]:
    """Return what timm's hybrid gives with these stages, and patches of so many places of its map."""
    conv = partial(StdConv2dSame, eps=1e-8)
    if layers:
        backbone = ResNetV2(
            layers=layers, channels=tuple(4 * WIDTH << i for i in range(len(layers))), num_classes=0, global_pool="",
            in_chans=CHANNELS, preact=False, stem_type="same", stem_chs=WIDTH, conv_layer=conv,
        )  # fmt: skip
    else:
        backbone = create_resnetv2_stem(CHANNELS, WIDTH, stem_type="same", preact=False, conv_layer=conv)
    model = VisionTransformer(
        img_size=IMAGE, patch_size=patch, in_chans=CHANNELS, num_classes=CLASSES, embed_dim=DIM, depth=DEPTH,
        num_heads=HEADS, mlp_ratio=HIDDEN / DIM, embed_layer=partial(HybridEmbed, backbone=backbone),
    ).double().eval()  # fmt: skip
    own = dict(model.named_parameters())
    with torch.no_grad():
        for i, (name, p) in enumerate(own.items()):
            p.copy_(torch.from_numpy(weight(name, tuple(p.shape), i)))
    logits = model(torch.from_numpy(IMAGES).double())
    F.cross_entropy(logits, torch.from_numpy(LABELS)).backward()
    arrays = {name: p.detach().numpy() for name, p in own.items()}
    return told(case, arrays, logits.detach().numpy(), {name: p.grad.numpy() for name, p in own.items()})


# ---- Google ----------------------------------------------------------------------------------------------------------


def shapes_of_google(stages: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return the arrays of vit_jax's hybrid by name, with the names of its first files."""
    out: dict[str, tuple[int, ...]] = {"conv_root/kernel": (7, 7, CHANNELS, WIDTH)}
    norm = lambda at, name, n: {f"{at}{name}/scale": (n,), f"{at}{name}/bias": (n,)}
    out |= norm("", "gn_root", WIDTH)
    before = WIDTH
    for s, depth in enumerate(stages):
        n = WIDTH << s
        for u in range(depth):
            at = f"block{s + 1}/unit{u + 1}/"
            kernels = {"conv1": (1, 1, before, n), "conv2": (3, 3, n, n), "conv3": (1, 1, n, 4 * n)}
            out |= {f"{at}{name}/kernel": shape for name, shape in kernels.items()}
            out |= norm(at, "gn1", n) | norm(at, "gn2", n) | norm(at, "gn3", 4 * n)
            if u == 0:
                out |= {f"{at}conv_proj/kernel": (1, 1, before, 4 * n)} | norm(at, "gn_proj", 4 * n)
            before = 4 * n
    dense = lambda name, *shape, bias: {f"{name}/kernel": shape, f"{name}/bias": bias}
    patches = IMAGE[0] // (4 << len(stages) - 1) * IMAGE[1] // (4 << len(stages) - 1)
    out |= dense("embedding", 1, 1, before, DIM, bias=(DIM,))
    out |= {"cls": (1, 1, DIM), "Transformer/posembed_input/pos_embedding": (1, patches + 1, DIM)}
    for i in range(DEPTH):
        at, d = f"Transformer/encoderblock_{i}/", DIM // HEADS
        out |= norm(at, "LayerNorm_0", DIM) | norm(at, "LayerNorm_2", DIM)
        for name in ("query", "key", "value"):
            out |= dense(f"{at}MultiHeadDotProductAttention_1/{name}", DIM, HEADS, d, bias=(HEADS, d))
        out |= dense(f"{at}MultiHeadDotProductAttention_1/out", HEADS, d, DIM, bias=(DIM,))
        out |= dense(f"{at}MlpBlock_3/Dense_0", DIM, HIDDEN, bias=(HIDDEN,))
        out |= dense(f"{at}MlpBlock_3/Dense_1", HIDDEN, DIM, bias=(DIM,))
    return out | norm("Transformer/", "encoder_norm", DIM) | dense("head", DIM, CLASSES, bias=(CLASSES,))


def group_norm(w: dict, name: str, x: jnp.ndarray) -> jnp.ndarray:
    """Normalise 32 groups of channels (B, H, W, C), eps 1e-6."""
    b, h, width, c = x.shape
    g = x.reshape(b, h, width, 32, c // 32)
    mean, var = g.mean(axis=(1, 2, 4), keepdims=True), g.var(axis=(1, 2, 4), keepdims=True)
    return ((g - mean) / jnp.sqrt(var + 1e-6)).reshape(x.shape) * w[f"{name}/scale"] + w[f"{name}/bias"]


def std_conv(w: dict, name: str, x: jnp.ndarray, stride: int = 1) -> jnp.ndarray:
    """Convolve by a standardised kernel; eps 1e-5 is added to the deviation."""
    k = w[f"{name}/kernel"]
    k = k - k.mean(axis=(0, 1, 2))
    k = k / (k.std(axis=(0, 1, 2)) + 1e-5)
    return jax.lax.conv_general_dilated(x, k, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def layer_norm(w: dict, name: str, x: jnp.ndarray) -> jnp.ndarray:
    """Normalise each token, eps 1e-6."""
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(var + 1e-6) * w[f"{name}/scale"] + w[f"{name}/bias"]


def google(w: dict, images: jnp.ndarray, stages: tuple[int, ...]) -> jnp.ndarray:
    """Return the logits of vit_jax's hybrid for images (B, C, H, W)."""
    x = jax.nn.relu(group_norm(w, "gn_root", std_conv(w, "conv_root", images.transpose(0, 2, 3, 1), 2)))
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    for s, depth in enumerate(stages):
        for u in range(depth):
            at, stride = f"block{s + 1}/unit{u + 1}/", 2 if s and not u else 1
            y = jax.nn.relu(group_norm(w, f"{at}gn1", std_conv(w, f"{at}conv1", x)))
            y = jax.nn.relu(group_norm(w, f"{at}gn2", std_conv(w, f"{at}conv2", y, stride)))
            y = group_norm(w, f"{at}gn3", std_conv(w, f"{at}conv3", y))
            x = x if u else group_norm(w, f"{at}gn_proj", std_conv(w, f"{at}conv_proj", x, stride))
            x = jax.nn.relu(x + y)
    x = (x @ w["embedding/kernel"][0, 0] + w["embedding/bias"]).reshape(len(x), -1, DIM)
    x = jnp.concatenate([jnp.broadcast_to(w["cls"], (len(x), 1, DIM)), x], axis=1)
    x = x + w["Transformer/posembed_input/pos_embedding"]
    for i in range(DEPTH):
        at = f"Transformer/encoderblock_{i}/"
        a, y = f"{at}MultiHeadDotProductAttention_1/", layer_norm(w, f"{at}LayerNorm_0", x)
        q, k, v = (
            jnp.einsum("btd,dhe->bhte", y, w[f"{a}{n}/kernel"]) + w[f"{a}{n}/bias"][:, None]
            for n in ("query", "key", "value")
        )
        p = jax.nn.softmax(q @ k.swapaxes(-1, -2) / np.sqrt(DIM // HEADS), axis=-1)
        x = x + jnp.einsum("bhte,hed->btd", p @ v, w[f"{a}out/kernel"]) + w[f"{a}out/bias"]
        m, y = f"{at}MlpBlock_3/Dense_", layer_norm(w, f"{at}LayerNorm_2", x)
        y = jax.nn.gelu(y @ w[f"{m}0/kernel"] + w[f"{m}0/bias"], approximate=True)
        x = x + y @ w[f"{m}1/kernel"] + w[f"{m}1/bias"]
    return layer_norm(w, "Transformer/encoder_norm", x)[:, 0] @ w["head/kernel"] + w["head/bias"]


def of_google(case: str, stages: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Return what Google's hybrid gives with these stages."""
    arrays = {n: weight(n, shape, i) for i, (n, shape) in enumerate(shapes_of_google(stages).items())}
    loss = lambda w: -jax.nn.log_softmax(google(w, jnp.asarray(IMAGES, "f8"), stages))[jnp.arange(2), LABELS].mean()
    gradients = {name: np.asarray(g) for name, g in jax.grad(loss)(arrays).items()}
    return told(case, arrays, np.asarray(google(arrays, jnp.asarray(IMAGES, "f8"), stages)), gradients)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    torch.set_num_threads(1)
    path = Path(__file__).with_name("hybrid.npz")
    found = of_timm("timm_r", (), 2) | of_timm("timm_stages", (1, 2), 1) | of_google("google", (2, 1))
    np.savez_compressed(path, **found)
    versions = f"timm {timm.__version__}, PyTorch {torch.__version__}, JAX {jax.__version__}"
    sys.stdout.write(f"{path.name}: {path.stat().st_size:,} bytes, made with {versions}\n")
