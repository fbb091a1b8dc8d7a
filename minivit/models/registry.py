"""Models by name. A model is a class and one frozen dataclass of its settings, each setting said once.

::

    @dataclass(frozen=True)
    class MixerSettings(Settings):
        image_size: Size = setting(32, size, "height and width of the images")
        in_channels: int = setting(3, count, "channels of the images")
        num_classes: int = setting(10, count, "classes, the length of the logits")
        dim: int = setting(64, count, "length of a token")
        seed: int = setting(0, seed, "what the parameters are drawn from")

    @register("mixer", configurations={"mixer_tiny": {"image_size": 8, "dim": 16}})
    class Mixer(Model):
        Settings = MixerSettings

        def make(self, s): ...               # layers, as attributes
        def forward(self, images): ...       # (B, C, H, W) → logits (B, num_classes)

is all that training, evaluating, summaries, benchmarks, checks and checkpoints ask for. A model of images has the four
settings image_size, in_channels, num_classes and seed; the rest is its own. ``self.head``, a Linear, is what
fine-tuning replaces, and a setting ``head``, if there is one, says what it is made of. What else a model may say of
itself is at :class:`Settings` and :class:`Model`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar, get_type_hints

import numpy as np

from minivit.backend import Key
from minivit.data import Preparation
from minivit.errors import ConfigError, unknown_name
from minivit.models.adapt import check_encoder
from minivit.nn import init
from minivit.nn.layers import Linear
from minivit.nn.module import Module, Parameter, set_layer
from minivit.nn.random import random_key
from minivit.nn.rules import Rule, pair

CONTRACT = ("image_size", "in_channels", "num_classes", "seed")
"""The settings that every model of images has."""


class Described(NamedTuple):
    """A setting as the command line has it: what it may be is what its type and its rule say."""

    type: Any
    default: Any
    rule: Rule
    doc: str


def setting(default: Any, rule: Rule, doc: str, *, kept: bool = True) -> Any:
    """Return a field of a dataclass of settings: its default, what it may be, and what it means.

    One that is not ``kept`` changes no number: it is no part of ``config``, nor of a checkpoint.
    """
    return dataclasses.field(default=default, metadata={"rule": rule, "doc": doc, "kept": kept})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of a model's settings: checked by their rules when they are made. Raises ConfigError for what cannot be."""

    kind: ClassVar[str] = ""
    described: ClassVar[dict[str, Described]]  # since the class was registered
    divisor: ClassVar[str | None] = None  # the setting that height and width of the images must be divided by

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = field.metadata["rule"](field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    @property
    def config(self) -> dict[str, Any]:
        """The settings as a dict, but for those that change no number."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["kept"]}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that the model takes."""
        values: Any = self
        return values.in_channels, *pair("image_size", values.image_size)

    @property
    def sizes(self) -> str:
        """What a message says of them: all sizes, and what else is not as by default."""
        defaults = {f.name: f.default for f in dataclasses.fields(self) if f.name != "seed"}
        told = {name: value for name, value in self.config.items() if name in defaults and value is not None}
        shown = [n for n, v in told.items() if (type(v) in (int, tuple) and v) or v != defaults[n]]
        return ", ".join(f"{name} {told[name]}" for name in shown)

    def misfit(self, height: int, width: int) -> tuple[str, str] | None:
        """Return the setting that does not divide images of this size, and values that do; None if it does."""
        if self.divisor is None:
            return None
        p, q = pair(self.divisor, getattr(self, self.divisor))
        if p > 0 and q > 0 and not (height % p or width % q):
            return None
        common = math.gcd(height, width)
        return self.divisor, ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)

    def largest_array(self) -> tuple[int, str]:
        """Return the numbers of the largest array that one image makes, and in words what makes it."""
        channels, height, width = self.image_shape
        return channels * height * width, "an array that"

    def written_out(self) -> dict[str, Any]:
        """Return ``config`` with a number for each setting that follows from others unless it is given."""
        return self.config

    def transferred(self) -> dict[str, Any]:
        """Return the settings to make a model with that starts from one of these: all but what its new head decides."""
        return {key: value for key, value in self.written_out().items() if key not in ("num_classes", "head", "seed")}


class Model(Module):
    """Base of registered models: ``Model(**settings)``, by position or by name.

    ``settings`` holds them, ``config`` those of them that a checkpoint keeps, ``kind`` is the registered name. The
    class's ``Settings`` is the dataclass; ``replaced`` says which parameters, by the beginnings of their names,
    fine-tuning draws anew, ``encoder`` which settings it may not change.
    """

    kind: ClassVar[str] = ""
    Settings: ClassVar[type[Settings]]
    replaced: ClassVar[tuple[str, ...]] = ("head.",)
    encoder: ClassVar[tuple[str, ...] | None] = None  # None: all but the number of classes and the seed
    settings: Any
    head: Linear
    # of weights that came from elsewhere: how images are prepared for them, and the names of their classes
    preparation: Preparation | None = None
    class_names: tuple[str, ...] = ()

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.settings = self.Settings(*args, **settings)
        with random_key(Key(self.settings.seed)):
            self.make(self.settings)
        self._number_layers()

    def make(self, s: Any) -> None:
        """Make the layers; random numbers come from the seed."""
        raise NotImplementedError(f"{type(self).__name__} has no make")

    def layers(self) -> Sequence[Sequence[Module | Parameter | None]]:
        """Return what belongs to each layer, from the input on, for layer-wise learning rates; none if it has none."""
        return []

    def _number_layers(self) -> None:
        layers = list(self.layers())
        for i in reversed(range(len(layers))):  # what several layers share belongs to the first
            set_layer(i, *layers[i])

    @property
    def config(self) -> dict[str, Any]:
        """All settings but those that change no number: ``type(model)(**model.config)`` is one like it, untrained."""
        return self.settings.config

    def check_portable(self) -> None:
        """Raise ConfigError if a setting is a module itself, which no checkpoint can hold and no second model have."""
        for name, value in self.config.items():
            if isinstance(value, Module):
                what = f"{name} is a {type(value).__name__} itself: settings could not say how to build another"
                raise ConfigError(
                    what, f"register what makes it (minivit.register_encoder), and set {name} to its name"
                )

    def reset_head(self, num_classes: int) -> None:
        """Replace the head by one linear layer of zeros, as for fine-tuning; ConfigError if ``head`` is none."""
        if not isinstance(getattr(self, "head", None), Linear):
            what = f"{type(self).__name__} has no Linear called head"
            raise ConfigError(what, "name its last layer so, or give it a reset_head of its own")
        self.settings = dataclasses.replace(self.settings, num_classes=num_classes)
        self.preparation, self.class_names = None, ()  # what it learns now are other images, perhaps prepared otherwise
        weight = self.head.weight
        self.head = Linear(weight.shape[1], num_classes, weight_init=init.zeros)
        self.head.to(weight.dtype).to(weight.device)
        self._number_layers()

    def adapt(self, state: dict[str, np.ndarray], old: Any) -> list[str]:
        """Make a checkpoint's arrays, in place, fit this model; return what is changed. ``old`` are its settings.

        ``state`` is without those in ``replaced``. Raises CheckpointError for an encoder that is another.
        """
        check_encoder(
            self, state, old, self.encoder or tuple(k for k in self.config if k not in ("num_classes", "seed"))
        )
        return []


# ---- the registry ----------------------------------------------------------------------------------------------------


class Configuration(NamedTuple):
    """What a name stands for: a kind of model, and the settings that are not as by default."""

    kind: str
    settings: Mapping[str, Any]


KINDS: dict[str, type[Model]] = {}
"""The registered models by their kind."""

MODELS: dict[str, Configuration] = {}
"""The named configurations."""

M = TypeVar("M", bound=type[Model])


def register(kind: str, configurations: Mapping[str, Mapping[str, Any]] | None = None) -> Callable[[M], M]:
    """Enter a class of models as ``kind``, and by names what it may be made as; a decorator.

    Defined again (a notebook's cell), it replaces itself. Raises ConfigError for a name that another has, and for
    settings that are another class's or without those of :data:`CONTRACT`.
    """

    def enter(model: M) -> M:
        _check_class(kind, model)
        fields = dataclasses.fields(model.Settings)
        model.kind = model.Settings.kind = kind
        types = get_type_hints(model.Settings)  # here, because it compiles what is written in the annotations
        model.Settings.described = {
            f.name: Described(types[f.name], f.default, f.metadata["rule"], f.metadata["doc"]) for f in fields
        }
        model.__signature__ = inspect.signature(model.Settings)  # type: ignore[attr-defined]  # for help()
        lines = "\n".join(f"    ``{f.name}``: {f.metadata['doc']}." for f in fields)
        model.__doc__ = f"{inspect.cleandoc(model.__doc__ or '')}\n\n{lines}"
        KINDS[kind] = model
        configure(kind, configurations or {})
        return model

    return enter


def _check_class(kind: str, model: Any) -> None:
    """Raise ConfigError for what cannot be registered as ``kind``."""
    if not (isinstance(model, type) and issubclass(model, Model) and hasattr(model, "Settings")):
        what = f"{kind!r}: {getattr(model, '__name__', model)} is no Model with Settings"
        raise ConfigError(what, "class MyModel(Model): Settings = MySettings")
    if not isinstance(kind, str):
        raise ConfigError(f"{model.__name__}: the kind {kind!r} is no text", 'give it a name: @register("mine")')
    settings, fields = model.Settings, dataclasses.fields(model.Settings)
    if missing := [name for name in CONTRACT if name not in {f.name for f in fields}]:
        raise ConfigError(f"{settings.__name__} has no {', '.join(missing)}", "every model of images has")
    if plain := [f.name for f in fields if "rule" not in f.metadata]:
        what = f"{settings.__name__}: {', '.join(plain)} without a rule"
        raise ConfigError(what, f"{plain[0]}: int = setting(default, rule, doc)")
    before = KINDS.get(kind, model)
    if (before.__module__, before.__qualname__) != (model.__module__, model.__qualname__):
        raise ConfigError(f"two models {kind!r}: {before.__name__}, {model.__name__}", "give one another name")
    if vars(settings).get("kind", kind) != kind:  # a checkpoint would hold the other kind
        what = f"{kind!r}: {settings.__name__} are the settings of {settings.kind!r}"
        raise ConfigError(what, f"give {model.__name__} a dataclass of its own, which may derive from them")


def configure(kind: str, configurations: Mapping[str, Mapping[str, Any]]) -> None:
    """Give names to settings of a registered kind of model.

    Raises ConfigError for settings that cannot be, and for a name that another kind has.
    """
    for name, settings in configurations.items():
        read_settings(kind, settings)
        if name in MODELS and MODELS[name].kind != kind:
            what = f"two models {name!r}: of the kinds {MODELS[name].kind} and {kind}"
            raise ConfigError(what, "give one another name")
        MODELS[name] = Configuration(kind, dict(settings))


def model_class(kind: str) -> type[Model]:
    """Return the class registered as ``kind``; raise ConfigError if there is none."""
    if not isinstance(kind, str) or kind not in KINDS:
        raise unknown_name("kind of model", kind, KINDS)
    return KINDS[kind]


def described_settings(kind: str) -> dict[str, Described]:
    """Return each setting of a kind of model by its name, in their order."""
    return model_class(kind).Settings.described


def read_settings(kind: str, values: Mapping[str, Any]) -> Settings:
    """Return the settings of a kind of model with these ``values``; raise ConfigError for an unknown name or value."""
    settings = model_class(kind).Settings
    known = [f.name for f in dataclasses.fields(settings)]
    for name in values:
        if name not in known:
            raise unknown_name("setting", name, known)
    return settings(**values)


def build(kind: str, values: Mapping[str, Any]) -> Model:
    """Return a freshly initialised model of a kind."""
    read_settings(kind, values)  # so that an unknown name is told as such
    return model_class(kind)(**values)


def model_outline(kind: str, values: Mapping[str, Any], most: int | None = None) -> Model:
    """Return the model with outlines in the place of its parameters: names, shapes, nothing of their size is made.

    Raises ConfigError where it draws more than ``most`` arrays.
    """
    with init.outlining(most):
        return build(kind, values)


def count_parameters(kind: str, values: Mapping[str, Any]) -> int:
    """Return the number of parameters of a model, without making them."""
    return model_outline(kind, values).num_parameters()


def list_models(pattern: str = "*") -> list[str]:
    """Return the named configurations that match a shell pattern such as ``"vit_*_224"``."""
    return sorted(fnmatch.filter(MODELS, pattern))


def configuration(name: str) -> Configuration:
    """Return what a name stands for; raise ConfigError if there is no such name."""
    if name not in MODELS:
        raise unknown_model(name)
    return MODELS[name]


def unknown_model(name: Any) -> Exception:
    """Return the error for a name that nothing is called by; timm's have tags behind a dot, which name weights."""
    known, _, tag = str(name).partition(".")
    if tag and known in MODELS:
        remedy = f"the model is {known!r}; its weights come from a file: create_model({known!r}, weights=PATH)"
        return ConfigError(f"unknown model {name!r}: {tag!r} names weights, which minivit does not bring", remedy)
    if known.startswith("vit_") and "_resnet" in known:  # timm's with a ResNet-D
        what = f"{name!r} has a ResNet with BatchNorm before its blocks, and minivit has no BatchNorm"
        return ConfigError(what, "hybrids with GroupNorm are here: mv.list_models('vit_*_r*')")
    return unknown_name("model", name, MODELS)


def create_model(name: str, **settings: Any) -> Model:
    """Return a freshly initialised model by name; ``settings`` override its configuration."""
    kind, usual = configuration(name)
    return build(kind, {**usual, **settings})
