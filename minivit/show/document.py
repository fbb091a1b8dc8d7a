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
    policy = f"default-src 'none'; img-src data:; style-src {digest(style)}; base-uri 'none'; form-action 'none'"
    return page(title, policy, style, f"<h1>{escape(title)}</h1>\n{body}")


def page(title: str, policy: str, style: str, body: str) -> str:
    """Return a page of HTML with nothing but ``body``, HTML too; ``policy`` is its Content-Security-Policy."""
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
{body}</body>
</html>
"""


def digest(text: str) -> str:
    """Return what a Content-Security-Policy calls a text that is allowed."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def all_sections(sections: Mapping[str, str]) -> str:
    """Return each section, HTML, under its name; those that are empty are left out."""
    return "".join(
        f"<section>\n<h2>{escape(name)}</h2>\n{html}\n</section>\n" for name, html in sections.items() if html
    )
