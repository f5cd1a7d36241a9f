"""Drop the scripts of sphinx-thebe, which Jupyter Book loads even when Thebe is off.

Its inline script comes twice, and the second is an error in the browser's console.
"""


def drop_thebe(app, pagename, templatename, context, doctree) -> None:
    """Remove Thebe's scripts and style sheet from the page."""
    for key in ("script_files", "css_files"):
        context[key] = [
            file
            for file in context.get(key, [])
            if "thebe"
            not in f"{getattr(file, 'filename', file)}{getattr(file, 'attributes', '')}".lower()
        ]


def setup(app) -> dict:
    """Register the handler after everyone else's."""
    app.connect("html-page-context", drop_thebe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
