"""Wrong answers to the exercises of chapter 01, with words that the check must say."""

FIELD = """
def my_receptive_field(layers):
    field, step = 1, 1
    for kernel_size, stride in layers:
        {}
    return field
"""

SIMILARITY = """
def my_similarity(image, side):
    patches = rearrange(image, "{}", p=side, q=side)
    {}
"""
ROWS = "c (row p) (col q) -> (row col) (c p q)"

LABEL = """
def my_label(rotation, agreement):
    return {}
"""

WRONG = {
    "check_receptive_field": [
        (FIELD.format("field += kernel_size - 1"), "left out the strides"),
        (FIELD.format("field += kernel_size * step; step *= stride"), "adds nothing"),
        (FIELD.format("step *= stride; field += (kernel_size - 1) * step"), "own window"),
        (FIELD.format("field += (kernel_size - 1) * step; step = stride"), "all earlier layers"),
        (FIELD.format("field = (field - 1) * stride + kernel_size"), "not of earlier ones"),
        ("def my_receptive_field(layers): return 0", "starts at 1"),
        ("def my_receptive_field(layers): return 1.0", "return an int"),
        (FIELD.format("field += (kernel_size - 1) * missing"), "NameError"),
    ],
    "check_similarity": [
        (
            SIMILARITY.format(
                "c (row p) (col q) -> (col row) (c p q)",
                "q = F.normalize(patches - patches.mean(0), dim=1); return q @ q.T",
            ),
            "column by column",
        ),
        (
            SIMILARITY.format(ROWS, "q = F.normalize(patches, dim=1); return q @ q.T"),
            "take off the mean patch",
        ),
        (
            SIMILARITY.format(ROWS, "q = patches - patches.mean(0); return q @ q.T"),
            "divide by the lengths",
        ),
        (
            SIMILARITY.format(
                ROWS,
                "q = F.normalize(patches - patches.mean(1, keepdim=True), dim=1); return q @ q.T",
            ),
            "own mean",
        ),
        (
            SIMILARITY.format(
                "c (p row) (q col) -> (row col) (c p q)",
                "q = F.normalize(patches - patches.mean(0), dim=1); return q @ q.T",
            ),
            "mixed",
        ),
        (
            SIMILARITY.format(
                ROWS, "q = F.normalize(patches - patches.mean(), dim=1); return q @ q.T"
            ),
            "something else than the mean patch",
        ),
        (
            SIMILARITY.format(
                ROWS, "q = F.normalize(patches, dim=1); q = q - q.mean(0); return q @ q.T"
            ),
            "patch first, then divide",
        ),
        (SIMILARITY.format(ROWS, "return patches"), "shape"),
        (SIMILARITY.format(ROWS, "return torch.zeros(6, 6)"), "diagonal"),
    ],
    "check_label": [
        (LABEL.format("2 * rotation + agreement"), "a sum of opinions may solve"),
        (LABEL.format("rotation"), "depend on the agreement"),
        (LABEL.format("agreement"), "depend on the rotation"),
        (
            LABEL.format("torch.where(rotation < 2, rotation ^ agreement, 2 + agreement)"),
            "label of the chapter",
        ),
        (LABEL.format("(rotation + agreement) % 2 - 1"), "negative"),
        (LABEL.format("(rotation + agreement).float()"), "int64"),
    ],
}
