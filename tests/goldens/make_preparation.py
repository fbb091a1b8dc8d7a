"""Make preparation.npz: what timm and Hugging Face make of three pictures before a model sees them.

Not run by the tests. In an environment with timm (1.0), transformers (5) and torchvision::

    python tests/goldens/make_preparation.py

``page/NAME`` is a picture, uint8 (H, W, 3), like a photo: smooth colours, edges, some noise.
``pixels/NAME/SYSTEM/FIT/HxW`` is what the system makes of it, uint8 (H, W, 3); ``numbers/…`` the same standardised,
float32 (3, H, W).
"""

from pathlib import Path

import numpy as np
from PIL import Image
from timm.data.transforms_factory import create_transform
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FITS = {  # minivit's name: crop_mode, interpolation, crop_pct
    "centre bicubic 0.9": ("center", "bicubic", 0.9),
    "centre bicubic 1": ("center", "bicubic", 1.0),
    "centre bilinear 0.875": ("center", "bilinear", 0.875),
    "squash bicubic 0.95": ("squash", "bicubic", 0.95),
}
SIZES = ((32, 32), (20, 28), (31, 31))


def page(height: int, width: int, seed: int) -> np.ndarray:
    """Return a picture like a photo."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = [np.sin(x * rng.uniform(2, 30) + y * rng.uniform(2, 30) + rng.uniform(0, 6)) for _ in range(3)]
    edges = ((x * rng.uniform(3, 6) + y * 2) % 1 > 0.5) * rng.uniform(20, 90)
    noise = rng.normal(0, 8, (height, width, 3))
    return np.clip(120 + 60 * np.stack(waves, -1) + edges[..., None] + noise, 0, 255).astype(np.uint8)


def main() -> None:
    """Write the file beside this one."""
    pages = {"wide": page(75, 118, 1), "tall": page(97, 61, 2), "small": page(17, 23, 3)}
    found = {f"page/{name}": array for name, array in pages.items()}
    for name, array in pages.items():
        image = Image.fromarray(array)
        for size in SIZES:
            at = "{}x{}".format(*size)
            for fit, (mode, interpolation, part) in FITS.items():
                about = {"interpolation": interpolation, "crop_pct": part, "crop_mode": mode}
                about |= {"mean": IMAGENET[0], "std": IMAGENET[1]}
                make = create_transform(size, normalize=False, **about)
                found[f"pixels/{name}/timm/{fit}/{at}"] = make(image).numpy().transpose(1, 2, 0)
                if name == "wide" and size == (32, 32):
                    found[f"numbers/{name}/timm/{fit}/{at}"] = create_transform(size, **about)(image).numpy()
            side = {"height": size[0], "width": size[1]}
            for normal in (False, True):
                processor = ViTImageProcessorPil(
                    size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_normalize=normal, do_rescale=normal
                )
                (out,) = processor(image)["pixel_values"]
                out = np.asarray(out)
                if not normal:
                    found[f"pixels/{name}/huggingface/squash bilinear 1/{at}"] = out.transpose(1, 2, 0).astype(np.uint8)
                elif name == "wide" and size == (32, 32):
                    found[f"numbers/{name}/huggingface/squash bilinear 1/{at}"] = out.astype(np.float32)
    np.savez_compressed(Path(__file__).with_name("preparation.npz"), **found)


if __name__ == "__main__":
    main()
