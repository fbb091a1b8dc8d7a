"""A ViT trained elsewhere, as a state dict of timm's names, is loaded by hand, studied, explained and drawn.

What it computes is written here in plain NumPy, as whoever trained it had it: minivit's numbers are held against that.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minivit as mv
from minivit.backend import Key, normal, random_bits
from minivit.cli.main import OK, main
from minivit.data import Dataset
from tests.test_explain import arrays_of

SIDE, PATCH, DIM, HEADS, DEPTH, HIDDEN = 8, 4, 12, 2, 2, 20
CLASSES = ("cat", "dog", "</script>")
erf = np.vectorize(math.erf)


def state_of_elsewhere() -> dict[str, np.ndarray]:
    """Return parameters as torch has them: a Linear's weight is (out, in), a convolution's (out, in, P, P)."""
    shapes = {"patch_embed.proj": (DIM, 3, PATCH, PATCH), "head": (len(CLASSES), DIM)}
    for i in range(DEPTH):
        shapes |= {f"blocks.{i}.attn.qkv": (3 * DIM, DIM), f"blocks.{i}.attn.proj": (DIM, DIM)}
        shapes |= {f"blocks.{i}.mlp.fc1": (HIDDEN, DIM), f"blocks.{i}.mlp.fc2": (DIM, HIDDEN)}
    norms = ["norm", *(f"blocks.{i}.norm{j}" for i in range(DEPTH) for j in (1, 2))]
    tokens = (SIDE // PATCH) ** 2 + 1
    state: dict[str, Any] = {"cls_token": (1, 1, DIM), "pos_embed": (1, tokens, DIM)}
    state |= {f"{name}.weight": shape for name, shape in shapes.items()}
    state |= {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
    state |= {f"{name}.{what}": (DIM,) for name in norms for what in ("weight", "bias")}
    made = {name: 0.4 * normal(Key(7, stream=i), shape) for i, (name, shape) in enumerate(state.items())}
    return {name: (x + 1 if name.endswith("norm.weight") else x).astype(np.float32) for name, x in made.items()}


def elsewhere(state: dict[str, np.ndarray], images: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the logits (B, K) and each block's attention (B, H, T, T) of images (B, C, H, W), in float64."""
    p = {name: x.astype(np.float64) for name, x in state.items()}
    linear = lambda x, name: x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p[f"{name}.weight"] + p[f"{name}.bias"]

    size, n, seen = len(images), SIDE // PATCH, []
    patches = images.reshape(size, 3, n, PATCH, n, PATCH).transpose(0, 2, 4, 1, 3, 5).reshape(size, n * n, -1)
    x = patches @ p["patch_embed.proj.weight"].reshape(DIM, -1).T + p["patch_embed.proj.bias"]
    x = np.concatenate([np.repeat(p["cls_token"], size, 0), x], axis=1) + p["pos_embed"]
    for i in range(DEPTH):
        qkv = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attn.qkv")
        q, k, v = qkv.reshape(size, -1, 3, HEADS, DIM // HEADS).transpose(2, 0, 3, 1, 4)
        scores = np.exp(q @ k.swapaxes(-1, -2) / math.sqrt(DIM // HEADS))
        seen.append(scores / scores.sum(-1, keepdims=True))
        x = x + linear((seen[-1] @ v).swapaxes(1, 2).reshape(x.shape), f"blocks.{i}.attn.proj")
        h = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.fc1")
        x = x + linear(h * (1 + erf(h / math.sqrt(2))) / 2, f"blocks.{i}.mlp.fc2")
    return linear(norm(x, "norm")[:, 0], "head"), seen


@pytest.fixture
def loaded(here: Path) -> tuple[dict[str, np.ndarray], Dataset]:
    """The state, and the images; in the folder the state as an archive, and the checkpoint made of it by hand."""
    np.savez("state.npz", **state_of_elsewhere())  # type: ignore[arg-type]
    images = (random_bits(Key(1), (9, 3, SIDE, SIDE)) >> 24).astype(np.uint8)
    data = Dataset(images, np.arange(9) % 3, CLASSES, "somebody's photographs")
    model = mv.ViT(image_size=SIDE, patch_size=PATCH, dim=DIM, depth=DEPTH, heads=HEADS, mlp_dim=HIDDEN, num_classes=3)
    model.load_state_dict(np.load("state.npz"))
    mv.save(model, "model.npz", data=data)
    np.savez("test.npz", images=images, labels=data.labels, classes=np.array(CLASSES))
    return state_of_elsewhere(), data


def test_its_page_has_the_numbers_of_elsewhere(loaded: tuple[dict[str, np.ndarray], Dataset], capsys: Any) -> None:
    state, data = loaded
    assert main(["explain", "model.npz", "test.npz", "--index", "4"]) == OK
    logits, seen = elsewhere(state, mv.data.standardize(data.images[4:5], data.mean, data.std))
    assert f"is read as “{CLASSES[logits[0].argmax()]}”" in capsys.readouterr().out
    _, arrays = arrays_of(Path("explain.html").read_text())
    np.testing.assert_allclose(arrays["logits"], logits[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(arrays["p"], np.stack(seen)[:, 0], rtol=1e-4, atol=1e-6)


def test_it_is_studied_and_drawn(loaded: tuple[dict[str, np.ndarray], Dataset], capsys: Any) -> None:
    state, data = loaded
    assert main(["study", "model.npz", "test.npz", "--split", "all", "-o", "out"]) == OK
    logits, seen = elsewhere(state, mv.data.standardize(data.images, data.mean, data.std))
    found = json.loads(Path("out/figures.json").read_text())
    assert found["right"] == (logits.argmax(1) == data.labels).sum() and found["images"] == 9
    bits = [-(p * np.log2(p)).sum(-1).mean(axis=(0, 2)) for p in seen]  # (B, H, T) → (H,)
    np.testing.assert_allclose(found["figures"]["entropy"]["trained"]["bits"], bits, rtol=1e-4)
    assert main(["graph", "model.npz", "-o", "tape.svg"]) == OK
    assert "noise" in capsys.readouterr().out


def test_what_it_was_trained_on_is_asked_for(loaded: tuple[dict[str, np.ndarray], Dataset], capsys: Any) -> None:
    for command, remedy in (("study", "name the data after"), ("explain", "name an image file after")):
        assert main([command, "model.npz"]) == 1
        said = capsys.readouterr().err
        assert "the data that model.npz was trained on are not there: unknown data set" in said and remedy in said
