"""Settings of a training run: what there is, where each value comes from, and the run's config.toml.

A value comes from, in rising order: its default, the named model, the data, the recipe, the file, the command line.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

from minivit.data import kind_of
from minivit.errors import ConfigError, MinivitError, printable, unknown_name, value_text
from minivit.files import open_regular
from minivit.models import KINDS, MODELS, configuration, described_settings, read_settings, usual_model
from minivit.runs.options import OPTIONS, Option
from minivit.runs.recipes import FOR_DATA, RECIPES, full_name
from minivit.weights.native import checked_settings, read_checkpoint
from minivit.weights.place import find_checkpoint

GIVEN = ("command line", "argument")
"""The origins of what was asked for just now: typed, or given to a function."""


class RunSettings(dict[str, Any]):
    """Values by dotted key (``settings["train.lr"]``); ``origins`` says where each came from.

    ``kind`` is that of the model; while it is "", every registered model's settings are known.
    """

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind = kind
        self.origins: dict[str, str] = {}

    def take(self, values: Mapping[str, Any], origin: str) -> None:
        """Take over values, each checked. Raises ConfigError for a key, type or size that cannot be."""
        known = known_settings(self.kind)
        for key, value in values.items():
            if key not in known:
                raise _unknown(key, origin, self.kind)
            self[key] = _checked(key, value, known[key], origin, self.kind)
            self.origins[key] = origin

    def table(self, name: str) -> dict[str, Any]:
        """Return the values under ``name.``, by the rest of their keys."""
        return {key.removeprefix(f"{name}."): v for key, v in self.items() if key.startswith(f"{name}.")}

    def model_values(self) -> dict[str, Any]:
        """Return the settings of the model as its class takes them: the run's seed is the model's."""
        values = {key: value for key, value in self.table("model").items() if key != "name"}
        values |= {"seed": self["train.seed"]}
        return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _unknown(key: str, origin: str, kind: str) -> MinivitError:
    """Return the error for an unknown key; one in the wrong table, or without its table, is found by its name."""
    known = known_settings(kind)
    names = {known.rpartition(".")[2]: known for known in known}
    near = difflib.get_close_matches(key.rpartition(".")[2], names, n=2, cutoff=0.6)
    meant = f"did you mean {' or '.join(names[n] for n in near)}?"
    what = f"unknown setting {key!r} ({origin})"
    if key in known_settings():
        what = f"a model of the kind {kind} has no setting {key!r} ({origin})"
    return ConfigError(what, meant if near else f"known: {', '.join(sorted(known))}")


Types = type | tuple[type, ...]


def known_settings(kind: str = "") -> dict[str, Types]:
    """Return the type of every setting, those of a kind of model included, or of all kinds."""
    types: dict[str, Types] = {key: type(s.default) for key, s in OPTIONS.items()}
    for known in [kind] if kind else KINDS:
        for name, described in described_settings(known).items():
            if name != "seed":  # the run's seed is the model's
                types[f"model.{name}"] = _types_of(described.type)
    return types


@functools.cache
def _types_of(annotation: Any) -> Types:
    """Return the types that a value of a setting may have as TOML has them, where a pair is a list.

    Where a list is all that it may be, it is as long as one likes.
    """
    if get_origin(annotation) is tuple:
        return list
    parts = [part for part in get_args(annotation) or (annotation,) if part is not NoneType]
    types = tuple(list if get_origin(part) is tuple else part for part in parts)
    return types if len(types) > 1 else types[0]


def _checked(key: str, value: Any, kind: Types, origin: str, model: str) -> Any:
    """Return ``value`` as the setting of type ``kind`` has it; of a model's, as the kind ``model`` has it, or any."""
    if kind is float and type(value) is int:
        value = float(value) if value.bit_length() < 1000 else math.inf
    if isinstance(value, tuple):
        value = list(value)
    allowed = kind if isinstance(kind, tuple) else (kind,)
    wrong = isinstance(value, list) and (
        any(type(x) is not int for x in value) or (kind is not list and len(value) != 2)
    )
    if type(value) not in allowed or wrong:
        listed = "a list of whole numbers" if kind is list else "[height, width]"
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: listed}
        raise ConfigError(
            f"{key} = {value_text(value)} ({origin}) is not {' or '.join(names[k] for k in allowed)}",
            'text in quotes: name = "digits"' if str in allowed else f"for example --set {key}={_example(allowed)}",
        )
    if isinstance(value, str) and not _is_text(value):
        what = f"{key} = {value_text(value)} ({origin}) holds what is no text: a NUL, or bytes that are no UTF-8"
        raise ConfigError(what, "a run's config.toml could not hold it: rename the file, or link to it by another name")
    setting = OPTIONS.get(key, Option(None, ""))
    if setting.choices and value not in setting.choices:
        raise unknown_name(key, value, setting.choices)
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} = {value!r} ({origin}) is out of range", "it must be finite")
    if setting.low is not None and not setting.low <= value <= setting.high:
        form = "{:,}" if kind is int else "{:g}"
        limits = f"from {form.format(setting.low)} to {form.format(setting.high)}"
        raise ConfigError(f"{key} = {value_text(value)} ({origin}) is out of range", f"it must be {limits}")
    if key.startswith("model.") and key not in OPTIONS:
        _check_by_rule(key.removeprefix("model."), value, origin, model)
    return value


def _check_by_rule(name: str, value: Any, origin: str, model: str) -> None:
    """Raise ConfigError for what a setting of the kind ``model`` cannot be; of no kind that has it, if it is ""."""
    errors = []
    for settings in map(described_settings, [model] if model else KINDS):
        if name in settings:
            try:
                settings[name].rule(name, value)
            except ConfigError as error:
                errors.append(error)
            else:
                return
    raise ConfigError(f"model.{errors[0].what} ({origin})", errors[0].remedy) from errors[0]


def _is_text(value: str) -> bool:
    """Tell whether a string can be written to a file and name one."""
    return "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)


def _example(kinds: tuple[type, ...]) -> str:
    return {int: "8", float: "0.1", bool: "true", list: "[2,2]"}[kinds[0]]


# ---- resolving -------------------------------------------------------------------------------------------------------


def resolve(
    given: Mapping[str, Any],
    recipe: str | None = None,
    file: str | Path | None = None,
    *,
    origin: str = "command line",
    read: Mapping[str, Any] | None = None,
) -> RunSettings:
    """Return all settings but those that the data decide: defaults < model < recipe < ``file`` < ``given``.

    ``given`` is what was asked for, by dotted key, and ``origin`` says where: one of :data:`GIVEN`. Without a
    ``recipe`` there, the file's is used, or the one for the kind of data, or for fine-tuning where the run starts from
    a checkpoint; its model's sizes are then the checkpoint's. ``read`` are the file's values, if it has been read.
    """
    RunSettings().take(given, origin)  # checked before any of it is used
    from_file = dict(read) if read is not None else read_toml(file) if file is not None else {}
    in_file = from_file.pop("recipe", "")
    if not isinstance(in_file, str):
        raise ConfigError(f"recipe = {in_file!r} (file {file}) is not text", 'for example recipe = "digits"')
    RunSettings().take(from_file, f"file {file}")
    if recipe and in_file and full_name(recipe) != full_name(in_file):
        raise ConfigError(f"recipe {recipe}, but {file} has the values of {in_file}", "give one of them")
    chosen = {key: option.default for key, option in OPTIONS.items()} | from_file | dict(given)
    start = find_checkpoint(chosen["train.init_from"])
    asked = recipe or in_file or ("finetune" if start else FOR_DATA.get(kind_of(chosen["data.name"]), ""))
    asked = full_name(asked) if asked else ""
    from_recipe = _flat(RECIPES[asked]) if asked else {}
    model = given.get("model.name", from_file.get("model.name"))
    if start or (model is not None and model != from_recipe.get("model.name")):  # its sizes are for its own model
        from_recipe = {k: v for k, v in from_recipe.items() if not k.startswith("model.")}
    if model is not None and model != from_file.get("model.name", model):  # and so are a file's
        from_file = {k: v for k, v in from_file.items() if not k.startswith("model.")}
    name = model or from_recipe.get("model.name") or ""

    sizes = _sizes_in(start) if start and not name else {}
    settings = RunSettings(configuration(name or sizes.get("model.name") or usual_model(0)).kind)
    settings.take({key: s.default for key, s in OPTIONS.items()}, "default")
    defaults = {f"model.{key}": s.default for key, s in described_settings(settings.kind).items() if key != "seed"}
    settings.take({key: value for key, value in defaults.items() if value is not None}, "default")
    # the named model's sizes come before the recipe's, whoever names the model
    if name:
        take_model(settings, name)
        settings.take({"model.name": name}, f"model {name}")
    elif start:
        settings.take(sizes, f"checkpoint {start}")
    settings.take(from_recipe, f"recipe {asked}")
    settings.take(from_file, f"file {file}")
    settings.take(given, origin)
    settings["recipe"] = asked
    return settings


def _sizes_in(path: str) -> dict[str, Any]:
    """Return the settings of the model in a checkpoint, but for those of its head."""
    checkpoint = read_checkpoint(path)
    found = checked_settings(checkpoint, path)
    name = checkpoint.meta.get("name")
    if not isinstance(name, str) or name not in MODELS:  # of a library's model: a name whose sizes are all replaced
        name = usual_model(found.image_shape[1], found.kind) if found.kind in {m.kind for m in MODELS.values()} else ""
    sizes = {f"model.{key}": value for key, value in found.transferred().items() if value is not None}
    return {"model.name": name} | sizes


def take_model(settings: RunSettings, name: str) -> None:
    """Take over the sizes of a named model."""
    settings.take({f"model.{key}": value for key, value in configuration(name).settings.items()}, f"model {name}")


def fit_to_data(settings: RunSettings, shape: tuple[int, int, int], classes: int) -> None:
    """Settle what the data decide: image size, channels and classes, and the model where none is named.

    ``shape`` is an image's (C, H, W). Raises ConfigError where the settings ask for something else.
    """
    channels, height, width = shape
    asked = {k for k, origin in settings.origins.items() if origin.startswith(("recipe", "file", *GIVEN))}
    if not settings["model.name"]:
        name = usual_model(max(height, width))
        kept = {k: (settings[k], settings.origins[k]) for k in asked if k.startswith("model.") and k != "model.name"}
        take_model(settings, name)
        settings.take({"model.name": name}, "data")
        for key, (value, origin) in kept.items():
            settings.take({key: value}, origin)
    if (misfit := read_settings(settings.kind, settings.model_values()).misfit(height, width)) is not None:
        key, fitting = f"model.{misfit[0]}", misfit[1]
        raise ConfigError(
            f"{key} = {settings[key]} ({settings.origins[key]}) does not divide the data's {height} × {width} pixels",
            f"use one that does: --set {key}=N with N one of {fitting}",
        )
    size = height if height == width else [height, width]
    for key, value in {"image_size": size, "in_channels": channels, "num_classes": classes}.items():
        key = f"model.{key}"
        given = settings[key]
        fits = given == value or given == [value, value] or (key == "model.num_classes" and given >= value)
        if key not in asked:
            settings.take({key: value}, "data")
        elif not fits:
            raise ConfigError(
                f"{key} = {given} ({settings.origins[key]}), but the data have {value}",
                f"leave {key} out: the data decide it",
            )


def assignments(settings: Mapping[str, Any]) -> str:
    """Return how the command line is given a model's ``settings``: ``--set model.dim=16 …``, quoted for the shell."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    return " ".join(f"--set {shlex.quote(f'model.{key}={text}')}" for key, text in texts.items())


def parse_assignment(text: str) -> tuple[str, Any]:
    """Return (key, value) of ``key=value``; the value as TOML has it, or as text."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {text!r} is not KEY=VALUE", "for example --set model.depth=6")
    try:
        found = tomllib.loads(f"value = {value}")
    except RecursionError as error:
        raise ConfigError(f"--set {key.strip()}: its value is nested too deep", "give a number or text") from error
    except ValueError:  # TOML's own, or a number of too many digits
        return key.strip(), value.strip()
    # more than one line is text
    return key.strip(), found["value"] if found.keys() == {"value"} else value.strip()


# ---- files -----------------------------------------------------------------------------------------------------------


_LARGEST_FILE = 100_000  # settings take 2 kB, and a parser can be kept busy for long by a large file


def read_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file of settings: values by dotted key. Raises ConfigError if it cannot be read."""
    return parse_toml(read_bytes(path), path)


def read_bytes(path: str | Path) -> bytes:
    """Return what a file of settings holds. Raises ConfigError if it cannot be read or is too large for one."""
    try:
        with open_regular(path) as f:
            text = f.read(_LARGEST_FILE + 1)
        if len(text) > _LARGEST_FILE:
            raise ConfigError(f"{path} is larger than {_LARGEST_FILE:,} bytes", "give a run's config.toml")
        return text
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}", "check the path") from error


def parse_toml(text: bytes, path: str | Path) -> dict[str, Any]:
    """Return the values, by dotted key, in the text of ``path``. Raises ConfigError if it is not TOML."""
    try:
        return _flat(tomllib.loads(text.decode()))
    except (ValueError, RecursionError) as error:  # TOML's own, UTF-8's, a number of too many digits; deep nesting
        raise ConfigError(f"{path} is not TOML: {error}", "mend it, or start from a run's config.toml") from error


def write_toml(settings: RunSettings) -> str:
    """Return the settings as TOML, each with its origin as a comment."""
    lines = [f"recipe = {_toml(settings['recipe'])}"] if settings.get("recipe") else []
    for table in ("data", "model", "train"):
        lines += ["", f"[{table}]"]
        rows = [(f"{key} = {_toml(v)}", settings.origins[f"{table}.{key}"]) for key, v in settings.table(table).items()]
        width = max(len(text) for text, _ in rows)
        lines += [f"{text:{width}}  # {printable(origin)}" for text, origin in rows]
    return "\n".join(lines).lstrip("\n") + "\n"


def _toml(value: Any) -> str:
    """Return a string, number, truth value or list of numbers as TOML, which shares JSON's spelling of them."""
    return printable(json.dumps(value, ensure_ascii=False))


def _flat(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
