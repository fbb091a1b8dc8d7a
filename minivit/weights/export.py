"""Models out of minivit: files that timm, Hugging Face's transformers, Google's vit_jax and ONNX runtimes read."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minivit.data import Dataset
from minivit.data.dataset import class_names
from minivit.data.preparation import Preparation
from minivit.errors import CheckpointError, ConfigError, unknown_name
from minivit.files import check_place, replacing, sync, write_text
from minivit.weights.card import Facts, card, onnx_about
from minivit.weights.checkpoint import write_arrays
from minivit.weights.configs import foreign_fit, hf_config, hf_preparation, timm_config
from minivit.weights.expressed import GOOGLE, HF, ONNX, SYSTEMS, TIMM, arrays_for, check_kind
from minivit.weights.native import check_data, check_described
from minivit.weights.onnx_graph import build_graph
from minivit.weights.safetensors import differing, write_safetensors
from minivit.weights.stored import open_stored

FILES = ("README.md", "config.json", "model.safetensors", "preprocessor_config.json")
"""What an exported folder holds, and no other is ever replaced."""


def export(
    model: Any, path: str | Path, to: str, *, data: Dataset | None = None, overwrite: bool = False,
    tell: Callable[[str], object] | None = None,
) -> None:  # fmt: skip
    """Write a model for another system; ``to`` is one of these:

    - "timm": a folder of model.safetensors, config.json and README.md, for ``timm.create_model("local-dir:PATH")``;
    - "huggingface": the same with preprocessor_config.json, for transformers' ``from_pretrained``; DeiT's where the
      model has a distillation token;
    - "google": vit_jax's .npz;
    - "onnx": an ONNX file, ``images`` (batch, C, H, W) → ``logits``, of float32 and of any batch (package onnx).

    A ViT can go to all of them, with what each has a place for; a hybrid to timm, Google and ONNX, as its ``stem_eps``
    says; CCT, T2T-ViT, ResNets and whatever else has blocks of minivit's own to ONNX.

    Arrays keep their bits and dtype, but that Google's of 16 bits are widened to float32, and that ONNX is float32.
    ``data``, the images that the model was trained on, says how pictures are prepared and what the classes are called;
    without it a model whose weights came from elsewhere keeps its own. ``tell`` is called with a line for what is not
    quite as here. ::

        mv.export(model, "digits-hf", "huggingface", data=train_images)

    Files and folders are whole or not there. Raises ConfigError for what the layout cannot express, where something is
    there and ``overwrite`` is not given, and for a model of unknown preparation; CheckpointError if it cannot be
    written.
    """
    if to not in SYSTEMS:
        raise unknown_name("system", to, SYSTEMS)
    check_kind(model, to)
    preparation, classes, name = model.preparation, model.class_names, ""
    if data is not None:
        check_data(model, data)
        preparation, classes, name = Preparation(data.fit, tuple(data.mean), tuple(data.std)), data.classes, data.name
    if preparation is None:
        raise ConfigError(
            "nobody knows how images are prepared for this model", "give data, the images of its training"
        )
    names = tuple(class_names(classes, model.settings.num_classes))
    for note in write_export(model, path, to, Facts(preparation, names, name), overwrite):
        if tell is not None:
            tell(note)


def write_export(model: Any, path: str | Path, to: str, facts: Facts, overwrite: bool = False) -> list[str]:
    """Do what :func:`export` does with ``facts`` about the model; return what is not quite as in minivit."""
    if to not in SYSTEMS:
        raise unknown_name("system", to, SYSTEMS)
    check_kind(model, to)
    check_described(model, model.state_dict())
    path = Path(path)
    if not path.name or "\0" in str(path):
        raise ConfigError(f"{str(path)!r} is no name of a file", "give the path of the file or folder to write")
    _check_free(path, to, overwrite)
    try:
        if to in (TIMM, HF):
            return _write_folder(model, path, to, facts)
        path.parent.mkdir(parents=True, exist_ok=True)
        return (_write_onnx if to == ONNX else _write_google)(model, path, facts)
    except OSError as error:
        what = f"cannot write {path}: {error.strerror or error}"
        raise CheckpointError(what, "make room or name another folder; what was there before is whole") from error


def _check_free(path: Path, to: str, overwrite: bool) -> None:
    """Raise ConfigError where something is at ``path`` that must not be replaced."""
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise ConfigError(f"{path} is there already", "name another, or say that it may be replaced: --overwrite")
    if to not in (TIMM, HF):
        if path.is_dir():
            raise ConfigError(f"{path} is a folder, and {to} is one file", "name a file")
        return
    if path.is_symlink() or not path.is_dir():
        raise ConfigError(
            f"{path} is a {'link' if path.is_symlink() else 'file'}, and {to} is a folder", "name another"
        )
    if others := sorted(set(os.listdir(path)) - set(FILES)):
        what = f"{path} is no folder of exported weights: it holds {others[0]}"
        raise ConfigError(what, "only such folders are replaced: name another")


def _dtype_of(arrays: Mapping[str, np.ndarray]) -> str:
    return " and ".join(sorted({array.dtype.name for array in arrays.values()}))


# ---- folders ---------------------------------------------------------------------------------------------------------


def _write_folder(model: Any, path: Path, to: str, facts: Facts) -> list[str]:
    """Write the folder beside its place, and rename it."""
    arrays, notes = arrays_for(model, to)
    s, dtype = model.settings, _dtype_of(arrays)
    untold = foreign_fit(facts.preparation)[1]
    tables: dict[str, Any] = {}
    if to == TIMM:
        pos = arrays.get("pos_embed")
        alone = pos is not None and bool(s.prefix) and pos.shape[1] == model.patch_embed.num_patches
        tables["config.json"] = timm_config(s, facts.preparation, facts.classes, alone)
    else:
        tables["config.json"] = hf_config(s, dtype, facts.classes)
        tables["preprocessor_config.json"], untold = hf_preparation(s, facts.preparation)
        if dtype != "float32":
            notes.append(f"transformers makes the model {dtype}; after model.float() it takes float32 images")
    notes += [untold] if untold else []
    mode = {1: '"L"', 3: '"RGB"', 4: '"RGBA"'}.get(s.in_channels, "MODE")
    text = card(model, to, facts, dtype, notes).replace("convert(MODE)", f"convert({mode})")
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f".{os.fsdecode(os.fsencode(path.name)[:150])}.{os.urandom(8).hex()}.minivit-tmp")
    made.mkdir()
    try:
        with replacing(made / "model.safetensors") as f:
            write_safetensors(f, arrays, {"format": "pt"})
        stored = open_stored(made / "model.safetensors")
        if stored is None or (wrong := differing(stored, arrays)) is not None:
            raise CheckpointError(f"{path}: {wrong} did not come back from the disk as written", "check the disk")
        for name, table in tables.items():
            write_text(made / name, json.dumps(table, indent=2) + "\n")  # in ASCII, whatever a class is called
        write_text(made / "README.md", text)
        _take_place(made, path)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return notes


def _take_place(made: Path, path: Path) -> None:
    """Rename a folder to ``path``, where nothing is, or an exported folder that may go.

    A process that is killed between the two renames leaves the old one beside its place, under a hidden name.
    """
    before = None
    if os.path.lexists(path):
        before = path.with_name(f"{made.name}-old")
        os.rename(path, before)
    try:
        os.rename(made, path)
    except OSError:
        if before is not None:
            os.rename(before, path)
        raise
    sync(path.parent)
    if before is not None:
        shutil.rmtree(before, ignore_errors=True)


# ---- files -----------------------------------------------------------------------------------------------------------


def _write_google(model: Any, path: Path, facts: Facts) -> list[str]:
    s = model.settings
    arrays, notes = arrays_for(model, GOOGLE)
    check_place(path)
    with replacing(path) as f:
        with zipfile.ZipFile(f, "w", zipfile.ZIP_STORED) as archive:
            write_arrays(archive, {name: np.asarray(array, order="C") for name, array in arrays.items()})
        if (wrong := _not_in_archive(f, arrays)) is not None:
            raise CheckpointError(f"{path}: {wrong} did not come back from the disk as written", "check the disk")
    p = facts.preparation
    if set(p.mean) | set(p.std) != {0.5} or foreign_fit(p)[0][:2] != ("squash", "bilinear"):
        prepared = p.text(*s.image_shape[1:])
        notes.append(
            f"the file cannot say how images are prepared, and Google's code scales them to ±1; do: {prepared}"
        )
    if s.activation == "gelu":
        notes.append("Google's code approximates GELU by tanh, this model computes it by erf: there its logits differ")
    if s.image_shape[1] != s.image_shape[2] or s.position == "none":
        notes.append("the file cannot say the size of its images: build the model for it, and use mv.load_weights")
    return notes


def _not_in_archive(f: BinaryIO, arrays: Mapping[str, np.ndarray]) -> str | None:
    f.seek(0)
    with np.load(f, allow_pickle=False) as found:
        for name, array in arrays.items():
            if name not in found or found[name].tobytes() != np.asarray(array, order="C").tobytes():
                return name
    f.seek(0, os.SEEK_END)
    return None


def _write_onnx(model: Any, path: Path, facts: Facts) -> list[str]:
    s = model.settings
    made = build_graph(
        model, onnx_about(s, facts), f"A {type(model).__name__} of {model.num_parameters():,} parameters"
    )
    with replacing(path) as f:
        f.write(made.SerializeToString())
    dtype = _dtype_of(model.state_dict())
    if dtype == "float32":
        return []
    how = "rounded to" if "float64" in dtype else "written, without loss, as"
    return [f"the model's {dtype} numbers are {how} float32, in which the graph computes"]
