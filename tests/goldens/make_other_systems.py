#!/usr/bin/env python3
"""Write other_systems.npz: small random models of other systems, their files as they write them, and what they compute.

Run it by hand, in an environment with PyTorch, timm, transformers, jax, scipy and safetensors, and with a vit-pytorch
before 0.36 (whose patch projection stands alone) in the folder OLD_VIT_PYTORCH:

    pip install --no-deps --target OLD vit-pytorch==0.35.8
    OLD_VIT_PYTORCH=OLD python tests/goldens/make_other_systems.py      # writes other_systems.npz beside this file

minivit is not needed. The committed file was made with PyTorch 2.13.0 (CPU), timm 1.0.31, transformers 5.24.0, jax
0.10.2 and scipy 1.17.1. README.md lists the arrays.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

if importlib.util.find_spec("torchvision") is None:  # timm and transformers ask for these two, and use neither
    _LIBRARY = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import jax
import jax.numpy as jnp
import scipy.ndimage
import timm
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import save_for_hf
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, ViTConfig, ViTForImageClassification

jax.config.update("jax_enable_x64", True)

DIM, DEPTH, HEADS, MLP, CLASSES, PATCH = 12, 2, 3, 20, 5, 4
RNG = np.random.default_rng(20201022)


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return weights where nothing is neutral, which float32 holds exactly: no norm weight is 1, no bias 0."""
    draw = RNG.standard_normal(shape)
    if len([n for n in shape if n > 1]) <= 1 or "pos" in name:
        draw = 0.3 * draw + any(word in name for word in ("norm", "scale", "gamma")) * name.endswith(
            ("weight", "scale")
        )
    else:
        draw = draw * 1.5 / np.sqrt(draw.size / max(shape))
    return draw.astype(np.float32).astype(np.float64)


def randomised(model: nn.Module) -> nn.Module:
    model.double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(drawn(name, tuple(p.shape))))
    return model


def batch(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    return RNG.standard_normal((4, 3, *size)).astype(np.float32), RNG.integers(CLASSES, size=4)


def torch_case(model: nn.Module, logits_of, size: tuple[int, int], names=lambda name: name) -> dict[str, np.ndarray]:
    """Return images, labels, logits and the gradients, under the names of the state dict, of the cross-entropy."""
    images, labels = batch(size)
    logits = logits_of(torch.from_numpy(images).double())
    F.cross_entropy(logits, torch.from_numpy(labels)).backward()
    grads = {f"grad/{names(name)}": p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    return {"images": images, "labels": labels, "logits": logits.detach().numpy(), **grads}


def files_in(folder: str) -> dict[str, np.ndarray]:
    """Return the files in a folder as bytes."""
    return {f"file/{p.name}": np.frombuffer(p.read_bytes(), np.uint8) for p in sorted(Path(folder).iterdir())}


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


def hugging_face() -> dict[str, np.ndarray]:
    # scaled_dot_product_attention stays in float64; "eager" takes its softmax in float32, whatever the model is in
    labels = {i: f"kind {i}" for i in range(CLASSES)}
    config = ViTConfig(
        hidden_size=DIM, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=MLP, image_size=16,
        patch_size=PATCH, layer_norm_eps=1e-3, hidden_act="gelu", id2label=labels, attn_implementation="sdpa",
    )  # fmt: skip
    model = randomised(ViTForImageClassification(config))
    with tempfile.TemporaryDirectory() as folder:
        model.float().save_pretrained(folder)
        out = files_in(folder)
    model.double()
    out |= torch_case(model, lambda x: model(x).logits, (16, 16))
    out["in_memory"] = np.array(list(model.state_dict()))
    wide, _ = batch((12, 24))
    with torch.no_grad():
        x = torch.from_numpy(wide).double()
        out |= {"wide/images": wide, "wide/logits": model(x, interpolate_pos_encoding=True).logits.numpy()}
    return out


def deit() -> dict[str, np.ndarray]:
    config = DeiTConfig(
        hidden_size=DIM, num_hidden_layers=DEPTH, num_attention_heads=HEADS, intermediate_size=MLP, image_size=16,
        patch_size=PATCH, layer_norm_eps=1e-3, num_labels=CLASSES, attn_implementation="sdpa",
    )  # fmt: skip
    model = randomised(DeiTForImageClassificationWithTeacher(config))
    with tempfile.TemporaryDirectory() as folder:
        model.float().save_pretrained(folder)
        out = files_in(folder)
    model.double()
    return out | torch_case(model, lambda x: model(x).logits, (16, 16))


# ---- timm ------------------------------------------------------------------------------------------------------------


def timm_case(**options) -> dict[str, np.ndarray]:
    args = {
        "img_size": [12, 16], "patch_size": PATCH, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS,
        "mlp_ratio": MLP / DIM, "num_classes": CLASSES, **options,
    }  # fmt: skip
    model = randomised(timm.create_model("vit_tiny_patch16_224", **args))
    with tempfile.TemporaryDirectory() as folder:
        save_for_hf(model.float(), folder, model_args=args, safe_serialization=True)
        for path in Path(folder).iterdir():
            if path.name not in ("model.safetensors", "config.json"):
                path.unlink()
        out = files_in(folder)
    model.double()
    return out | torch_case(model, model, (12, 16))


# ---- Google: vit_jax and big_vision, written anew from their description --------------------------------------------


def layer_norm(x, p):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def under(params, prefix):
    return {name.removeprefix(prefix): a for name, a in params.items() if name.startswith(prefix)}


def attention(attn, queries, keys):
    q, k, v = (
        jnp.einsum("btd,dhe->bthe", x, attn[f"{n}/kernel"]) + attn[f"{n}/bias"]
        for n, x in (("query", queries), ("key", keys), ("value", keys))
    )
    p = jax.nn.softmax(jnp.einsum("bqhe,bkhe->bhqk", q / jnp.sqrt(q.shape[-1]), k), axis=-1)
    y = jnp.einsum("bhqk,bkhe->bqhe", p, v)
    return jnp.einsum("bthe,hed->btd", y, attn["out/kernel"]) + attn["out/bias"]


def feed_forward(mlp, x, tanh):
    hidden = jax.nn.gelu(x @ mlp["Dense_0/kernel"] + mlp["Dense_0/bias"], approximate=tanh)
    return hidden @ mlp["Dense_1/kernel"] + mlp["Dense_1/bias"]


def map_head(params, x, tanh):
    """Return what a learned query attends to, and an MLP on it."""
    x = attention(under(params, "MultiHeadDotProductAttention_0/"), jnp.tile(params["probe"], (len(x), 1, 1)), x)
    return (x + feed_forward(under(params, "MlpBlock_0/"), layer_norm(x, under(params, "LayerNorm_0/")), tanh))[:, 0]


def google_forward(params, images, tanh, gap):
    kernel = params["embedding/kernel"]
    x = jax.lax.conv_general_dilated(
        images.transpose(0, 2, 3, 1), kernel, kernel.shape[:2], "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = (x + params["embedding/bias"]).reshape(len(x), -1, DIM)
    if not gap:
        x = jnp.concatenate([jnp.tile(params["cls"], (len(x), 1, 1)), x], axis=1)
    x = x + params["Transformer/posembed_input/pos_embedding"]
    for i in range(DEPTH):
        block = under(params, f"Transformer/encoderblock_{i}/")
        y = layer_norm(x, under(block, "LayerNorm_0/"))
        x = x + attention(under(block, "MultiHeadDotProductAttention_1/"), y, y)
        x = x + feed_forward(under(block, "MlpBlock_3/"), layer_norm(x, under(block, "LayerNorm_2/")), tanh)
    x = layer_norm(x, under(params, "Transformer/encoder_norm/"))
    if "MAPHead_0/probe" in params:
        x = map_head(under(params, "MAPHead_0/"), x, tanh)
    else:
        x = x.mean(axis=1) if gap else x[:, 0]
    if "pre_logits/kernel" in params:
        x = jnp.tanh(x @ params["pre_logits/kernel"] + params["pre_logits/bias"])
    return x @ params["head/kernel"] + params["head/bias"]


def encoder_shapes(block: str, attn: str, mlp: str) -> dict[str, tuple[int, ...]]:
    width = DIM // HEADS
    shapes: dict[str, tuple[int, ...]] = {}
    for part in ("query", "key", "value"):
        shapes |= {f"{attn}{part}/kernel": (DIM, HEADS, width), f"{attn}{part}/bias": (HEADS, width)}
    shapes |= {f"{attn}out/kernel": (HEADS, width, DIM), f"{attn}out/bias": (DIM,)}
    shapes |= {f"{block}LayerNorm_0/{part}": (DIM,) for part in ("scale", "bias")}
    shapes |= {f"{mlp}Dense_0/kernel": (DIM, MLP), f"{mlp}Dense_0/bias": (MLP,)}
    return shapes | {f"{mlp}Dense_1/kernel": (MLP, DIM), f"{mlp}Dense_1/bias": (DIM,)}


def google(gap: bool, attention_pooling: bool = False) -> dict[str, np.ndarray]:
    tokens = 16 + (not gap)
    shapes = {
        "embedding/kernel": (PATCH, PATCH, 3, DIM), "embedding/bias": (DIM,),
        "Transformer/posembed_input/pos_embedding": (1, tokens, DIM),
        "Transformer/encoder_norm/scale": (DIM,), "Transformer/encoder_norm/bias": (DIM,),
        "head/kernel": (DIM, CLASSES), "head/bias": (CLASSES,),
    }  # fmt: skip
    if not gap:
        shapes |= {"cls": (1, 1, DIM), "pre_logits/kernel": (DIM, DIM), "pre_logits/bias": (DIM,)}
    for i in range(DEPTH):
        block = f"Transformer/encoderblock_{i}/"
        attn, mlp = f"{block}MultiHeadDotProductAttention_1/", f"{block}MlpBlock_3/"
        shapes |= encoder_shapes(block, attn, mlp)
        shapes |= {f"{block}LayerNorm_2/{part}": (DIM,) for part in ("scale", "bias")}
    if attention_pooling:
        inner = "MAPHead_0/MultiHeadDotProductAttention_0/"
        shapes |= {"MAPHead_0/probe": (1, 1, DIM)} | encoder_shapes("MAPHead_0/", inner, "MAPHead_0/MlpBlock_0/")
    params = {name: drawn(name, shape) for name, shape in shapes.items()}
    images, labels = batch((16, 16))

    def loss(params, tanh):
        logits = google_forward(params, images.astype(np.float64), tanh, gap)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean(), logits

    out = {"images": images, "labels": labels} | {f"array/{n}": a.astype(np.float32) for n, a in params.items()}
    for tanh in (True, False):
        grads, logits = jax.grad(loss, has_aux=True)(params, tanh)
        kind = "" if tanh else "erf/"
        out[f"{kind}logits"] = np.asarray(logits)
        if tanh:
            out |= {f"grad/{name}": np.asarray(g) for name, g in grads.items()}
    return out


# ---- lucidrains ------------------------------------------------------------------------------------------------------


def old_lucidrains(module: str, name: str) -> dict[str, np.ndarray]:
    sys.path.insert(0, os.environ["OLD_VIT_PYTORCH"])
    make = getattr(importlib.import_module(f"vit_pytorch.{module}"), name)
    model = randomised(
        make(image_size=16, patch_size=PATCH, num_classes=CLASSES, dim=DIM, depth=DEPTH, heads=HEADS, mlp_dim=MLP,
             dim_head=6)
    )  # fmt: skip
    arrays = {f"array/{name}": a.float().numpy() for name, a in model.state_dict().items()}
    return arrays | torch_case(model, model, (16, 16))


# ---- positions and patches -------------------------------------------------------------------------------------------


def resized() -> dict[str, np.ndarray]:
    """Return positions on another grid, and patch weights of another size, as each system makes them."""
    out: dict[str, np.ndarray] = {}
    for old, new in (((14, 14), (24, 24)), ((7, 7), (12, 20)), ((16, 16), (8, 8))):
        name = f"{old[0]}x{old[1]} {new[0]}x{new[1]}"
        pos = RNG.standard_normal((1, old[0] * old[1], 3)).astype(np.float32)
        x = torch.from_numpy(pos)
        out[f"{name}/old"] = pos
        out[f"{name}/bicubic"] = resample_abs_pos_embed(x, list(new), list(old), 0).numpy()
        out[f"{name}/bilinear"] = resample_abs_pos_embed(
            x, list(new), list(old), 0, interpolation="bilinear", antialias=False
        ).numpy()
        config = ViTConfig(hidden_size=3, num_hidden_layers=1, num_attention_heads=1, intermediate_size=3,
                           image_size=old[0] * 2, patch_size=2)  # fmt: skip
        embed = ViTForImageClassification(config).vit.embeddings
        with torch.no_grad():
            embed.position_embeddings.copy_(torch.cat([torch.zeros(1, 1, 3), x], dim=1))
            tokens = torch.zeros(1, 1 + new[0] * new[1], 3)
            out[f"{name}/bicubic-hf"] = embed.interpolate_pos_encoding(tokens, 2 * new[0], 2 * new[1])[:, 1:].numpy()
        zoomed = scipy.ndimage.zoom(pos.reshape(*old, 3), (new[0] / old[0], new[1] / old[1], 1), order=1)
        out[f"{name}/zoom"] = zoomed.reshape(1, -1, 3)
    weight = RNG.standard_normal((2, 3, 4, 4)).astype(np.float32)
    out["patches/old"] = weight
    for new in ((6, 8), (3, 2)):
        out[f"patches/{new[0]}x{new[1]}"] = resample_patch_embed(torch.from_numpy(weight), list(new)).numpy()
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases = {
        "hugging_face": hugging_face(),
        "timm": timm_case(),
        "timm_avg": timm_case(global_pool="avg", class_token=False, fc_norm=False),
        "google": google(gap=False),
        "big_vision": google(gap=True),
        "big_vision_map": google(gap=True, attention_pooling=True),
        "deit": deit(),
        "resized": resized(),
        "lucidrains": old_lucidrains("vit", "ViT"),
        "simple_vit": old_lucidrains("simple_vit", "SimpleViT"),
    }
    path = Path(__file__).with_name("other_systems.npz")
    np.savez_compressed(path, **{f"{case}/{name}": a for case, arrays in cases.items() for name, a in arrays.items()})
    sys.stdout.write(
        json.dumps({"file": path.name, "bytes": path.stat().st_size, "arrays": sum(map(len, cases.values()))})
    )
