"""Modules: their tree in print, each found once, and those who watch them run."""

from __future__ import annotations

import threading

import numpy as np

import minivit as mv
from minivit.nn.module import watching
from tests.test_vit import SMALL

TREE = """\
ViT
  (cls_token): Parameter(1 × 1 × 16)
  (pos_embed): Parameter(1 × 13 × 16)
  (patch_embed): PatchEmbed(3 × 12 × 8 in 3 × 4 patches)
    (proj): PatchProjection(3 × 4 × 2 → 16)
  (embed_drop): Dropout(p=0.1)
  (blocks.0-2): 3 × EncoderBlock
    (norm1): LayerNorm(16)
    (attn): MultiHeadAttention(4 heads of 4, p=0)
      (qkv): Linear(16 → 48, no bias)
      (proj): Linear(16 → 16)
      (drop): Dropout(p=0)
    (norm2): LayerNorm(16)
    (mlp): MLP(gelu)
      (fc1): Linear(16 → 40)
      (fc2): Linear(40 → 16)
      (drop): Dropout(p=0)
    (drop_path): DropPath
  (norm): LayerNorm(16)
  (head): Linear(16 → 5)
{count} parameters"""


class Mixed(mv.nn.Module):
    """Everything that a module may hold, one of them twice, and itself."""

    def __init__(self):
        self.scale = mv.nn.Parameter(np.ones(()))
        self.heads = {"a": mv.nn.Linear(4, 2), "b": [mv.nn.Dropout(0.1), mv.nn.Dropout(0.1), mv.nn.LayerNorm(4)]}
        self.sizes = [1, 2]
        self.shared = self.heads["a"]
        self.itself = self

    def forward(self, x):
        return self.shared(x) + self.heads["a"](x)


def test_print_shows_a_models_tree():
    settings = {"drop_path": 0.3, "embed_dropout": 0.1, "qkv_bias": False, "heads": 4}
    model = mv.ViT(**SMALL | settings)
    assert repr(model) == TREE.format(count=f"{model.num_parameters():,}")
    assert repr(mv.nn.Linear(3, 4)) == "Linear(3 → 4)\n16 parameters"


def test_print_shows_own_modules_and_only_equal_neighbours_as_one():
    assert repr(Mixed()) == (
        "Mixed\n  (scale): Parameter(one number)\n  (heads.a): Linear(4 → 2)\n  (heads.b.0-1): 2 × Dropout(p=0.1)\n"
        "  (heads.b.2): LayerNorm(4)\n  (shared): Linear(4 → 2)\n  (itself): …\n19 parameters"
    )
    blocks = mv.ViT(**SMALL).blocks
    blocks[1] = mv.nn.EncoderBlock(16, 2, 8)
    other = mv.nn.Module()
    other.blocks, other.more = blocks, [mv.nn.Dropout(0.5)]
    shown = [line for line in repr(other).splitlines() if line.startswith("  (")]
    assert shown == [*[f"  (blocks.{i}): EncoderBlock" for i in range(3)], "  (more.0): Dropout(p=0.5)"]


def test_each_module_is_found_once():
    model = Mixed()
    assert [name for name, _ in model.named_modules()] == ["", "heads.a", "heads.b.0", "heads.b.1", "heads.b.2"]
    assert list(model.state_dict()) == ["scale", "heads.a.weight", "heads.a.bias", "heads.b.2.weight", "heads.b.2.bias"]
    assert not model.eval().shared.training


def test_watching_may_be_nested_and_tells_of_a_shared_module_once_each_time():
    model, x = Mixed(), np.ones((1, 4), np.float32)
    outer, inner = [], []
    with watching(model, lambda path, out: outer.append(path), before=lambda path: outer.append(f"<{path}")):
        model(x)
        with watching(model.shared, lambda path, out: inner.append((path, out.shape))):
            model(x)
        model(x)
    model(x)
    assert outer == ["<", "<heads.a", "heads.a", "<heads.a", "heads.a", ""] * 3
    assert inner == [("", (1, 2))] * 2
    assert "forward" not in vars(model) | vars(model.shared)


def test_watching_keeps_a_forward_of_the_models_own_and_leaves_other_threads_alone():
    model, seen = mv.nn.Dropout(0.0), []
    model.forward = lambda x: x + 1.0
    with watching(model, lambda path, out: seen.append(out.item())):
        assert model(np.float32(1.0)) == 2.0
        thread = threading.Thread(target=model, args=(np.float32(7.0),))
        thread.start()
        thread.join()
    assert model(np.float32(1.0)) == 2.0 and seen == [2.0]
