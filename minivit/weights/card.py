"""A model card: what an exported model is, in Markdown (Mitchell et al. 2019, "Model cards for model reporting")."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from minivit.data import Preparation
from minivit.data.catalog import NAMES
from minivit.errors import printable, shortened
from minivit.show.text import plural

FEW_CLASSES = 200


@dataclass(frozen=True)
class Facts:
    """What is known of a model beside its numbers.

    ``preparation``, how its images are prepared; the names of its ``classes``; ``data``, the data set that it was
    trained on, and ``accuracy``, what it reaches on which images, in words, "" where they are not recorded.
    """

    preparation: Preparation
    classes: tuple[str, ...]
    data: str = ""
    accuracy: str = ""

    @property
    def data_name(self) -> str:
        """The data set's name; of a file or folder of the user's own the last part only: where it lies is his."""
        return self.data if self.data in NAMES else PurePath(self.data.replace("\\", "/")).name


def code(text: str) -> str:
    """Return any text as code in Markdown that it cannot break out of (CommonMark 0.31, section 6.1)."""
    shown = printable(text)
    longest = max(map(len, re.findall("`+", shown)), default=0)
    ticks = "`" * (longest + 1)
    return f"{ticks} {shown} {ticks}" if longest or not shown.strip() else f"`{shown}`"


def card(model: Any, to: str, facts: Facts, dtype: str, notes: list[str]) -> str:
    """Return the README.md of a folder with an exported ViT, with what YAML the hub reads before it."""
    s = model.settings
    library = {"timm": "timm", "huggingface": "transformers"}.get(to, to)
    size = " × ".join(map(str, s.image_shape))
    patch = "×".join(map(str, model.patch_embed.patch_size))
    classes = ", ".join(code(shortened(name, 60)) for name in facts.classes[:FEW_CLASSES])
    more = len(facts.classes) - FEW_CLASSES
    lines = [
        "---", f"library_name: {library}", "pipeline_tag: image-classification", "tags:",
        "- image-classification", "- vision-transformer", "- minivit", "---", "",
        f"# Vision Transformer, {plural(s.depth, 'block')} of {s.dim} numbers, {patch} patches", "",
        f"An image classifier (Dosovitskiy et al. 2020, arXiv 2010.11929) of {model.num_parameters():,} parameters, "
        f"{dtype}, written by minivit.", "",
        f"- **Images:** {size} (channels × height × width). Pictures are prepared so: "
        f"{facts.preparation.text(*s.image_shape[1:])}, of pixels from 0 to 1.",
        f"- **Architecture:** {code(s.sizes)}",
        f"- **Trained on:** {code(facts.data_name) if facts.data_name else 'not recorded'}",
        f"- **Accuracy:** {facts.accuracy or 'not recorded'}",
        f"- **Classes ({s.num_classes:,}):** {classes}{f' and {more:,} more' if more > 0 else ''}",
        *(f"- **Note:** {note}." for note in notes),
        "", "## Use", "", "```python", USES[to], "```", "",
        "In minivit: `minivit predict FOLDER picture.png`, or `mv.load_model(\"FOLDER/model.safetensors\")`.", "",
    ]  # fmt: skip
    return "\n".join(lines)


USES = {
    "timm": """import timm, torch
from PIL import Image

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
logits = model(prepare(Image.open("picture.png").convert(MODE))[None])
label = model.pretrained_cfg["label_names"][logits.argmax()]""",
    "huggingface": """import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("FOLDER").eval()
prepare = AutoImageProcessor.from_pretrained("FOLDER")
logits = model(**prepare(Image.open("picture.png").convert(MODE), return_tensors="pt")).logits
label = model.config.id2label[logits.argmax().item()]""",
}
"""How a folder is used in each system; FOLDER and MODE are filled in by the reader."""


def onnx_about(s: Any, facts: Facts) -> dict[str, str]:
    """Return the metadata of an ONNX file: how images are prepared, classes, what it was trained on."""
    p = facts.preparation
    found = {
        "preparation": p.text(*s.image_shape[1:]), "fit": p.fit, "mean": json.dumps(p.mean), "std": json.dumps(p.std),
        "pixels": "images / 255, RGB or grey, then (x - mean) / std of each channel; (batch, channels, height, width)",
        "classes": json.dumps(facts.classes), "data": printable(facts.data_name), "accuracy": facts.accuracy,
        "settings": json.dumps(s.config), "producer": "minivit",
    }  # fmt: skip
    return {name: text for name, text in found.items() if text}
