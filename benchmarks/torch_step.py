"""The same in PyTorch, on all cores: ``python benchmarks/torch_step.py CONFIG [train|infer] [eager|compile]``."""

from __future__ import annotations

import resource

import torch
from configs import arguments, report, time_steps
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, image: int, patch: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, dim) * 0.02)
        self.blocks = nn.Sequential(*[Block(dim, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos
        return self.head(self.norm(self.blocks(x))[:, 0])


def main() -> None:
    config, name, args = arguments(__doc__, engine=["eager", "compile"])
    batch, image, patch, dim, depth, heads, steps = config
    torch.manual_seed(0)
    torch.set_default_device(args.device)
    model = ViT(image, patch, dim, depth, heads)
    forward = torch.compile(model) if args.engine == "compile" else model
    images, labels = torch.randn(batch, 3, image, image), torch.randint(0, 10, (batch,))
    losses: list[float] = []
    if args.mode == "train":
        opt = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)

        def step(images: torch.Tensor, labels: torch.Tensor) -> None:
            opt.zero_grad(set_to_none=True)
            loss = F.cross_entropy(forward(images), labels)
            loss.backward()
            opt.step()
            losses.append(loss.item())
    else:
        step = torch.inference_mode()(lambda images, labels: forward(images).cpu())
    times = time_steps(step, images, labels, steps)
    on_cpu = args.device == "cpu"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if on_cpu else torch.cuda.max_memory_reserved()
    report(f"PyTorch {args.engine} {name}", config, times, losses, peak)


if __name__ == "__main__":
    main()
