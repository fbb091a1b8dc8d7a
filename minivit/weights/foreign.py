"""Weights from other systems' files, recognised by the names in them: LAYOUTS."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from minivit.errors import CheckpointError, ConfigError, MisfitError, value_text
from minivit.models import model_outline, read_settings
from minivit.models.adapt import first_weight
from minivit.models.vit_settings import FIXED
from minivit.nn.bottleneck import resnet_stride
from minivit.nn.rules import pair
from minivit.weights import google, huggingface, lucidrains, shi_labs, timm, yitu
from minivit.weights.checkpoint import Checkpoint
from minivit.weights.misfits import misfits
from minivit.weights.names import Layout, Sizes, general_name
from minivit.weights.stored import Entry, Stored, open_stored, table_beside, unusable

LAYOUTS = (
    google.LAYOUT, huggingface.LAYOUT, huggingface.DEIT, lucidrains.LAYOUT, shi_labs.LAYOUT, yitu.LAYOUT, timm.LAYOUT,
)  # fmt: skip
"""What is known, in the order in which it is tried: timm's last, some of whose names others have, too."""
_DESCRIBED = (huggingface.LAYOUT, huggingface.DEIT, timm.LAYOUT)
"""Those beside whose files a config.json says more of them."""
_NO_HEAD = "the file has no head: mv.create_model(name, weights=path, num_classes=…) gives it a new one"


@dataclass(frozen=True)
class Foreign:
    """A file of another system: its ``entries`` under the names of its ``layout``, the tables beside it."""

    stored: Stored
    layout: Layout
    entries: Mapping[str, Entry]
    config: Mapping[str, Any]
    preparation: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """Where it lies."""
        return self.stored.path

    # ---- what model it holds ----

    @property
    def kind(self) -> str:
        """The kind of model: with a ResNet before the patches it is another one."""
        if self.layout.kind == "vit" and any(self.shape(f"{root}conv.weight", Sizes()) for root in _ROOTS):
            return "hybrid"
        return self.layout.kind

    def shape(self, ours: str, sizes: Sizes) -> tuple[int, ...] | None:
        """Return the shape that one of our parameters has in the file; None if it has none, or not such a one."""
        row = self.layout.row(ours)
        if row is None or any(name not in self.entries for name in row.theirs):
            return None
        try:
            shapes = [self.entries[name].shape for name in row.theirs]
            parts = [row.form.read(np.broadcast_to(np.float32(0), s), sizes).shape for s in shapes]
        except ValueError:
            return None
        return (sum(s[0] for s in parts), *parts[0][1:]) if len(parts) > 1 else parts[0]

    def settings(self) -> dict[str, Any]:
        """Return what the file says of its model's settings: of its shapes, and of config.json."""
        said = self.layout.settings_of(self.entries, self.config)
        if self.layout.sizes_of is not None:
            try:
                return self.layout.sizes_of(self.entries) | said
            except ValueError as error:
                what = f"{self.path} ({self.layout.name}) is no model that minivit has: {error}"
                raise CheckpointError(what, _ASK) from error
        side = said.pop("patch_size", 1)
        sizes = Sizes(patch=(side, side))
        found = {name: self.shape(name, sizes) for name in _TELLING}
        depth = self._count("blocks.{}.norm1.weight")
        patch, fc2, qkv = (found[name] for name in _TELLING[:3])
        if patch is None or len(patch) != 4 or fc2 is None or len(fc2) != 2 or qkv is None or len(qkv) != 2:
            raise CheckpointError(f"{self.path} ({self.layout.name}) is no ViT: {self._lacking()}", _ASK)
        out = {
            "patch_size": patch[2] if patch[2] == patch[3] else patch[2:], "in_channels": patch[1], "dim": patch[0],
            "depth": depth, "mlp_dim": fc2[1], "qkv_bias": found["blocks.0.attn.qkv.bias"] is not None,
            "position": "learned" if self._has("pos_embed") else "none",
            "head": "mlp" if found["pre_logits.weight"] is not None else "linear",
        } | self._options(found, fc2[1]) | said  # fmt: skip
        head = found["head.weight"]
        if head is not None and len(head) == 2:
            out["num_classes"] = head[0]
        if "heads" not in out and qkv[0] % (3 * 64) == 0:
            out["heads"] = qkv[0] // (3 * 64)  # as in all of the usual models
        if type(out.get("heads")) is int and out["heads"] > 0 and qkv[0] % (3 * out["heads"]) == 0:
            out["dim_head"] = qkv[0] // (3 * out["heads"])
        out |= self._stem(patch)
        return out | self._image_size(out)

    def _stem(self, patch: tuple[int, ...]) -> dict[str, Any]:
        """Return the settings of a ResNet before patches whose weight has the shape ``patch``, {} if there is none."""
        root = next((found for at in _ROOTS if (found := self.shape(f"{at}conv.weight", Sizes()))), None)
        if root is None:
            return {}
        if len(root) != 4:
            raise CheckpointError(f"{self.path} ({self.layout.name}): the root of its ResNet is of shape {root}", _ASK)
        stages: list[int] = []
        while depth := self._count(f"patch_embed.backbone.stages.{len(stages)}.blocks.{{}}.conv1.weight"):
            stages.append(depth)
        stride = resnet_stride(stages)
        p, q = patch[2] * stride, patch[3] * stride
        sizes = {"patch_size": p if p == q else (p, q), "in_channels": root[1]}
        return {"stages": tuple(stages), "width": root[0], **sizes}

    def _count(self, name: str) -> int:
        """Return how many numbers, from 0 on, put into ``name`` make one of ours that is there."""
        return next(i for i in itertools.count() if self.shape(name.format(i), Sizes()) is None)

    def _options(self, found: Mapping[str, tuple[int, ...] | None], hidden: int) -> dict[str, Any]:
        """Return the settings of what not every ViT has, by what is there of it."""
        registers, fc1 = found["reg_token"], found["blocks.0.mlp.fc1.weight"]
        has_class = self._has("cls_token")
        norm_after = found["fc_norm.weight"] is not None and found["norm.weight"] is None
        pool = "cls" if has_class and not norm_after else "mean"
        return {
            "pool": "map" if found["attn_pool.latent"] is not None else pool,
            "class_token": has_class, "distilled": found["head_dist.weight"] is not None,
            "registers": registers[1] if registers is not None and len(registers) == 3 else 0,
            "fc_norm": norm_after,
            "layer_scale": None if found["blocks.0.ls1.gamma"] is None else 1e-5,
            "qk_norm": found["blocks.0.attn.q_norm.weight"] is not None,
            "norm": "rms" if found["blocks.0.norm1.bias"] is None else "layer",
            "mlp": "swiglu" if fc1 is not None and fc1[0] == 2 * hidden else "mlp",
        }  # fmt: skip

    def _has(self, ours: str) -> bool:
        row = self.layout.row(ours)
        return row is not None and all(n in self.entries and math.prod(self.entries[n].shape) for n in row.theirs)

    def _lacking(self) -> str:
        words = {text for name in self.entries for part, text in self.layout.lacking.items() if part in name}
        if words and self.kind == "vit":
            return f"it has {', '.join(sorted(words))}"
        wanted = [row.theirs for name in _TELLING[:3] if (row := self.layout.row(name)) is not None]
        return f"it has no {', '.join(n for names in wanted for n in names)}, or of other shapes"

    def positions(self) -> int:
        """Return the number of positions in the file, 0 if it has none."""
        row = self.layout.row("pos_embed")
        shape = self.entries[row.theirs[0]].shape if row and row.theirs[0] in self.entries else ()
        return shape[-2] if len(shape) > 1 else 0

    def _image_size(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the size of the images, config.json's or a square's, and whether all tokens have positions."""
        p, q = (settings["patch_size"],) * 2 if isinstance(settings["patch_size"], int) else settings["patch_size"]
        given, count = settings.get("image_size"), self.positions()
        beside = settings["class_token"] + settings["distilled"] + settings["registers"]
        if given is not None:
            size = tuple(given) if isinstance(given, list) else given
            height, width = self._pair(size)
            alone = 0 < count == (height // max(p, 1)) * (width // max(q, 1)) and beside > 0
            return {"image_size": size, "no_embed_class": alone}
        for alone in (False, True):
            patches = count if alone else count - beside
            side = math.isqrt(max(patches, 0))
            if 0 < patches == side * side:
                return {"image_size": side * p if p == q else (side * p, side * q), "no_embed_class": alone}
        return {}

    def _pair(self, size: Any) -> tuple[int, int]:
        try:
            return pair("image_size", size)
        except ConfigError as error:
            raise CheckpointError(f"{self.path}: config.json: {error.what}", error.remedy) from error

    def about(self, classes: int, channels: int) -> dict[str, Any]:
        """Return what is known of images and classes, as a checkpoint's meta has it: its ``data``."""
        found = self.layout.data_of(self.config, self.preparation)
        for key in ("mean", "std"):
            if type(found.get(key)) in (int, float):
                found[key] = [float(found[key])] * channels
        labels = found.get("classes")
        if isinstance(labels, list) and len(labels) != classes:
            del found["classes"]  # of another head
        return {"data": found}

    # ---- its numbers ----

    def without_fixed(self, settings: Any) -> Foreign:
        """Return it without the positions that a model with these settings makes itself, as the file's were made."""
        said = self.layout.settings_of(self.entries, self.config).get("position")
        row = self.layout.row("pos_embed")
        held = row is not None and row.theirs[0] in self.entries
        if row is None or not held or said not in FIXED or said != getattr(settings, "position", None):
            return self
        return replace(self, entries={name: e for name, e in self.entries.items() if name not in row.theirs})

    @property
    def dtype(self) -> Any:
        """The dtype of the arrays as they are read."""
        return np.float64 if any(e.is_double for e in self.entries.values()) else np.float32

    def grid(self, own: tuple[int, int], beside: int) -> tuple[int, int]:
        """Return rows and columns of the patches that the positions belong to.

        ``beside`` of them are other tokens'. They are those of config.json's image size; or ``own``, if they are as
        many; or else a square's.
        """
        patches = self.positions() - beside
        said = self.layout.settings_of(self.entries, self.config).get("image_size")
        shape = self.shape("patch_embed.proj.weight", Sizes())
        if said is not None and shape is not None and len(shape) == 4:
            height, width = self._pair(said)
            p, q = pair("patch_size", self._stem(shape).get("patch_size", shape[2:]))
            grid = height // max(p, 1), width // max(q, 1)
            if math.prod(grid) == patches:
                return grid
        if math.prod(own) == patches:
            return own
        side = math.isqrt(max(patches, 0))
        if side < 1 or side * side != patches:
            what = f"{self.path} ({self.layout.name}) has positions of {patches} patches, which are no square"
            raise CheckpointError(what, "put its config.json beside it, which says the size of its images")
        return side, side

    def _channels(self, first: str, sizes: Sizes) -> int:
        """Return the channels of the images that the weight ``first`` sees; 0 where rows of another patch hold them."""
        shape = self.shape(first, sizes)
        side = self.layout.settings_of(self.entries, self.config).get("patch_size")
        fits = side is None or sizes.patch == (side, side)
        return shape[1] if fits and shape is not None and len(shape) == 4 else 0

    def read(
        self, shapes: Mapping[str, tuple[int, ...]], heads: int, skip: tuple[str, ...] = ()
    ) -> dict[str, np.ndarray]:
        """Return our arrays, those of ``shapes``, by name; the number of positions, and of channels, may be another.

        ``skip`` are the beginnings of our names that are neither asked for nor missed. Raises MisfitError, with every
        name that is missing, unexpected or of another shape, before an array is read, and CheckpointError for one that
        is damaged.
        """
        patch = shapes.get("patch_embed.proj.weight", ())
        sizes = Sizes(heads, patch[2:] if len(patch) == 4 else (1, 1))
        wanted = {name: shape for name, shape in shapes.items() if not name.startswith(skip or (" ",))}
        if "pos_embed" in wanted and self.positions():
            wanted["pos_embed"] = (1, self.positions(), *wanted["pos_embed"][2:])  # which may be resized
        if (first := first_weight(wanted)) and (channels := self._channels(first, sizes)):
            wanted[first] = (wanted[first][0], channels, *wanted[first][2:])  # which may be spread over others
        if wrong := misfits(self.layout, self.entries, wanted, sizes, skip):
            raise MisfitError(f"{self.path} ({self.layout.name}) does not fit the model:\n  {wrong}", _ASK, {})
        state, dtype = {}, self.dtype
        # the largest first, and one in all blocks before the next: of a scan, a stack at a time is in memory
        order = sorted(wanted.items(), key=lambda item: (-math.prod(item[1]), general_name(item[0])))
        try:
            with self.stored.opened():
                for name, shape in order:
                    row = self.layout.row(name)
                    assert row is not None  # or it would be missing
                    if general_name(name) in self.layout.zero and row.theirs[0] not in self.entries:
                        state[name] = np.zeros(shape, dtype)
                        continue
                    state[name] = np.empty(shape, dtype)
                    row.read(self.entries, state[name], sizes)
        except CheckpointError:
            raise
        except (ValueError, OSError, BadZipFile) as error:
            raise unusable(self.path, error) from error
        return state


_TELLING = (
    "patch_embed.proj.weight", "blocks.0.mlp.fc2.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias",
    "blocks.0.mlp.fc1.weight", "blocks.0.norm1.bias", "blocks.0.ls1.gamma", "blocks.0.attn.q_norm.weight", "reg_token",
    "norm.weight", "fc_norm.weight", "attn_pool.latent", "pre_logits.weight", "head.weight", "head_dist.weight",
)  # fmt: skip
_ROOTS = ("patch_embed.backbone.stem.", "patch_embed.backbone.")
"""Where the root of a ResNet is; the second where it is all of it."""
_ASK = "build a model of the file's sizes: mv.load_model(path) does where the file says all, else mv.create_model"


def open_foreign(path: str | Path) -> Foreign | None:
    """Read what another system's file holds, without its numbers; None for what is of no known layout.

    Raises CheckpointError for a file that is damaged, made to mislead, or a pickle.
    """
    try:
        stored = open_stored(path)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        return None  # minivit's own reader says what to do
    if stored is None or "meta" in stored.entries:  # minivit's own, cut short
        return None
    for layout in LAYOUTS:
        try:
            entries = layout.entries_of(stored.entries)
        except ValueError as error:
            raise unusable(stored.path, error) from error
        if entries is not None:
            if any(name.endswith("running_mean") for name in entries):
                what = f"{path} ({layout.name}) holds a network with BatchNorm, which minivit has not"
                raise CheckpointError(what, "use one with GroupNorm, such as vit_small_r26_s32_224")
            beside = table_beside(stored.path, "config.json") if layout in _DESCRIBED else {}
            prepared = table_beside(stored.path, "preprocessor_config.json") if beside else {}
            return Foreign(stored, layout, entries, beside, prepared)
    names = ", ".join(list(stored.entries)[:3])
    what = f"{path} holds no known layout of a Vision Transformer: its arrays are {names or 'none'}, …"
    raise CheckpointError(what, f"known are minivit's own, {', '.join(layout.name for layout in LAYOUTS)}")


def converted(foreign: Foreign) -> Checkpoint:
    """Return another system's file as the checkpoint that minivit would have written of its model.

    Raises CheckpointError if file and config.json do not say all of its settings, or its arrays are not theirs.
    """
    settings = foreign.settings()
    if "num_classes" not in settings:
        raise CheckpointError(f"{foreign.path} ({foreign.layout.name}) holds no head", _NO_HEAD)
    if unknown := [key for key in ("heads", "image_size") if key not in settings]:
        what = f"{foreign.path} ({foreign.layout.name}) does not say {' and '.join(unknown)}"
        told = ", ".join(f"{key}=…" for key in unknown)
        remedy = f"say it, mv.create_model(NAME, weights=path, {told}), or build the model and mv.load_weights"
        beside = "put its config.json beside it, or " if foreign.layout in _DESCRIBED else ""
        raise CheckpointError(what, f"{beside}{remedy}")
    try:
        made = read_settings(foreign.kind, settings)
        outline = model_outline(foreign.kind, made.config, 16 * len(foreign.entries) + 64)
    except ConfigError as error:
        raise CheckpointError(f"{foreign.path}: its model cannot be made: {error.what}", error.remedy) from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{foreign.path}: its model cannot be made: {value_text(str(error))}", _ASK) from error
    shapes = {name: p.shape for name, p in outline.named_parameters()}
    state = foreign.without_fixed(made).read(shapes, settings["heads"])
    if (pos := state.get("pos_embed")) is not None and pos.shape != shapes["pos_embed"]:
        what = f"{foreign.path}: {pos.shape[1]} positions, but images of {settings['image_size']} make "
        raise CheckpointError(f"{what}{shapes['pos_embed'][1]}", "its config.json is another model's")
    meta = {
        "kind": foreign.kind,
        "model": made.config,
        **foreign.about(settings["num_classes"], settings["in_channels"]),
    }
    return Checkpoint({f"model/{name}": array for name, array in state.items()}, meta)
