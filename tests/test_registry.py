"""Models by registry: an MLP-Mixer goes through every command; settings, outlines and kinds of checkpoints."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minivit as mv
from minivit.backend import normal, uniform
from minivit.backend.outline import Outline, outline
from minivit.cli.main import main
from minivit.errors import CheckpointError, ConfigError, DTypeError, MisfitError, ShapeError
from minivit.measure.costs import layer_costs, model_costs, training_memory
from minivit.models import (
    KINDS,
    MODELS,
    Model,
    Settings,
    build,
    create_model,
    described_settings,
    model_outline,
    register,
    setting,
)
from minivit.models.vit import ViTSettings
from minivit.nn.rules import count, seed, size
from minivit.runs.settings import resolve
from minivit.train.sharing import team_for
from minivit.weights.checkpoint import load_checkpoint, save_checkpoint
from minivit.weights.native import load_model, read_model
from minivit.weights.transfer import init_from
from tests.mixer import Mixer

TINY = {"image_size": 8, "tile": 4, "width": 6, "layers": 2, "num_classes": 3}


# ---- the proof: a model that is no ViT, by every command -------------------------------------------------------------


def test_a_mixer_goes_through_every_command(archive: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = ["train", str(archive), "--model", "mixer_tiny", "--set", "model.forget=0.1", "--set", "model.layers=2"]
    assert main([*train, "-e", "2", "--threads", "1", "--name", "whole", "-q"]) == 0
    assert main([*train, "-e", "2", "--threads", "1", "--name", "broken", "-q", "--dry-run"]) == 0
    assert main([*train, "-e", "1", "--set", "train.schedule_epochs=2", "--threads", "1", "--name", "half", "-q"]) == 0
    assert main(["train", "--resume", "runs/half", "-e", "2", "-q"]) == 0
    whole, half = (load_checkpoint(f"runs/{name}/checkpoints/last.npz") for name in ("whole", "half"))
    assert whole.meta["kind"] == "mixer" and whole.meta["model"]["forget"] == 0.1
    assert whole.under("model").keys() == Mixer(**whole.meta["model"]).state_dict().keys()
    for name, array in whole.under("model").items():
        assert np.array_equal(array, half.under("model")[name]), name
    assert not Path("runs/whole/attention.png").exists() and Path("runs/whole/report.html").exists()
    np.save("two.npy", mv.data.load("digits").images[:2])
    capsys.readouterr()
    for command in (
        ["eval", "runs/whole"],
        ["predict", "runs/whole", "two.npy"],
        ["compare", "runs/whole", "runs/half"],
    ):
        assert main(command) == 0, command
    for model in ("mixer_tiny", "runs/whole"):
        capsys.readouterr()
        assert main(["summary", model]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert {"stem", "mixers.0.tokens", "mixers.1.channels", "head", "total"} <= {
            line.split(" ")[0] for line in lines
        }
        assert main(["bench", model, "-b", "4", "--steps", "1"]) == 0
        assert "GFLOP" in capsys.readouterr().out
    assert main(["gradcheck", "mixer_tiny", "--order", "1"]) == 0
    assert "mixers.2.channels.fc1.weight" in capsys.readouterr().out
    assert main(["train", str(archive), "--init-from", "runs/whole", "-e", "1", "-q", "--name", "fine"]) == 0
    assert load_checkpoint("runs/fine/checkpoints/last.npz").meta["kind"] == "mixer"
    assert main(["summary", "--list", "mixer*"]) == 0
    assert str(create_model("mixer_tiny").num_parameters()) in capsys.readouterr().out.replace(",", "")


def test_settings_of_another_kind_are_refused(archive: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, key in (("mixer_tiny", "heads=2"), ("vit_digits", "tile=2")):
        assert main(["train", str(archive), "--model", model, "--set", f"model.{key}", "-e", "1"]) == 1
        assert f"has no setting 'model.{key[:-2]}' (command line)" in capsys.readouterr().err
    assert main(["train", str(archive), "--model", "mixer_tiny", "--set", "model.tile=3", "-e", "1"]) == 1
    assert "--set model.tile=N with N one of 1, 2" in capsys.readouterr().err
    assert main(["train", str(archive), "--model", "mixer_tiny", "--set", "model.reads=first", "-e", "1"]) == 1
    assert "model.reads is 'first' (command line)" in capsys.readouterr().err
    assert resolve({"model.name": "mixer_tiny"})["model.width"] == 8


def test_a_run_starts_from_a_model_of_its_own_kind(here: Path) -> None:
    mixer = Mixer(**TINY)
    mv.save(mixer, "a.npz")
    other = Mixer(**TINY | {"num_classes": 4, "seed": 1})
    assert init_from(other, "a.npz") == ["head: new, for 4 classes"]
    assert all((a == mixer.state_dict()[n]).all() for n, a in other.state_dict().items() if n[:4] != "head")
    assert not other.head.weight.data.any() and other.settings.num_classes == 4
    with pytest.raises(
        MisfitError, match=r"width is 6 there, 8 here\n  stem.proj.weight: \(6, 1, 4, 4\) there"
    ) as found:
        init_from(Mixer(**TINY | {"width": 8}), "a.npz")
    assert found.value.settings == {"width": 6}
    with pytest.raises(CheckpointError, match="a model of the kind mixer, this is a vit"):
        init_from(create_model("vit_digits"), "a.npz")


# ---- kinds of checkpoints --------------------------------------------------------------------------------------------


def test_a_checkpoint_says_its_kind_and_one_that_does_not_holds_a_vit(here: Path) -> None:
    for model in (Mixer(**TINY), create_model("vit_digits", depth=1)):
        mv.save(model, "a.npz")
        kept = load_checkpoint("a.npz")
        assert kept.meta["kind"] == model.kind
        assert type(load_model("a.npz")) is type(model) and load_model("a.npz").settings == model.settings
    del kept.meta["kind"]
    save_checkpoint("old.npz", kept.arrays, kept.meta)
    assert type(load_model("old.npz")) is mv.ViT and read_model("old.npz")[0].settings.depth == 1


@pytest.mark.parametrize("kind", ["mixxer", "", 7, ["vit"], None])
def test_an_unknown_kind_names_those_that_are_known(kind: Any, here: Path) -> None:
    mv.save(Mixer(**TINY), "a.npz")
    kept = load_checkpoint("a.npz")
    save_checkpoint("a.npz", kept.arrays, kept.meta | {"kind": kind})
    with pytest.raises(CheckpointError, match=r"a\.npz: unknown kind of model [^\"]*$") as found:
        load_model("a.npz")
    assert "mixer" in found.value.remedy and "vit" in found.value.remedy


# ---- registering -----------------------------------------------------------------------------------------------------


@pytest.fixture
def registries() -> Iterator[None]:
    before = [(table, dict(table)) for table in (KINDS, MODELS)]
    yield
    for table, entries in before:
        table.clear()
        table.update(entries)


@pytest.mark.usefixtures("registries")
def test_what_cannot_be_registered() -> None:
    @dataclass(frozen=True)
    class Few(Settings):
        image_size: int = setting(8, size, "of images")
        seed: int = setting(0, seed, "of the parameters")

    class Some(Model):
        Settings = Few

    with pytest.raises(ConfigError, match="Few has no in_channels, num_classes"):
        register("some")(Some)
    with pytest.raises(ConfigError, match="two models 'vit': ViT, Mixer"):
        register("vit")(Mixer)
    with pytest.raises(ConfigError, match="unknown setting 'wdth'\n  → did you mean 'width'"):
        register("mixer", configurations={"wrong": {"wdth": 3}})(Mixer)
    with pytest.raises(ConfigError, match="unknown kind of model 'vitt'"):
        build("vitt", {})


@pytest.mark.usefixtures("registries")
def test_a_kind_has_settings_of_its_own(here: Path) -> None:
    class Other(mv.ViT):
        pass

    with pytest.raises(ConfigError, match="'other': ViTSettings are the settings of 'vit'"):
        register("other")(Other)  # or a ViT saved from now on would be loaded as another
    mv.save(mv.ViT(image_size=8, dim=8, depth=1, heads=1), here / "vit.npz")
    assert type(load_model(here / "vit.npz")) is mv.ViT

    @dataclass(frozen=True)
    class Plain(ViTSettings):
        more: int = 3

    Other.Settings = Plain
    with pytest.raises(ConfigError, match="Plain: more without a rule"):
        register("other")(Other)
    with pytest.raises(ConfigError, match="the kind 3 is no text"):
        register(3)(Other)  # type: ignore[arg-type]
    for wrong in (mv.nn.Linear, type("Bare", (Model,), {})):
        with pytest.raises(ConfigError, match="is no Model with Settings"):
            register("wrong")(wrong)  # type: ignore[type-var]

    @dataclass(frozen=True)
    class OwnSettings(ViTSettings):
        more: int = setting(3, count, "of something")

    Other.Settings = OwnSettings
    with pytest.raises(ConfigError, match="two models 'vit_digits': of the kinds vit and other"):
        register("other", configurations={"vit_digits": {}})(Other)
    register("other")(Other)
    mv.save(Other(image_size=8, dim=8, depth=1, heads=1, more=5), here / "other.npz")
    again = load_model(here / "other.npz")
    assert type(again) is Other and again.settings.more == 5 and mv.ViT.Settings.kind == "vit"


def test_a_model_without_a_head_keeps_its_settings_when_none_can_be_replaced() -> None:
    model = Mixer()
    del model.head
    with pytest.raises(ConfigError, match="Mixer has no Linear called head"):
        model.reset_head(3)
    assert model.config["num_classes"] == 10


def test_settings_are_said_once() -> None:
    signature = inspect.signature(mv.ViT)
    assert [*signature.parameters][:5] == ["image_size", "patch_size", "in_channels", "num_classes", "dim"]
    assert signature.parameters["norm_eps"].default == 1e-6
    described = described_settings("vit")
    assert [*described] == [*signature.parameters]
    for name, (_, default, rule, doc) in described.items():
        assert rule(name, default) == default and doc
        assert f"``{name}``: {doc}." in (mv.ViT.__doc__ or "")
    model = mv.ViT(8, 4, 1, 3, dim=8, depth=1, heads=2, recompute=True)
    assert (model.settings.num_classes, model.settings.recompute, model.kind) == (3, True, "vit")
    assert "recompute" not in model.config and model.config["dim"] == 8
    with pytest.raises(FrozenInstanceError):
        model.settings.dim = 4
    with pytest.raises(TypeError, match="depht"):
        mv.ViT(depht=3)
    with pytest.raises(ConfigError, match="count is 0"):
        count("count", 0)


# ---- outlines --------------------------------------------------------------------------------------------------------

VITS: list[dict[str, Any]] = [
    {}, {"pool": "mean", "head": "mlp", "dropout": 0.1, "attention_dropout": 0.1, "embed_dropout": 0.1},
    {"activation": "silu", "drop_path": 0.2, "position": "none"}, {"activation": "gelu_tanh", "dim_head": 5},
    {"pool": "none", "activation": "tanh", "weight_init": "mimetic"},
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("mixer", TINY), *[("vit", {"image_size": (8, 16), "depth": 4, "dim": 24, "heads": 3} | more) for more in VITS],
     ("vit", {"image_size": 72, "patch_size": 4, "depth": 1, "dim": 8, "heads": 2})],
)  # fmt: skip
def test_an_outline_costs_what_the_model_costs(kind: str, settings: dict[str, Any]) -> None:
    model = build(kind, settings)
    real = layer_costs(model, normal(mv.Key(1), (1, *model.settings.image_shape)).astype(np.float32))
    outlined = model_outline(kind, settings)
    assert {n: (p.shape, p.dtype) for n, p in outlined.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in model.named_parameters()
    }
    assert layer_costs(outlined, outline((1, *model.settings.image_shape))) == real
    for costs in (model_costs(outlined), model_costs(model)):
        assert costs.total.parameters == model.num_parameters()
        assert (costs.total.flops, costs.total.kept) == (
            sum(row.flops for row in real.values()),
            sum(row.kept for row in real.values()),
        )


def test_what_is_alike_in_the_middle_is_one_row() -> None:
    names = [name for name, row in model_costs(create_model("vit_digits", depth=6)).rows if row.flops]
    blocks = [name for name in names if name.startswith("blocks")]
    shown = [f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn", "mlp")]
    assert blocks == [*shown, "blocks.2 … 4", "blocks.5.attn", "blocks.5.mlp"]


def test_recomputing_saves_memory_in_the_estimate() -> None:
    plain, again = (create_model("vit_digits", recompute=on) for on in (False, True))
    plain_peak, again_peak = (training_memory(model, team_for(model, 1, 8), 64) for model in (plain, again))
    assert again_peak < plain_peak


def test_what_writes_to_an_outline_or_multiplies_it_by_a_number_of_numpys() -> None:
    a, real = outline((3, 4)), np.ones((3, 4), np.float32)
    for factor in (np.float64(2), np.float32(2), np.int64(2), np.bool_(True), 2.0, True):
        assert (a * factor).dtype == (real * factor).dtype
    a.fill(1.0)
    np.copyto(a, real)
    np.add.at(a, np.array([0, 2]), 1.0)
    assert a.shape == (3, 4) and not np.asarray(a).any()


def test_outlines_are_arrays_without_numbers() -> None:
    x = outline((5, 6, 7))
    made: list[tuple[Any, Any]] = [
        (lambda x: x @ x.swapaxes(1, 2), True), (lambda x: x.transpose(1, 0, 2).reshape(-1, 7), True),
        (lambda x: x.reshape(30, 7)[:, None], False), (lambda x: np.where(x > 0, x, 0.0), True),
        (lambda x: np.concatenate([x, x[:, :2]], axis=1), True), (lambda x: x.astype(np.float64) * 2, True),
        (lambda x: x.sum(axis=(0, 2), keepdims=True) / x.shape[0], True), (lambda x: x[[0, 2]], True),
        (lambda x: np.empty_like(x.swapaxes(0, 2), shape=(7, 6, 3)), True), (lambda x: x.max(), True),
        (lambda x: x @ np.ones(7, np.float32), True), (lambda x: np.float32(2) * x.real[..., 0], True),
        (lambda x: np.einsum("abc,dc->abd", x, np.ones((4, 7), np.float32)), True), (lambda x: x.copy(), True),
    ]  # fmt: skip
    for function, new in made:
        real, found = function(np.zeros((5, 6, 7), np.float32)), function(x)
        assert (found.shape, found.dtype) == (real.shape, real.dtype) and isinstance(found, Outline)
        assert (found.memory is not x.memory) is new
        if np.ndim(real):
            assert found.flags.c_contiguous == real.flags.c_contiguous
    x += 1.0
    x[0] = 3.0
    assert not np.asarray(x).any() and (x.min() < 60.0 and x.max() > 60.0)  # whatever is asked, is so
    for wrong in (
        lambda: x @ x,
        lambda: x + np.ones(3),
        lambda: x.reshape(4, 5),
        lambda: x.transpose(2, 1, 0).reshape(4, 5),
    ):
        with pytest.raises(ValueError):
            wrong()


# ---- the trace -------------------------------------------------------------------------------------------------------

SMALL = {"image_size": (12, 8), "patch_size": 4, "in_channels": 2, "dim": 12, "depth": 3, "heads": 3, "num_classes": 5}


def disturbed(**settings: Any) -> mv.ViT:
    model = mv.ViT(**SMALL | settings)
    for i, p in enumerate(model.parameters()):
        p.data[...] += normal(mv.Key(99, i), p.shape) * 0.2
    return model.to(np.float64)


def a_mask(tokens: int) -> np.ndarray:
    mask = uniform(mv.Key(5), (tokens, tokens)) > 0.7
    mask[2] = True  # which may attend to nothing
    return mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("settings", [{}, {"pool": "mean"}, {"pool": "none", "head": "mlp"}, {"recompute": True}])
def test_what_flows_through_each_attention_equals_a_complex_step(settings: dict[str, Any], masked: bool) -> None:
    model = disturbed(**settings)
    images = normal(mv.Key(1), (2, 2, 12, 8))
    mask = a_mask(model.num_tokens) if masked else None
    trace = model.trace(images, mask)
    place = (0, 3) if trace.logits.ndim == 2 else (0, 4, 3)
    gradients = mv.grad(trace.logits[place], trace.attention)
    for b, g in enumerate(gradients):
        way = normal(mv.Key(7, b), g.shape)

        def shifted(block: int, p: Any, b: int = b, way: np.ndarray = way) -> Any:
            return p + 1e-30j * way if block == b else p

        step = model.trace(images, mask, shifted).logits.data[place].imag / 1e-30
        assert g.shape == trace.attention[b].shape == (2, 3, model.num_tokens, model.num_tokens)
        assert abs(step) > 1e-6 and abs((g.numpy() * way).sum() - step) <= 1e-12 * max(1.0, abs(step))
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("settings", [{}, {"pool": "mean"}, {"pool": "none"}, {"dim_head": 5}])
def test_the_trace_is_what_passes_through_the_model(settings: dict[str, Any]) -> None:
    model = disturbed(**settings)
    images = normal(mv.Key(1), (2, 2, 12, 8))
    for mask in (None, a_mask(model.num_tokens)):
        trace = model.trace(images, mask)
        np.testing.assert_allclose(trace.logits.data, model(images, mask).data, rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(
            model.norm(trace.tokens[-1]).data, model.features(images, mask).data, rtol=1e-12, atol=1e-12
        )
        assert np.array_equal(trace.tokens[0].data, model.embed(images).data)
        assert len(trace.tokens) == 4 and len(trace.attention) == 3
        assert (trace.grid, trace.prefix) == ((3, 2), int(model.pool == "cls"))
        sums = trace.attention[1].data.sum(axis=-1)
        np.testing.assert_allclose(np.delete(sums, 2, axis=-1), 1.0, rtol=1e-12)
        assert mask is None or not sums[..., 2].any()
        for a, b in zip(model.attention_maps(images, mask), trace.attention, strict=True):
            assert np.array_equal(a.data, b.data)
        assert trace.model is model and len(trace.heads) == len(trace.attended) == len(trace.mlp) == 3
        for i, h in enumerate(trace.heads):
            width = model.settings.dim_head or 4
            assert h.q.shape == h.k.shape == h.v.shape == h.out.shape == (2, 3, model.num_tokens, width)
            scores = np.einsum("bhqd,bhkd->bhqk", h.q.data, h.k.data) / width**0.5
            np.testing.assert_allclose(h.scores.data, scores, rtol=1e-12, atol=1e-13)
            np.testing.assert_allclose(h.out.data, h.weights.data @ h.v.data, rtol=1e-12, atol=1e-13)
            added = trace.attended[i].data + trace.mlp[i].data
            np.testing.assert_allclose(trace.tokens[i + 1].data - trace.tokens[i].data, added, rtol=1e-12, atol=1e-12)
            on_the_way = [h.q, h.k, h.v, h.scores, h.weights, h.out, trace.attended[i], trace.mlp[i], trace.tokens[i]]
            gradients = mv.grad(trace.logits.sum(), on_the_way, create_graph=True)
            assert all(g.data.any() for g in gradients)
    if model.pool == "cls":  # the last block's other rows reach no logit
        last = mv.grad(trace.logits.sum(), trace.attention)[-1].data
        assert last[:, :, 0].any() and not last[:, :, 1:].any()


def test_a_trace_of_a_frozen_model_and_one_in_training() -> None:
    model = disturbed(dropout=0.1, attention_dropout=0.3, drop_path=0.2)
    images = normal(mv.Key(1), (2, 2, 12, 8))
    with mv.random_key(mv.Key(3)):
        first = model.trace(images)
    with mv.random_key(mv.Key(3)):
        again = model.trace(images)
    assert np.array_equal(first.logits.data, again.logits.data)
    assert np.abs(first.logits.data - model.eval().trace(images).logits.data).max() > 1e-3
    for p in model.parameters():
        p.requires_grad = False
    trace = model.trace(images)
    on_the_way = [x for h in trace.heads for x in (h.q, h.k, h.v, h.scores, h.weights, h.out)]
    on_the_way += trace.tokens + trace.attended + trace.mlp
    assert all(g.data.any() for g in mv.grad(trace.logits[0, 1], on_the_way))
    with mv.no_grad():
        assert model.trace(images).logits.node is None
    without = model.trace(images, change=lambda block, p: p * 0.0 if block == 1 else p)
    for wrong, words in ((lambda block, p: p[:1], "keep its shape"), (lambda block, p: None, "cannot hold object")):
        with pytest.raises((ShapeError, DTypeError), match=words):
            model.trace(images, change=wrong)
    constant = model.trace(images, change=lambda block, p: np.full(p.shape, 1 / 7))  # what is put there is on the path
    assert all(g.data.any() for g in mv.grad(constant.logits[0, 1], constant.attention))
    assert not without.attention[1].data.any() and np.abs(without.logits.data - trace.logits.data).max() > 1e-6


def test_a_saved_config_is_plain(here: Path) -> None:
    mv.save(create_model("vit_digits", image_size=(8, 16)), "a.npz")
    assert json.loads(json.dumps(load_checkpoint("a.npz").meta["model"]))["image_size"] == [8, 16]
    assert load_model("a.npz").settings.image_size == (8, 16)
