"""What a recorded training step is made of, counted: kernels and copies, bytes that they read and write, waits.

Nothing is computed: kernels and products are noted by the stand-ins for CuPy and cuBLASLt, and not run.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest

import minivit as mv
from minivit import ops
from minivit.errors import NonFiniteError
from minivit.models import build, configuration
from minivit.runs.recipes import recipe_model
from minivit.train.ema import EMA
from minivit.train.optim import AdamW, Muon
from tests import fake_cublaslt, strict

ROWS = 16
TI4 = ("vit", {"image_size": 32, "patch_size": 4, "dim": 192, "depth": 12, "heads": 3})
DROPPING = ("vit", {**TI4[1], "drop_path": 0.1})
# The other models and a ViT's options, few of each layer: narrow, and of few pixels, which changes no number of nodes,
# because what no kernel serves is computed.
NARROW: dict[str, Any] = {"image_size": 8, "dim": 48, "heads": 3}
TWO: dict[str, Any] = NARROW | {"patch_size": 4, "depth": 2}
OPTIONS = {"mlp": "swiglu", "layer_scale": 1e-5, "position": "relative", "tokenizer": "conv_stem"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "digits": recipe_model("digits"), "cifar": recipe_model("cifar10"), "6 blocks": configuration("vit_cifar"),
    "Ti/4": TI4, "Ti/4, drop path": DROPPING,
    "CCT": ("cct", {**configuration("cct_2_3x2_32").settings, **NARROW, "mlp_dim": 96}),
    "T2T": ("vit", {**configuration("t2t_vit_7").settings, **NARROW, "image_size": 16, "mlp_dim": 96, "depth": 1}),
    "hybrid": ("hybrid", {**configuration("hybrid_cifar").settings, **NARROW, "width": 32, "depth": 1}),
    "ResNet": ("resnet", {**configuration("resnet_cifar").settings, "image_size": 8, "width": 16}),
    "RMSNorm and qk-norm": ("vit", TWO | {"norm": "rms", "qk_norm": True}), "options": ("vit", TWO | OPTIONS),
}  # fmt: skip
# the most kernels, copies and fillings, and the most MB read and written, of a step of ROWS images
BUDGET = {
    ("digits", "bfloat16", "adamw"): (128, 17), ("digits", "float32", "adamw"): (267, 23),
    ("digits", "bfloat16", "muon"): (327, 85), ("cifar", "bfloat16", "muon"): (312, 243),
    ("cifar", "bfloat16", "adamw"): (113, 91), ("cifar", "float32", "adamw"): (252, 325),
    ("6 blocks", "bfloat16", "adamw"): (151, 373),
    ("Ti/4", "bfloat16", "adamw"): (271, 767), ("Ti/4", "float32", "adamw"): (698, 1861),
    ("Ti/4, drop path", "bfloat16", "adamw"): (336, 823), ("CCT", "bfloat16", "adamw"): (205, 34),
    ("T2T", "bfloat16", "adamw"): (294, 40), ("hybrid", "bfloat16", "adamw"): (449, 25),
    ("ResNet", "bfloat16", "adamw"): (1532, 259), ("RMSNorm and qk-norm", "bfloat16", "adamw"): (114, 10),
    ("options", "bfloat16", "adamw"): (482, 21),
}  # fmt: skip


def noted(plan: Any) -> Any:
    def launch(grid: Any, args: tuple[Any, ...], places: Any) -> None:
        strict.launch(plan.factory, lambda: None, [x for x in args if isinstance(x, strict.ndarray)], ())

    return launch


@pytest.mark.parametrize("case", BUDGET, ids=" ".join)
def test_a_step_keeps_to_its_budget(strict_cupy, monkeypatch, case):
    name, precision, optimizer = case
    monkeypatch.setattr("minivit.backend.tile._load", noted)
    monkeypatch.setattr(
        "minivit.backend.tile._device", lambda: "the budget's"
    )  # what is kept for others is none of these
    monkeypatch.setattr(fake_cublaslt, "_multiply", lambda *arrays: None)
    model = build(*MODELS[name]).to("cuda")
    assert name[:4] != "Ti/4" or (len(model.blocks), model.pos_embed.shape) == (12, (1, 65, 192))
    opt = (AdamW if optimizer == "adamw" else Muon)(model.named_parameters(), lr=1e-3)
    step = mv.TrainStep(
        model, opt, partial(ops.cross_entropy, smoothing=0.1), clip_norm=1.0, precision=precision,
        ema=EMA(opt.store, 0.999),
    )  # fmt: skip
    images, labels = np.zeros((ROWS, *model.settings.image_shape), np.float32), np.zeros(ROWS, np.int64)
    step.submit(images, labels)
    counters = strict_cupy.counters
    counters.reset()
    step.submit(images, labels)  # recorded, and replayed
    assert step.why_launched == ""
    [nodes], read_and_written = step.underway.capture.nodes().values(), counters.bytes / 1e6
    names = counters.launched - Counter(setitem=2)  # of images and labels into the arrays that the graph reads
    table = "\n".join(f"{count:5d}  {kernel}" for kernel, count in names.most_common())
    most, megabytes = BUDGET[case]
    assert nodes == names.total()
    assert nodes <= most and read_and_written <= megabytes, f"{nodes} nodes, {read_and_written:.1f} MB:\n{table}"

    counters.reset()
    submitted = step.submit(images, labels)
    assert counters.launched == {"setitem": 2} and counters.syncs == 0
    assert counters.transfers == 3  # images, labels; the report on its way back
    assert counters.transfer_bytes == images.nbytes + labels.nbytes + 48
    with pytest.raises(NonFiniteError):  # nothing was computed
        submitted.totals()
