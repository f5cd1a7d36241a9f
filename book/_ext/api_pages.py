"""What the API pages need beside autoapi."""

from pathlib import Path


def comment(app, obj) -> str:
    """Return the end-of-line comment of a typed attribute: it says what the attribute holds."""
    module = Path(app.srcdir, *obj.id.split(".")[:-2])
    source = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
    line = source.read_text(encoding="utf-8").splitlines()[obj.obj["from_line_no"] - 1]
    return line.partition("  # ")[2]


def skip(app, what, name, obj, skip, options) -> bool | None:
    """Leave out what says nothing here; None leaves the decision to others.

    That is what a module imports from another one, and members without a docstring or a type: a
    layer stored as an attribute is explained by its class.
    """
    typed = getattr(obj, "annotation", None)
    if obj.type == "attribute" and typed and not obj.docstring:
        obj.docstring = comment(app, obj)
    documented = obj.docstring or typed
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
