"""What the API pages need beside autoapi."""

from pathlib import Path


def skip(app, what, name, obj, skip, options) -> bool | None:
    """Leave out what says nothing here; None leaves the decision to others.

    That is what a module imports from another one, and members without a docstring or a type: a
    layer stored as an attribute is explained by its class.
    """
    documented = obj.docstring or getattr(obj, "annotation", None)
    return None if documented and not obj.imported else True


def depend_on_package(app, docname, source) -> None:
    """Have API pages read again when the package changes: autoapi does not ask for it."""
    if docname.startswith("book/api/"):
        for path in Path(app.srcdir, "conformer_src").rglob("*.py"):
            app.env.note_dependency(str(path))


def setup(app) -> dict:
    """Register the handlers."""
    app.connect("autodoc-skip-member", skip)
    app.connect("source-read", depend_on_package)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
