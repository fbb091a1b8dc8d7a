"""The error of PyTorch's whole gradient under autocast: ``python benchmarks/torch_gradient.py FILE.npz``.

The file is what ``gpu_probes.py gradient`` leaves: a model of minivit's with images, labels, its gradient in float32
and the error of that in bfloat16. The same parameters are put into PyTorch's model, whose gradient in float32 the error
is relative to; that it is minivit's shows that both do the same work. Attention is PyTorch's own. Autocast keeps the
residual stream in float32, minivit in bfloat16, as what PyTorch is timed with does (torch_gpu.py): the error of that is
shown beside it.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys

import numpy as np
import torch
from torch.nn import functional as F
from torch_step import ViT

NAMES = {
    r"patch_embed\.proj\.": "patch.", r"^cls_token$": "cls", r"^pos_embed$": "pos", r"\.attn\.": ".",
    r"\.mlp\.fc1\.": ".mlp.0.", r"\.mlp\.fc2\.": ".mlp.2.",
}  # fmt: skip


OF = "gradient of "  # a parameter's name follows


class Narrow(ViT):
    """The same with its residual stream in bfloat16."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2)
        x = (torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos).to(torch.bfloat16)
        return self.head(self.norm(self.blocks(x))[:, 0])


def torch_name(name: str) -> str:
    for pattern, other in NAMES.items():
        name = re.sub(pattern, other, name)
    return name


def main() -> None:
    with np.load(sys.argv[1]) as arrays:
        held = dict(arrays)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, labels = (torch.from_numpy(held.pop(key)).to(device) for key in ("images", "labels"))
    ours = float(held.pop("error"))
    exact = {torch_name(n[len(OF) :]): torch.from_numpy(held.pop(n)).to(device) for n in list(held) if n.startswith(OF)}
    dim, _, patch, _ = held["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in held if name.startswith("blocks."))
    heads = {192: 3, 384: 6, 32: 2}[dim]
    torch.set_float32_matmul_precision("highest")
    found = []
    for kind, half in ((ViT, False), (ViT, True), (Narrow, True)):
        model = kind(images.shape[-1], patch, dim, depth, heads).to(device)
        model.load_state_dict({torch_name(name): torch.from_numpy(array) for name, array in held.items()})
        with torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        found.append(torch.cat([p.grad.flatten().double() for p in model.parameters()]))
    minivits = torch.cat([exact[name].flatten().double() for name, _ in model.named_parameters()])
    apart = float((minivits - found[0]).norm() / found[0].norm())
    error, narrow = (float((other - found[0]).norm() / found[0].norm()) for other in found[1:])
    rows = [
        ("gradient, float32", f"{apart:.1e} from PyTorch's", "≤ 1e-05", apart <= 1e-5),
        ("autocast", f"{error:.2e}; minivit's {ours:.2e}", f"minivit's ≤ {1.2 * error:.2e}", ours <= 1.2 * error),
        ("autocast, stream in bfloat16", f"{narrow:.2e}; minivit's {ours:.2e}", "", None),
    ]
    print("RESULT", json.dumps(rows))


if __name__ == "__main__":
    main()
