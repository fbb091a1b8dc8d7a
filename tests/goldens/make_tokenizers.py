#!/usr/bin/env python3
"""Write tokenizers.npz: small models that make their tokens otherwise, for minivit's tests to agree with.

Run it by hand in an environment with PyTorch, vit-pytorch and NumPy (minivit is not needed):

    python tests/goldens/make_tokenizers.py         # writes tokenizers.npz beside this file

CCT is vit-pytorch's. Shifted patches and T2T-ViT, of which no package has what is published, are written here from
their papers (arXiv 2112.13492, section 3; 2101.11986, section 3), T2T-ViT with the released models' scale of the
scores (1/√width), biases, residual to v and names. The committed file was made with PyTorch 2.14.1 (CPU) and
vit-pytorch 1.26.11. README.md lists the arrays.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vit_pytorch.cct import CCT

NAMES = {  # of CCT, which vit-pytorch calls as SHI Labs' Compact-Transformers does, what minivit calls them
    "tokenizer.conv_layers.": "patch_embed.convs.", ".0.weight": ".conv.weight", "classifier.": "",
    "positional_emb": "pos_embed", "attention_pool": "attn_pool.weigh", ".self_attn.": ".attn.", ".norm1.": ".norm2.",
    ".pre_norm.": ".norm1.", ".linear": ".mlp.fc", "fc.": "head.",
}  # fmt: skip
T2T_NAMES = {  # of T2T-ViT, as its authors' state dicts call them
    "tokens_to_token.": "patch_embed.", "attention1.attn.": "attention1.", "attention2.attn.": "attention2.",
    ".mlp.0.": ".mlp.fc1.", ".mlp.2.": ".mlp.fc2.",
}  # fmt: skip
SIZES = {"dim": 8, "depth": 2, "heads": 2, "hidden": 12, "classes": 3, "channels": 2}


class Attention(nn.Module):
    """softmax(q·kᵀ·scale)·v of ``heads`` heads; with ``hot``, the scale is e^temperature and no token sees itself."""

    def __init__(self, heads: int, hot: bool) -> None:
        super().__init__()
        dim = SIZES["dim"]
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.temperature = nn.Parameter(torch.zeros(heads)) if hot else None

    def forward(self, x: Tensor) -> Tensor:
        b, t, dim = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2)
        if self.temperature is None:
            scores = scores * (dim // self.heads) ** -0.5
        else:
            scores = scores * self.temperature.exp()[:, None, None]
            scores = scores.masked_fill(torch.eye(t, dtype=torch.bool), -torch.inf)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, dim))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, eps: float, hot: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(SIZES["dim"], eps) for _ in range(2))
        self.attn, self.mlp = Attention(SIZES["heads"], hot), MLP(SIZES["dim"], SIZES["hidden"])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Projection(nn.Module):
    """A patch of all channels → a token, with the weight as minivit has it: (dim, channels, P, P)."""

    def __init__(self, channels: int, patch: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SIZES["dim"], channels, patch, patch))
        self.bias = nn.Parameter(torch.zeros(SIZES["dim"]))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.flatten(1).T + self.bias


class Shifted(nn.Module):
    """S = LN(patches of [x, x shifted by half a patch to each corner])·E (2112.13492, eq. 9)."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        planes = 5 * SIZES["channels"]
        self.patch, self.norm, self.proj = patch, nn.LayerNorm(planes * patch**2, 1e-6), Projection(planes, patch)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        images = [x]
        for down in (-1, 1):  # up first; shifted up by s, row y + s is at y
            for right in (-1, 1):
                moved, s = torch.zeros_like(x), self.patch // 2
                rows = (slice(0, h - s), slice(s, h)) if down < 0 else (slice(s, h), slice(0, h - s))
                columns = (slice(0, w - s), slice(s, w)) if right < 0 else (slice(s, w), slice(0, w - s))
                moved[:, :, rows[0], columns[0]] = x[:, :, rows[1], columns[1]]
                images.append(moved)
        patches = F.unfold(torch.cat(images, 1), self.patch, stride=self.patch).transpose(1, 2)
        return self.proj(self.norm(patches))


class OneHead(nn.Module):
    """v + attention of one head among windows, by scores over √width."""

    def __init__(self, wide: int, dim: int) -> None:
        super().__init__()
        self.scale, self.qkv, self.proj = wide**-0.5, nn.Linear(wide, 3 * dim, bias=False), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return v + self.proj((q @ k.transpose(1, 2) * self.scale).softmax(-1) @ v)


class Exact(nn.Module):
    """Attention among windows with v as the residual, and an MLP."""

    def __init__(self, wide: int, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(wide, 1e-5), nn.LayerNorm(dim, 1e-5)
        self.attn, self.mlp = OneHead(wide, dim), MLP(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Performer(nn.Module):
    """The same by m random features."""

    def __init__(self, wide: int, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(wide, 1e-5), nn.LayerNorm(dim, 1e-5)
        self.kqv, self.proj = nn.Linear(wide, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.w = nn.Parameter(torch.zeros(dim // 2, dim), requires_grad=False)

    def kernel(self, q: Tensor, k: Tensor) -> Tensor:
        """Return what stands for e^(q·k) of every query and key, (B, T, T): written as a whole, no sum is moved."""
        phi = [torch.exp(x @ self.w.T - 0.5 * (x**2).sum(-1, keepdim=True)) / len(self.w) ** 0.5 for x in (q, k)]
        return phi[0] @ phi[1].transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = self.kqv(self.norm1(x)).chunk(3, -1)
        weights = self.kernel(q, k)
        x = v + self.proj(weights / (weights.sum(-1, keepdim=True) + 1e-8) @ v)
        return x + self.mlp(self.norm2(x))


class TokensToToken(nn.Module):
    """Soft split, mixing, soft split, mixing, soft split, projection (2101.11986, eq. 1 to 5)."""

    def __init__(self, performs: bool) -> None:
        super().__init__()
        mixing = Performer if performs else Exact
        self.attention1, self.attention2 = mixing(SIZES["channels"] * 49, 64), mixing(64 * 9, 64)
        self.project = nn.Linear(64 * 9, SIZES["dim"])

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        x = self.attention1(F.unfold(x, 7, stride=4, padding=2).transpose(1, 2))
        x = x.transpose(1, 2).reshape(len(x), 64, h // 4, w // 4)
        x = self.attention2(F.unfold(x, 3, stride=2, padding=1).transpose(1, 2))
        x = x.transpose(1, 2).reshape(len(x), 64, h // 8, w // 8)
        return self.project(F.unfold(x, 3, stride=2, padding=1).transpose(1, 2))


class Transformer(nn.Module):
    """A ViT on other tokens: class token first, learned positions, or fixed ones (sines and cosines in turn).

    ``made`` is what makes the tokens, under its name.
    """

    def __init__(self, patches: int, eps: float, fixed: bool, hot: bool = False, **made: nn.Module) -> None:
        super().__init__()
        dim = SIZES["dim"]
        ((self.first, tokenizer),) = made.items()
        self.add_module(self.first, tokenizer)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = None if fixed else nn.Parameter(torch.zeros(1, patches + 1, dim))
        angles = torch.arange(patches + 1).double()[:, None] / 10000 ** (torch.arange(0, dim, 2).double() / dim)
        # fixed positions are kept in float32 by minivit
        self.waves = torch.stack([angles.sin(), angles.cos()], -1).reshape(1, patches + 1, dim).float().double()
        self.blocks = nn.ModuleList(Block(eps, hot) for _ in range(SIZES["depth"]))
        self.norm, self.head = nn.LayerNorm(dim, eps), nn.Linear(dim, SIZES["classes"])

    def forward(self, images: Tensor) -> Tensor:
        x = self.get_submodule(self.first)(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = x + (self.waves if self.pos_embed is None else self.pos_embed)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def cct(kernel: int, convs: int, size: tuple[int, int], position: str) -> nn.Module:
    """Return vit-pytorch's CCT without any dropout."""
    stride = max(1, kernel // 2 - 1)
    return CCT(
        img_size=size, embedding_dim=SIZES["dim"], n_input_channels=SIZES["channels"], n_conv_layers=convs,
        kernel_size=kernel, stride=stride, padding=kernel // 2, num_layers=SIZES["depth"], num_heads=SIZES["heads"],
        mlp_ratio=SIZES["hidden"] / SIZES["dim"], num_classes=SIZES["classes"], positional_embedding=position,
        attention_dropout=0.0, stochastic_depth_rate=0.0,
    )  # fmt: skip


MODELS = {  # how it is built, and height and width of its images
    "cct_3x1": (lambda: cct(3, 1, (10, 7), "learnable"), (10, 7)),
    "cct_7x2": (lambda: cct(7, 2, (32, 48), "none"), (32, 48)),
    "shifted": (lambda: Transformer(6, 1e-6, False, patch_embed=Shifted(4)), (12, 8)),
    "shifted_lsa": (lambda: Transformer(6, 1e-6, False, hot=True, patch_embed=Shifted(4)), (12, 8)),
    "t2t": (lambda: Transformer(6, 1e-5, True, tokens_to_token=TokensToToken(True)), (48, 32)),
    "t2t_transformer": (lambda: Transformer(6, 1e-5, True, tokens_to_token=TokensToToken(False)), (48, 32)),
}


def wave(shape: tuple[int, ...], phase: int) -> np.ndarray:
    """Return numbers between -1 and 1 that need no file, float32: sin(√2·i² + phase)."""
    i = np.arange(np.prod(shape, dtype=int), dtype=np.float64)
    return np.sin(np.sqrt(2.0) * np.mod(i * i, 1000003.0) + phase).reshape(shape).astype(np.float32)


def set_weights(model: nn.Module) -> None:
    """Give the parameters numbers of which none is neutral: parameter i has wave(shape, i), scaled; norms about 1."""
    for i, (name, p) in enumerate(model.named_parameters()):
        scale = 0.3 if p.ndim < 2 else min(0.5, 1.5 * p[0].numel() ** -0.5)
        added = "norm" in name and name.endswith("weight")
        p.data = torch.from_numpy(wave(tuple(p.shape), i) * np.float32(scale) + np.float32(added)).double()


def make() -> dict[str, np.ndarray]:
    """Return every array of the file, by its name there."""
    out: dict[str, np.ndarray] = {}
    for number, (case, (build, size)) in enumerate(MODELS.items()):
        model = build().double().eval()
        set_weights(model)
        images = wave((3, SIZES["channels"], *size), 100 + number)
        labels = np.arange(3) % SIZES["classes"]
        logits = model(torch.from_numpy(images).double())
        F.cross_entropy(logits, torch.from_numpy(labels)).backward()
        theirs, names, along, gradients = [], [], [], []
        for name, p in model.named_parameters():
            theirs.append(name)
            for old, new in {"cct": NAMES, "t2t": T2T_NAMES}.get(case[:3], {}).items():
                name = name.replace(old, new)
            names.append(name)
            gradients.append(None if p.grad is None else p.grad.numpy())
            directions = [wave(tuple(p.shape), 300 + k).astype(np.float64) for k in range(3)]
            along.append([0.0] * 3 if p.grad is None else [float((p.grad.numpy() * d).sum()) for d in directions])
        out |= {f"{case}/theirs": np.array(theirs), f"{case}/names": np.array(names), f"{case}/along": np.array(along)}
        out |= {f"{case}/logits": logits.detach().numpy(), f"{case}/labels": labels}
        small = {n: g for n, g in zip(names, gradients, strict=True) if g is not None and g.size < 2000}
        out |= {f"{case}/of": np.array(list(small)), f"{case}/grads": np.concatenate([*map(np.ravel, small.values())])}
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    path = Path(__file__).with_name("tokenizers.npz")
    np.savez_compressed(path, **make())
    sys.stdout.write(f"{path.name}: {path.stat().st_size:,} bytes, made with PyTorch {torch.__version__}\n")
