"""Make timm_models.json: what timm says of its Vision Transformers and of the images that their weights take.

Not run by the tests. In an environment with timm (1.0) and torchvision; takes about a minute::

    python tests/goldens/make_timm_models.py

Of each name: parameters (with a head of ``classes``), classes, image, patch, dim, depth, heads, hidden numbers of the
MLP, eps of the norms, activation, pooling; and of the first weights of that name mean, std, interpolation, crop_pct,
crop_mode.
"""

import json
from pathlib import Path

import timm
import torch


def row(name: str) -> list:
    """Return what is said of one model."""
    with torch.device("meta"):
        model = timm.create_model(name)
    block, images = model.blocks[0], model.pretrained_cfg
    attention, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    norm = next((n for n in (model.norm, model.fc_norm) if hasattr(n, "eps")), None)
    return [
        sum(p.numel() for p in model.parameters()),
        model.num_classes,
        model.patch_embed.img_size[0],
        model.patch_embed.patch_size[0],
        model.embed_dim,
        len(model.blocks),
        getattr(attention, "num_heads", None),
        getattr(getattr(mlp, "fc1", None), "out_features", None),
        getattr(norm, "eps", None),
        type(getattr(mlp, "act", None)).__name__,
        model.global_pool,
        *[images[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")],
    ]


def main() -> None:
    """Write the file beside this one."""
    modules = ("vision_transformer", "deit", "vision_transformer_hybrid")
    names = [name for module in modules for name in timm.list_models(module=module)]
    lines = [f"{json.dumps(name)}: {json.dumps(row(name))}" for name in sorted(names)]
    Path(__file__).with_name("timm_models.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
