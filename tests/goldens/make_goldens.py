#!/usr/bin/env python3
"""Write vit_small.npz: a small pre-norm ViT computed by PyTorch, for minivit's tests to agree with.

Run it in an environment with PyTorch and NumPy (minivit is not needed):

    python tests/goldens/make_goldens.py            # writes vit_small.npz beside this file

The committed file was made with PyTorch 2.13.0 (CPU); another version or machine moves the last bits only.
README.md lists the arrays.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE, PATCH, CHANNELS, CLASSES = (12, 8), (4, 2), 3, 5  # (height, width)
DIM, DEPTH, HEADS, MLP_DIM = 16, 3, 4, 40
GRID = (IMAGE[0] // PATCH[0], IMAGE[1] // PATCH[1])
TOKENS = GRID[0] * GRID[1] + 1
BATCH, STEPS, STEP_BATCH = 4, 20, 8
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8}
WEIGHT_DECAY = 0.05
SGD = {"lr": 0.01, "momentum": 0.9}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, may_attend: Tensor | None) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, HEADS, DIM // HEADS).permute(2, 0, 3, 1, 4)  # each (B, H, T, Dh)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=may_attend)  # (B, H, T, Dh)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, DIM))  # (B, T, D)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(DIM, MLP_DIM)
        self.fc2 = nn.Linear(MLP_DIM, DIM)

    def forward(self, x: Tensor, gelu: str) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=gelu))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM, eps=1e-6)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(DIM, eps=1e-6)
        self.mlp = MLP()

    def forward(self, x: Tensor, may_attend: Tensor | None, gelu: str) -> Tensor:
        x = x + self.attn(self.norm1(x), may_attend)
        return x + self.mlp(self.norm2(x), gelu)


class PatchEmbed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(CHANNELS, DIM, kernel_size=PATCH, stride=PATCH)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # (B, C, H, W) → (B, D, Gh, Gw) → (B, Gh·Gw, D)


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, DIM))
        self.pos_embed = nn.Parameter(torch.zeros(1, TOKENS, DIM))
        self.patch_embed = PatchEmbed()
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(DIM, eps=1e-6)
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, images: Tensor, mask: Tensor | None = None, gelu: str = "none") -> Tensor:
        """Logits (B, classes); mask (T, T) is True where a query (row) may not attend to a key (column)."""
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), self.patch_embed(images)], dim=1)  # (B, T, D)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x, None if mask is None else ~mask, gelu)
        return self.head(self.norm(x)[:, 0])


def random_weights(model: ViT, rng: np.random.Generator) -> dict[str, Tensor]:
    """Weights where nothing is neutral: no norm weight is 1, no bias 0, so that leaving one out shows."""
    weights = {}
    for name, parameter in model.named_parameters():
        draw = rng.standard_normal(parameter.shape)
        if parameter.ndim == 1:
            value = 0.2 * draw + ("norm" in name and name.endswith("weight"))
        elif name in ("cls_token", "pos_embed"):
            value = 0.5 * draw
        else:
            value = draw / np.sqrt(parameter[0].numel())  # the variance of a layer's output is about its input's
        weights[name] = torch.from_numpy(value)
    return weights


def train(
    model: ViT, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> Tensor:
    """Restart `model` from `weights`, take one step per batch; the losses before each step."""
    model.load_state_dict(weights)
    losses = []
    for batch, target in zip(images, labels, strict=True):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def make(dtype: torch.dtype = torch.float32) -> dict[str, np.ndarray]:
    """Every array of the file, by its name there; `dtype` is that of the training runs."""
    rng = np.random.default_rng(20201022)
    out: dict[str, Tensor] = {}

    model = ViT().double()
    weights = random_weights(model, rng)
    model.load_state_dict(weights)
    images = torch.from_numpy(rng.standard_normal((BATCH, CHANNELS, *IMAGE)))
    labels = torch.from_numpy(rng.integers(CLASSES, size=BATCH))
    mask = torch.from_numpy(rng.random((TOKENS, TOKENS)) < 0.4) & ~torch.eye(TOKENS, dtype=torch.bool)
    logits = model(images)
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    out |= {f"weight/{name}": value for name, value in weights.items()}
    out |= {f"grad/{name}": parameter.grad for name, parameter in model.named_parameters()}
    out |= {"images": images, "labels": labels, "logits": logits, "loss": loss}
    out |= {"mask": mask, "logits_masked": model(images, mask=mask), "logits_tanh_gelu": model(images, gelu="tanh")}

    batches = torch.from_numpy(rng.standard_normal((STEPS, STEP_BATCH, CHANNELS, *IMAGE)).astype(np.float32))
    targets = torch.from_numpy(rng.integers(CLASSES, size=(STEPS, STEP_BATCH)))
    model = ViT().to(dtype)
    weights = {name: value.float() for name, value in weights.items()}
    no_decay = [p for name, p in model.named_parameters() if p.ndim == 1 or name in ("cls_token", "pos_embed")]
    decay = [p for name, p in model.named_parameters() if p.ndim > 1 and name not in ("cls_token", "pos_embed")]
    groups = [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": no_decay, "weight_decay": 0.0}]
    adamw_losses = train(model, weights, torch.optim.AdamW(groups, **ADAMW), batches.to(dtype), targets)
    out |= {"train/images": batches, "train/labels": targets, "adamw/losses": adamw_losses}
    out |= {f"adamw/final/{name}": value.clone() for name, value in model.state_dict().items()}
    out["sgd/losses"] = train(model, weights, torch.optim.SGD(model.parameters(), **SGD), batches.to(dtype), targets)
    return {name: value.detach().numpy() for name, value in out.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    path = Path(__file__).with_name("vit_small.npz")
    np.savez_compressed(path, **make())
    sys.stdout.write(f"{path.name}: {path.stat().st_size:,} bytes, made with PyTorch {torch.__version__}\n")
