"""Leave members without a docstring or a type out of the API pages.

A layer stored as an attribute is explained by its class; autoapi would list its bare name.
"""


def skip(app, what, name, obj, skip, options) -> bool | None:
    """Say whether to leave a member out; None leaves the decision to others."""
    documented = obj.docstring or getattr(obj, "annotation", None)
    return None if documented else True


def setup(app) -> dict:
    """Register the handler."""
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
