"""HTML pages that open offline: one file each, with their figures and what draws them inside."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import plotly.graph_objects as go

from outgrow.files import write_text


def write_page(template: str, path: Path, figures: Sequence[go.Figure], **values: Any) -> None:
    """Writes a page whole or not at all.

    Args:
        template: a file of this room that extends `page.html.j2`; it finds the figures, as HTML, in `drawn`.
        path: where the page goes.
        figures: drawn in it; plotly's own code is inside the first.
        values: what the template speaks of.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (resources.files("outgrow.lab") / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    shown = {"responsive": True, "displayModeBar": False}  # its buttons lie over the titles on a phone
    drawn = [figure.to_html(full_html=False, include_plotlyjs=number == 0, config=shown) for number, figure in enumerate(figures)]
    page = environment.get_template(template).render(drawn=drawn, **values)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)
