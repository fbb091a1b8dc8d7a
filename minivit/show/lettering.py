"""Names in pictures: in a font that has their letters where the system has one, else in other words, never as boxes.

Pillow's own font has little more than ASCII, and draws a box for anything else.
"""

from __future__ import annotations

import functools
import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import ImageDraw

FOLDERS = (
    "/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts", "/run/host/fonts",
    "/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts",
    "C:/Windows/Fonts", "~/AppData/Local/Microsoft/Windows/Fonts",
)  # fmt: skip
PREFERRED = ("dejavusans.", "notosans-regular", "arial.", "segoeui.", "notosanscjk", "arial unicode", "msyh", "gothic")
UNLIKE_TEXT = ("bold", "italic", "oblique", "black", "light", "thin", "mono", "condensed", "lastresort", "notdef")
MOST_FONTS = 300  # that are looked into
PROBE_SIZE = 14  # pixels
NO_CHARACTER = "\U0010ffff"  # no font has it: each draws for it what it draws for all that it lacks, mostly a box


def write(
    draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, colour: Any, size: int, **more: Any
) -> None:
    """Draw a text, or what :func:`lettered` makes of it."""
    words, font = lettered(text, size)
    draw.text(place, words, colour, font, **more)


def lettered(text: str, size: int, width: float | None = None) -> tuple[str, Any]:
    """Return a text on one line, cut to ``width`` pixels if given, and the font of ``size`` pixels to draw it with.

    It is the font that has most of its letters. The others are transliterated, or their numbers (U+72D7) stand for
    them.
    """
    whole, file = _spelled(text[:200])
    font, words, kept = _font(file, size), whole, whole
    end = "…" if _has(file, "…") else "..."
    while width is not None and kept and font.getlength(words) > width:
        kept = kept[:-1]
        words = kept + end
    return words, font


def drawable_names(names: Sequence[str]) -> list[str]:
    """Return the names of classes as pictures have them: "class 3" for one that no font here and no ASCII can write."""
    spelled = [_spelled(name)[0] for name in names]
    count, prefix = Counter(spelled), "class "
    while any(words.startswith(prefix) for words in spelled):
        prefix += "#"

    def numbered(words: str, name: str) -> bool:
        unreadable = "U+" in words and words != _shown(name)
        return not words or unreadable or (words != name and count[words] > 1)

    pairs = zip(spelled, names, strict=True)
    return [f"{prefix}{i}" if numbered(words, name) else words for i, (words, name) in enumerate(pairs)]


def _shown(text: str) -> str:
    """Return a text on one line, composed (e and ´ are é), without control and format characters."""
    text = "".join(" " if c.isspace() else c for c in unicodedata.normalize("NFC", text))
    return " ".join("".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf")).split())


@functools.lru_cache(maxsize=4096)
def _spelled(text: str) -> tuple[str, str]:
    """Return a text in the letters of a font, and its file: letters that it lacks are given in other words."""
    text = _shown(text)
    letters = sorted(set(text))
    best, most = "", sum(_has("", c) for c in letters)
    for file in _font_files() if most < len(letters) else []:
        if (count := sum(_has(file, c) for c in letters)) > most:
            best, most = file, count
        if most == len(letters):
            break
    return " ".join("".join(c if _has(best, c) else _in_other_words(c, best) for c in text).split()), best


def _in_other_words(c: str, file: str) -> str:
    """Return a letter less its accents (é: e), a symbol's name (🐶: dog face), or else a character's number."""
    plain = "".join(LIKE.get(x, x) for x in unicodedata.normalize("NFKD", c) if unicodedata.category(x) != "Mn")
    if all(_has(file, x) for x in plain):
        return plain  # of a mark alone nothing: it stands on the letter before
    if unicodedata.category(c) in ("So", "Sm", "Sc") and (name := unicodedata.name(c, "")):
        return f" {name.lower()} "
    return f" U+{ord(c):04X} "


LIKE = {
    "ß": "ss", "ẞ": "SS", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "ø": "o", "Ø": "O", "ł": "l", "Ł": "L", "đ": "d",
    "Đ": "D", "ð": "d", "Ð": "D", "þ": "th", "Þ": "Th", "ı": "i", "ħ": "h", "Ħ": "H", "ŧ": "t", "Ŧ": "T",
    "–": "-", "—": "-", "‐": "-", "‘": "'", "’": "'", "“": '"', "”": '"', "„": '"', "«": '"', "»": '"', "→": "->",
}  # fmt: skip
"""Latin letters and signs without a decomposition, and what is written for them in ASCII."""


# ---- fonts -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _font(file: str, size: int) -> Any:
    """Return a font file's font, ``""`` for Pillow's own."""
    from PIL import ImageFont

    return ImageFont.truetype(file, size) if file else ImageFont.load_default(size)


@functools.cache
def _can_lay_out() -> bool:
    from PIL import features

    return bool(features.check("raqm"))


def _needs_layout(c: str) -> bool:
    """Tell whether a letter is written from right to left, or over others."""
    return unicodedata.bidirectional(c) in ("R", "AL") or unicodedata.category(c).startswith("M")


@functools.lru_cache(maxsize=1 << 16)
def _has(file: str, c: str) -> bool:
    """Tell whether a font draws a character otherwise than one that does not exist."""
    if c == " ":
        return True
    if unicodedata.category(c) in ("Cc", "Cs", "Cn", "Co") or (_needs_layout(c) and not _can_lay_out()):
        return False
    try:
        font = _font(file, PROBE_SIZE)
        drawn, missing = font.getmask(c), font.getmask(NO_CHARACTER)
        return (drawn.size, bytes(drawn)) != (missing.size, bytes(missing))
    except (OSError, ValueError):  # damaged, or has pictures of one size only
        return False


@functools.cache
def _font_files() -> list[str]:
    """Return the system's font files, plain text fonts first."""
    files = []
    for folder in FOLDERS:
        for path, _, names in os.walk(Path(folder).expanduser()):
            files += [os.path.join(path, n) for n in names if n.lower().endswith((".ttf", ".otf", ".ttc"))]

    def order(file: str) -> tuple[bool, int, str]:
        name = os.path.basename(file).lower()
        places = [i for i, part in enumerate(PREFERRED) if name.startswith(part)]
        return any(part in name for part in UNLIKE_TEXT), places[0] if places else len(PREFERRED), name

    return sorted(files, key=order)[:MOST_FONTS]
