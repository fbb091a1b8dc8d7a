"""The same step in PyTorch: ``python benchmarks/torch_gpu.py CONFIG DTYPE ENGINE [--dry]``; a child of gpu.py.

Engines: eager, compile, reduce-overhead (CUDA graphs), max-autotune; with ``-bf16-residual`` behind it the residual
stream is bfloat16 as minivit's is, where autocast keeps float32. bfloat16 is autocast, tf32 and float32 the precision
of float32 matrix products. Attention is PyTorch's own, AdamW the fused one. ``--dry`` runs a tiny step on the CPU.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

import torch
from configs import DTYPES, GPU_CONFIGS, TINY
from torch.nn import functional as F
from torch_step import ViT
from turns import ready, result, time_blocks

RESIDUAL = "-bf16-residual"
MODES: dict[str, dict[str, Any]] = {
    "compile": {}, "reduce-overhead": {"mode": "reduce-overhead"}, "max-autotune": {"mode": "max-autotune"},
}  # fmt: skip


class Narrow(ViT):
    """The same with a residual stream of bfloat16."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = (torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos).to(torch.bfloat16)
        return self.head(self.norm(self.blocks(x))[:, 0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", choices=GPU_CONFIGS)
    parser.add_argument("dtype", choices=DTYPES)
    parser.add_argument("engine", choices=[e + tail for e in ("eager", *MODES) for tail in ("", RESIDUAL)])
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    batch, image, patch, dim, depth, heads, steps = TINY if args.dry else GPU_CONFIGS[args.config]
    device = "cpu" if args.dry else "cuda"
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    torch.manual_seed(0)
    torch.set_num_threads(2)
    torch.set_default_device(device)
    torch.set_float32_matmul_precision("high" if args.dtype == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = args.dtype != "float32"
    engine = args.engine.removesuffix(RESIDUAL)
    model = (Narrow if args.engine.endswith(RESIDUAL) else ViT)(image, patch, dim, depth, heads)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    images, labels = torch.randn(batch, 3, image, image), torch.randint(0, 10, (batch,))

    def loss_of(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        half = torch.autocast(device, torch.bfloat16) if args.dtype == "bfloat16" else contextlib.nullcontext()
        with half:
            return F.cross_entropy(model(images), labels)

    compiled: Callable[..., torch.Tensor] = loss_of if engine == "eager" else torch.compile(loss_of, **MODES[engine])

    def step() -> torch.Tensor:
        opt.zero_grad(set_to_none=True)
        loss = compiled(images, labels)
        loss.backward()
        opt.step()
        return loss

    first = float(step())
    for _ in range(3):
        step()
    wait()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    ready(parameters=sum(p.numel() for p in model.parameters()))
    for _ in range(4):  # what another process has done to the GPU's clock and caches meanwhile
        step()
    times = time_blocks(step, wait, steps)
    memory = torch.cuda.max_memory_reserved() if device == "cuda" else 0
    result(seconds=times, batch=batch, memory=memory, losses=[first, float(step())], torch=torch.__version__)


if __name__ == "__main__":
    main()
