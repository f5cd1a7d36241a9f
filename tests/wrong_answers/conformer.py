"""Wrong answers to the exercises of chapter 6, each with words that its verdict must contain."""

_PLAN = """
def my_plan(config):
    blocks = []
    for number in range(2, config.depth + 1):
        stage, place = divmod(number - 1, config.depth // 3)
        shrinks = 2 if stage > 0 and place == 0 else 1
        last = 2 if number == config.depth else 1
        width = int(64 * 2**stage * config.channel_ratio)
        fcu = config.patch_size // 4 // 2**stage
        {change}
        blocks.append({row})
    return blocks
"""


def _plan(change="pass", row="(width, shrinks, last, fcu)"):
    return _PLAN.format(change=change, row=row)


_FAULTY = _plan(row="(64 * 2**stage, 1, shrinks, config.patch_size // 4)")


def _probabilities(body):
    return f"def my_probabilities(logits):\n    return {body}\n"


def _predict(numbers):
    return f"def my_prediction():\n    return {numbers}\n"


WRONG = {
    "check_plan": [
        (_FAULTY, "the widths do not grow with channel_ratio"),
        (_FAULTY, "blocks 5 and 9 must shrink in the first bottleneck"),
        (_FAULTY, "block 12 does not halve the maps"),
        (_FAULTY, "the FCU stride stays 4"),
        (_plan("width //= 4"), "those of the tap"),
        (_plan("width += 1"), "expected [384, 768, 1536]"),
        (_plan("fcu *= 4"), "count pixels"),
        (_plan("fcu += 1"), "expected [4, 2, 1]"),
        (_plan("last = 1"), "block 12 does not halve"),
        (_plan("last = 2"), "must not shrink in the second bottleneck"),
        (_plan("shrinks = 1"), "must shrink in blocks 5 and 9 and nowhere else"),
        (_plan("shrinks = 3 if shrinks == 2 else 1"), "must have stride 2"),
        (_plan("shrinks = 2 if number in (5, 9) else 1"), "at depth 6, patch 64"),
        (_plan("fcu = config.patch_size // 4 // (stage + 1)"), "expected [16, 8, 4]"),
        (_plan("width = 64 * 2**stage * config.channel_ratio * 1.0"), "must be whole numbers"),
        (_plan(row="(width, shrinks)"), "four numbers for each block"),
        (_plan().replace("range(2,", "range(1,"), "12 blocks at depth 12; expected 11"),
    ],
    "check_probabilities": [
        (_probabilities("logits.conv.softmax(-1) + logits.trans.softmax(-1)"), "before the sum"),
        (
            _probabilities("(logits.conv.softmax(-1) + logits.trans.softmax(-1)) / 2"),
            "before the mean",
        ),
        (_probabilities("(logits.sum() / 2).softmax(-1)"), "averaged the logits"),
        (_probabilities("logits.conv.softmax(-1)"), "only the CNN's head"),
        (_probabilities("logits.trans.softmax(-1)"), "only the transformer's head"),
        (
            _probabilities("logits.conv.softmax(-1) * logits.trans.softmax(-1)"),
            "the product ranks well",
        ),
        (_probabilities("logits.sum().softmax(0)"), "runs over the batch"),
        (_probabilities("logits.sum()"), "these are logits"),
        (_probabilities("logits.sum().log_softmax(-1)"), "logarithms"),
        (_probabilities("logits.sum().sigmoid()"), "each class alone"),
        (_probabilities("logits.sum().square()"), "the numbers differ"),
        (_probabilities("logits.sum().argmax(-1)"), "expected (5, 7)"),
        (_probabilities("logits"), "a torch.Tensor is expected"),
    ],
    "check_prediction": [
        (_predict((256, 65, 1)), "the stem rounds up"),
        (_predict((224, 50, 1)), "at least 250"),
        (_predict((250, 50, 1)), "63 is no multiple of 8"),
        (_predict((260, 50, 1)), "64 positions"),
        (_predict((253, 64, 1)), "class token is missing"),
        (_predict((253, 50, 1)), "224 pixels"),
        (_predict((253, 257, 1)), "patch 16"),
        (_predict((253, 66, 1)), "expected 1 + 8 x 8"),
        (_predict((253, 65, 2 * 561_512_448)), "these are operations"),
        (_predict((253, 65, 660_602_880)), "block 1 is counted"),
        (_predict((253, 65, 542_638_080)), "block 12 saves too"),
        (_predict((253, 65, 140_378_112)), "the taps of Ti"),
        (_predict((253, 65, 165_150_720)), "not all of them"),
        (_predict((253, 65, 4 * 561_512_448)), "a quarter as wide"),
        (_predict((253, 65, 560_848_896)), "the class token is not pooled"),
        (_predict((253, 65, 603_979_776)), "the patches remain"),
        (_predict((253, 65, 7)), "7 saved"),
        (_predict(7), "return three numbers"),
    ],
}
