"""The files of the demo page; they are read once, and there are no others to be had."""

from __future__ import annotations

from importlib.resources import files

_KINDS = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8"}
NAMES = ("index.html", "style.css", "app.js", "docs.html", "docs.js")


def page_files() -> dict[str, tuple[bytes, str]]:
    """The content and the kind of each file of the page."""
    folder = files("lightning_rec.serve") / "page"
    return {name: ((folder / name).read_bytes(), _KINDS[name.rpartition(".")[2]]) for name in NAMES}
