"""One model started from another's checkpoint."""

from __future__ import annotations

from pathlib import Path

from minivit.errors import CheckpointError, MinivitError, MisfitError
from minivit.models import Model
from minivit.weights.native import checked_settings, parameters_of, read_checkpoint, unusable_settings


def init_from(model: Model, path: str | Path) -> list[str]:
    """Start ``model`` from a checkpoint's parameters, to go on with other images or classes; return what changed.

    The checkpoint may be another system's file (:func:`minivit.load_weights`).

    As Dosovitskiy et al. 2020, section 3.2: the model gets a new head, one linear layer of zeros (neither its own nor
    the checkpoint's is kept, nor a hidden layer), and positions are resized to its grid of patches. Grey images may
    follow coloured ones or the other way round: the sum of the patch weights over the channels stays. A class token
    that only one of the two has is left out, or stays new. Make the optimizer afterwards.

    The two must be of one kind, and their encoders have equal sizes. Raises CheckpointError otherwise, with the
    parameters that differ; as a :class:`~minivit.errors.MisfitError` it has the settings to make the model with.
    Nothing is changed then. ::

        model = mv.ViT(**model_config(path) | {"image_size": 64, "num_classes": 5})
        print("\\n".join(init_from(model, path)))  # a line for each thing that is not as in the checkpoint
    """
    checkpoint = read_checkpoint(path)
    old, own = checked_settings(checkpoint, path), model.state_dict()
    if old.kind != model.kind:
        what = f"{path} cannot start this model: it holds a model of the kind {old.kind}, this is a {model.kind}"
        raise CheckpointError(what, "make the model of the checkpoint's kind")
    state = {name: a for name, a in parameters_of(checkpoint).items() if not name.startswith(model.replaced)}
    try:
        notes = model.adapt(state, old)
        model.load_state_dict(state | {name: a for name, a in own.items() if name.startswith(model.replaced)})
    except MisfitError as error:
        what = f"{path} cannot start this model: {error.what}"
        raise MisfitError(what, error.remedy, error.settings) from error
    except MinivitError as error:
        raise CheckpointError(f"{path} cannot start this model: {error.what}", error.remedy) from error
    except (TypeError, ValueError, ArithmeticError) as error:
        raise unusable_settings(path, error) from error
    classes = model.settings.num_classes
    model.reset_head(classes)
    return [*notes, f"head: new, for {classes} classes"]
