"""The error of PyTorch's whole gradient under autocast: ``python benchmarks/torch_gradient.py FILE.npz``.

The file is what ``gpu_probes.py gradient`` leaves: a model of minivit's with images, labels, its gradient in float32
and the error of that in bfloat16. The same parameters are put into PyTorch's model, whose gradient in float32 the error
is relative to; that it is minivit's shows that both do the same work. Attention is PyTorch's own.
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
    model = ViT(images.shape[-1], patch, dim, depth, heads).to(device)
    model.load_state_dict({torch_name(name): torch.from_numpy(array) for name, array in held.items()})
    torch.set_float32_matmul_precision("highest")
    found = []
    for half in (False, True):
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        found.append(torch.cat([p.grad.flatten().double() for p in model.parameters()]))
    minivits = torch.cat([exact[name].flatten().double() for name, _ in model.named_parameters()])
    apart = float((minivits - found[0]).norm() / found[0].norm())
    error = float((found[1] - found[0]).norm() / found[0].norm())
    rows = [("gradient, float32", f"{apart:.1e} from PyTorch's", "≤ 1e-05", apart <= 1e-5)]
    rows += [("autocast", f"{error:.2e}; minivit's {ours:.2e}", f"minivit's ≤ {1.2 * error:.2e}", ours <= 1.2 * error)]
    print("RESULT", json.dumps(rows))


if __name__ == "__main__":
    main()
