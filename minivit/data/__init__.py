"""Data: labelled images, batches of them, augmentation, and the reading of image files. It knows nothing of models."""

from minivit.data.augment import (
    Affine,
    Augment,
    Chain,
    Crop,
    Flip,
    RandomErasing,
    RandomResizedCrop,
)
from minivit.data.catalog import kind_of, load, splits_of
from minivit.data.colour import ColorJitter
from minivit.data.dataset import Dataset
from minivit.data.images import read_image
from minivit.data.loader import Loader, standardize
from minivit.data.mixing import Mix
from minivit.data.preparation import Preparation
from minivit.data.randaugment import RandAugment

__all__ = [
    "Affine",
    "Augment",
    "Chain",
    "ColorJitter",
    "Crop",
    "Dataset",
    "Flip",
    "Loader",
    "Mix",
    "Preparation",
    "RandAugment",
    "RandomErasing",
    "RandomResizedCrop",
    "kind_of",
    "load",
    "read_image",
    "splits_of",
    "standardize",
]
