"""Models, and the named configurations of them: what is registered, by its kind or its name.

Importing any file of this package registers minivit's own models.
"""

from minivit.models.registry import (
    KINDS,
    MODELS,
    Model,
    Settings,
    build,
    configuration,
    count_parameters,
    create_model,
    described_settings,
    list_models,
    model_class,
    model_outline,
    read_settings,
    register,
    setting,
    settings_class,
)
from minivit.models.vit import ViT
from minivit.models.zoo import USUAL_MODELS, usual_model

__all__ = [
    "KINDS",
    "MODELS",
    "USUAL_MODELS",
    "Model",
    "Settings",
    "ViT",
    "build",
    "configuration",
    "count_parameters",
    "create_model",
    "described_settings",
    "list_models",
    "model_class",
    "model_outline",
    "read_settings",
    "register",
    "setting",
    "settings_class",
    "usual_model",
]
