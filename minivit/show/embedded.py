"""Pictures as text, so that they are part of a page."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


def embedded(picture: Image.Image, shrink: int) -> str:
    """Return a picture as a data URL: a PNG, or with ``shrink`` a JPEG of at most so many pixels a side."""
    buffer = io.BytesIO()
    if shrink:
        picture.thumbnail((shrink, shrink))
        picture.save(buffer, "JPEG", quality=85)
    else:
        picture.save(buffer, "PNG", optimize=True)
    return f"data:image/{'jpeg' if shrink else 'png'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
