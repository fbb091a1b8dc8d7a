"""Data: labelled images, batches of them, augmentation, and the reading of image files. It knows nothing of models."""

from minivit.data.augment import Affine
from minivit.data.datasets import Dataset, load
from minivit.data.images import read_image
from minivit.data.loader import Loader, standardize

__all__ = ["Affine", "Dataset", "Loader", "load", "read_image", "standardize"]
