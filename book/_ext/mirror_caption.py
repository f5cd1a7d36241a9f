"""Turn the first line ``# conformer_src/NAME.py`` of a code cell into a caption above the cell.

The caption links to the module's API page, and the copy button copies the code without the line.
"""

import re

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform

MARKER = re.compile(r"\A# (conformer_src/[\w/]+\.py)\n")


def caption(path: str) -> nodes.paragraph:
    """Return the words above a cell that mirrors the file at this path."""
    module = path.removesuffix(".py").replace("/", ".")
    link = addnodes.pending_xref(
        "", nodes.literal(text=path), refdomain="py", reftype="mod", reftarget=module, refwarn=True
    )
    return nodes.paragraph("", "In the package: ", link, classes=["mirror-caption"])


class MirrorCaption(SphinxTransform):
    """Move the marker out of the code; it must run before references are resolved."""

    default_priority = 400

    def apply(self, **kwargs) -> None:
        """Change the blocks of one document."""
        for block in list(self.document.findall(nodes.literal_block)):
            if match := MARKER.match(block.astext()):
                code = block.astext()[match.end() :]
                block.rawsource = code
                block.children.clear()
                block += nodes.Text(code)
                block.parent.insert(block.parent.index(block), caption(match[1]))


def setup(app) -> dict:
    """Register the transform."""
    app.add_transform(MirrorCaption)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
