"""Models, and the named configurations of them: what is registered, by its kind or its name.

Importing any file of this package registers minivit's own models.
"""

from minivit.models.cct import CCT
from minivit.models.hybrid import Hybrid
from minivit.models.preparations import names_alike, preparation
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
    model_outline,
    read_settings,
    register,
    setting,
)
from minivit.models.resnet import ResNet
from minivit.models.t2t import NAMES as _T2T  # noqa: F401 - its names are registered
from minivit.models.vit import ViT
from minivit.models.zoo import usual_model

__all__ = [
    "CCT",
    "KINDS",
    "MODELS",
    "Hybrid",
    "Model",
    "ResNet",
    "Settings",
    "ViT",
    "build",
    "configuration",
    "count_parameters",
    "create_model",
    "described_settings",
    "list_models",
    "model_outline",
    "names_alike",
    "preparation",
    "read_settings",
    "register",
    "setting",
    "usual_model",
]
