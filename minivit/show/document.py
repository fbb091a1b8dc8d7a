"""A page that is one file: it runs nothing and asks no network for anything."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping

from minivit.show.markup import escape
from minivit.show.style import PAGE_STYLE


def document(title: str, body: str, style: str = "") -> str:
    """Return a page of HTML with ``body``, HTML too, under its title; ``style`` comes after that of all pages.

    Its Content-Security-Policy lets only the pictures and the style within it count.
    """
    style = PAGE_STYLE + style
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}</body>
</html>
"""


def all_sections(sections: Mapping[str, str]) -> str:
    """Return each section, HTML, under its name; those that are empty are left out."""
    return "".join(
        f"<section>\n<h2>{escape(name)}</h2>\n{html}\n</section>\n" for name, html in sections.items() if html
    )
