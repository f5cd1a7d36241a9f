"""Wrong answers to the exercises of chapter 12, each with words that its verdict must contain."""


def _prediction(
    resized="36 / 144, 12 / 144, 1 / 2", reframed="4 / 144, 4 / 144, 12 / 152", name="reframed"
):
    return f"""
def my_prediction():
    return {{"resized": ({resized}), "{name}": ({reframed})}}
"""


_FRAME = """
def my_frame(images, size, fill):
    down, right = size - images.shape[2], size - images.shape[3]
    top, left = down // 2, right // 2
    level = images.new_tensor(fill).view(1, -1, 1, 1)
    return {result}
"""
_MIDDLE = "[left, right - left, top, down - top]"

_INTO = """
def my_frame(images, size, fill):
    images -= images.new_tensor(fill).view(1, -1, 1, 1)
    return F.pad(images, [0, size - images.shape[3], 0, size - images.shape[2]])
"""


def _frame(result):
    return _FRAME.format(result=result)


def _retention(kept):
    return f"""
def my_retention(curve, trained, chance):
    whole = curve[trained].sum
    return {{value: {kept} for value, scores in curve.items()}}
"""


_LIST = """
def my_retention(curve, trained, chance):
    return [100.0 for value in curve]
"""


def _positions(result):
    return f"""
def my_positions(pos_embed, side):
    border = (side - pos_embed.shape[-1]) // 2
    return {result}
"""


WRONG = {
    "check_prediction": [
        (_prediction(name="framed"), 'the keys "resized" and "reframed"'),
        (_prediction(resized="1 / 4, 1 / 12"), "three numbers"),
        (_prediction(resized="36 / 64, 1 / 12, 1 / 2"), "144 pixels"),
        (_prediction(resized="1 / 4, 1 / 4, 1 / 2"), "do not grow with the area"),
        (_prediction(resized="1 / 4, 1 / 8, 1 / 2"), "twice the size"),
        (_prediction(resized="1 / 4, 6 / 144, 1 / 2"), "each row has two edges"),
        (_prediction(resized="1 / 4, 24 / 144, 1 / 2"), "only left neighbours"),
        (_prediction(resized="1 / 4, 1 / 12, 1 / 4"), "scores are not shares"),
        (_prediction(resized="1 / 4, 1 / 12, 1 / 6"), "each token stands there nine times"),
        (_prediction(reframed="1 / 4, 1 / 36, 12 / 152"), "the frame has 144 pixels"),
        (_prediction(reframed="1 / 36, 1 / 16, 12 / 152"), "that is 8 x 8"),
        (_prediction(reframed="1 / 36, 1 / 36, 1 / 2"), "take attention too"),
        (_prediction(reframed="1 / 36, 1 / 36, 1 / 6"), "count the dark pixels"),
        (_prediction(reframed="1 / 36, 1 / 36, 12 / 140"), "below the fraction bar too"),
        (_prediction(reframed="1 / 36, 1 / 36, 12 / 156"), "140 are dark"),
        (_prediction(reframed="1 / 36, 1 / 36, 0.9"), "count again"),
    ],
    "check_frame": [
        (_frame("images"), "expected (2, 3, 8, 8)"),
        (_frame(f"F.pad(images, {_MIDDLE})"), "filled with 0"),
        (_frame(f"F.pad(images, {_MIDDLE}, value=fill[0])"), "the fill of the first one"),
        (_frame("F.pad(images - level, [0, right, 0, down]) + level"), "upper left corner"),
        (
            _frame("F.pad(images - level, [right - left, left, down - top, top]) + level"),
            "of an odd rest",
        ),
        (_frame("F.interpolate(images, (size, size), mode='bilinear')"), "were enlarged"),
        (_frame("F.interpolate(images, (size, size))"), "by repeating pixels"),
        (_frame(f"F.pad(images, {_MIDDLE}, mode='replicate')"), "repeats the border"),
        (_frame(f"F.pad(images - level, {_MIDDLE})"), "not where they belong"),
        (_INTO, "wrote into the images themselves"),
    ],
    "check_retention": [
        (_LIST, "return a dict"),
        (_retention("100 * scores.sum / whole"), "chance is left out"),
        (_retention("100 * (scores.sum - chance) / whole"), "below the fraction bar"),
        (_retention("100 * scores.sum / (whole - chance)"), "above the fraction bar"),
        (_retention("(scores.sum - chance) / (whole - chance)"), "give percent"),
        (_retention("max(0, 100 * (scores.sum - chance) / (whole - chance))"), "do not cut it off"),
        (_retention("100 * scores.sum / whole - chance"), "not from what is kept"),
        (_retention("100 * (scores.sum - chance) / (100 - chance)"), "not with 100"),
        (_retention("50.0"), "expected"),
    ],
    "check_positions": [
        (_positions("pos_embed"), "expected (1, 5, 6, 6)"),
        (
            _positions("F.interpolate(pos_embed, (side, side), mode='bicubic')"),
            "stretched (bicubic)",
        ),
        (_positions("F.interpolate(pos_embed, (side, side))"), "stretched (nearest)"),
        (_positions("F.pad(pos_embed, (border,) * 4)"), "the border is 0"),
        (_positions("F.pad(pos_embed, (border,) * 4, mode='reflect')"), "mirrors"),
        (_positions("F.pad(pos_embed, (border,) * 4, mode='circular')"), "wraps around"),
        (_positions("F.pad(pos_embed, (0, 2 * border) * 2, mode='replicate')"), "upper left"),
        (_positions("2 * F.pad(pos_embed, (border,) * 4, mode='replicate')"), "value by value"),
    ],
}
