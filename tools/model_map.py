"""Draw the model map: the same picture of the Conformer in each chapter, with its part lit.

    python tools/model_map.py    # writes book/_static/map/NN_name.svg for each line of LIT

A new chapter is one more line in LIT. The parts are image, stem, conv, trans, fcu, heads, blocks;
one block alone is a part with its number, for example "conv 3".
"""

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "book" / "_static" / "map"

ALL = {"image", "stem", "conv", "trans", "fcu", "heads", "blocks"}

# Chapter -> the parts that it is about, and the words for readers who do not see the picture.
LIT = {
    "model": (ALL, "the whole model"),
    "01_data": ({"image"}, "the image"),
    "02_conv_block": ({"stem", "conv"}, "the stem and the convolution branch"),
    "03_attention": ({"trans"}, "the transformer branch"),
    "04_fcu": ({"fcu"}, "the feature coupling units"),
    "05_coupled_block": ({"conv 3", "trans 3", "fcu 3"}, "one coupled block, here block 3"),
    "06_conformer": (ALL, "the whole model"),
    "07_weights": (ALL - {"image"}, "everything that holds weights"),
    "08_training": ({"heads"}, "the two heads, whose losses train everything"),
    "09_scaling": (ALL, "the whole model, a copy in each process"),
    "10_ablation": ({"fcu", "heads"}, "what is switched off: the coupling units and the heads"),
    "11_visualize": (
        {"conv", "trans", "fcu"},
        "the maps, the tokens, and what crosses between them",
    ),
    "12_robustness": (
        {"image", "heads"},
        "the image, which is turned and resized, and the answers",
    ),
    "13_cost": (ALL, "the whole model, weighed part by part"),
}

BLUE, ORANGE, GREEN, TEXT = "#1f5f99", "#b45309", "#2f7d4f", "#1a1a1a"
UNLIT, UNLIT_TEXT = "#e5e5e5", "#5f5f5f"
COLOURS = {"conv": BLUE, "trans": ORANGE, "fcu": GREEN}  # all other parts: TEXT

STAGES = (("1", 1), ("2–4", 3), ("5–8", 4), ("9–12", 4))  # label, number of blocks
CELL, GAP, STAGE_GAP, LANES_LEFT = 24, 4, 24, 190
CONV_Y, TRANS_Y, MIDDLE = 94, 302, 198  # centre lines of the two lanes and between them
CONV_HEIGHTS = (84, 84, 60, 40)  # the map shrinks from stage to stage; the tokens do not
TRANS_HEIGHT = 52


class Map:
    """The elements of one drawing, collected from left to right."""

    def __init__(self, lit: set[str]) -> None:
        self.lit, self.elements = lit, []

    def is_lit(self, part: str) -> bool:
        """Tell whether a part is lit, alone ("conv 3") or with all of its kind ("conv")."""
        return not self.lit.isdisjoint({part, part.split()[0]})

    def colour(self, part: str, unlit: str) -> str:
        """Return the part's colour where it is lit, `unlit` otherwise."""
        return COLOURS.get(part.split()[0], TEXT) if self.is_lit(part) else unlit

    def box(self, part: str, x: int, y: int, width: int, height: int) -> None:
        """Add a filled box, with its left edge at x and its centre line at y."""
        self.elements.append(
            f'<rect x="{x}" y="{y - height // 2}" width="{width}" height="{height}" rx="4" '
            f'fill="{self.colour(part, UNLIT)}" stroke="{self.colour(part, UNLIT_TEXT)}"/>'
        )

    def text(self, part: str, x: int, y: int, words: str, inside: bool = False) -> None:
        """Add words centred on x; `inside` a lit box they are white."""
        fill = "#ffffff" if inside and self.is_lit(part) else self.colour(part, UNLIT_TEXT)
        weight = ' font-weight="bold"' if self.is_lit(part) else ""
        self.elements.append(f'<text x="{x}" y="{y}" fill="{fill}"{weight}>{words}</text>')

    def arrow(self, part: str, *points: tuple[int, int]) -> None:
        """Add a line through the points with a head at its end."""
        colour = self.colour(part, UNLIT_TEXT)
        (x0, y0), (x1, y1) = points[-2:]
        dx, dy = (x1 > x0) - (x1 < x0), (y1 > y0) - (y1 < y0)  # the last piece is straight
        a, b = (
            (x1 - 9 * dx - 6 * dy, y1 - 9 * dy - 6 * dx),
            (x1 - 9 * dx + 6 * dy, y1 - 9 * dy + 6 * dx),
        )
        line = " ".join(f"{x},{y}" for x, y in (*points[:-1], (x1 - 8 * dx, y1 - 8 * dy)))
        width = 3 if self.is_lit(part) else 1.5
        self.elements.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{width}"/>'
            f'<polygon points="{x1},{y1} {a[0]},{a[1]} {b[0]},{b[1]}" fill="{colour}"/>'
        )

    def coupling(self, numbers: range, left: int, top: int, bottom: int) -> None:
        """Add what couples the blocks of one stage: a pair of arrows, or that of the lit block."""
        middle = left + (len(numbers) * (CELL + GAP) - GAP) // 2
        part, down, up, words = "fcu", middle - 27, middle + 27, middle
        for place, number in enumerate(numbers):
            if f"fcu {number}" in self.lit:
                x = left + place * (CELL + GAP) + CELL // 2
                part, down, up, words = f"fcu {number}", x - 9, x + 9, x - 42
        self.arrow(part, (down, top), (down, bottom))
        self.arrow(part, (up, bottom), (up, top))
        self.text(part, words, MIDDLE + 8, "FCU")

    def branches(self) -> int:
        """Add both lanes with the couplings between them; return where they end."""
        left, first = LANES_LEFT, 1
        for (label, blocks), height in zip(STAGES, CONV_HEIGHTS, strict=True):
            numbers = range(first, first + blocks)
            for place, number in enumerate(numbers):
                x = left + place * (CELL + GAP)
                self.box(f"conv {number}", x, CONV_Y, CELL, height)
                self.box(f"trans {number}", x, TRANS_Y, CELL, TRANS_HEIGHT)
            if first > 1:  # block 1 is not coupled
                self.coupling(
                    numbers, left, CONV_Y + height // 2 + 5, TRANS_Y - TRANS_HEIGHT // 2 - 5
                )
            right = left + blocks * (CELL + GAP) - GAP
            self.text("blocks", (left + right) // 2, TRANS_Y + 52, label)
            left, first = right + STAGE_GAP, first + blocks
        return left - STAGE_GAP


def draw(chapter: str) -> str:
    """Return the SVG text of one chapter's map."""
    lit, words = LIT[chapter]
    picture = Map(lit)
    picture.box("image", 6, MIDDLE, 76, 76)
    picture.text("image", 44, MIDDLE + 7, "image", inside=True)
    picture.arrow("image", (83, MIDDLE), (102, MIDDLE))
    picture.box("stem", 103, MIDDLE, 64, 64)
    picture.text("stem", 135, MIDDLE + 7, "stem", inside=True)
    for part, y in (("conv", CONV_Y), ("trans", TRANS_Y)):
        picture.arrow(part, (135, MIDDLE + (33 if y > MIDDLE else -33)), (135, y), (188, y))
    picture.text("conv", 385, 30, "CNN branch")
    picture.text("trans", 385, TRANS_Y + 84, "transformer branch")
    picture.text("blocks", 128, TRANS_Y + 52, "blocks")
    right = picture.branches()
    for part, y in (("conv", CONV_Y), ("trans", TRANS_Y)):
        picture.arrow(part, (right + 2, y), (right + 24, y))
        picture.box("heads", right + 25, y, 62, 44)
        picture.text("heads", right + 56, y + 7, "head", inside=True)
        step = 22 if y < MIDDLE else -22
        picture.arrow("heads", (right + 56, y + step), (right + 56, MIDDLE - step))
        picture.text("heads", right + 92, (y + MIDDLE) // 2 + 7, "logits")
    picture.text("heads", right + 56, MIDDLE + 8, "+")
    picture.text("heads", right + 92, MIDDLE + 7, "sum")
    body = "\n".join(picture.elements)
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 740 400" role="img" \
font-family="sans-serif" font-size="22" text-anchor="middle">
<title>Model map: {words}</title>
<desc>An image enters the stem. From there a CNN branch (above) and a transformer branch (below) \
run side by side through 12 blocks: block 1, then 2 to 4, 5 to 8 and 9 to 12. From block 2 on, \
feature coupling units (FCU) carry maps down and tokens up. Each branch ends in a head with its \
own logits, and the logits are summed. Lit in this drawing: {words}.</desc>
<rect width="740" height="400" fill="#ffffff"/>
{body}
</svg>
"""


def main() -> None:
    """Write the drawing of each chapter."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for chapter in LIT:
        (FOLDER / f"{chapter}.svg").write_text(draw(chapter), encoding="utf-8")


if __name__ == "__main__":
    main()
