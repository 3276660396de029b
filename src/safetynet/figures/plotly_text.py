"""Labels for Plotly, which reads tags, entities, formulas ($) and fields (%{) in every text."""

import html


def escaped(label: str) -> str:
    """A label that Plotly shows as it was typed."""
    safe = html.escape(label, quote=False)
    return safe.replace("$", "&#36;").replace("%{", "&#37;{").replace("\n", "<br>")
