"""Wrong answers to the exercises of chapter 9, each with words that its verdict must contain."""


def _gradient(result):
    return f"""
def my_gradient(gradients, counts):
    weighted = sum(gradient * count for gradient, count in zip(gradients, counts))
    return {result}
"""


def _statistics(mean="(weights * means).sum(0)", variance="within + between"):
    return f"""
def my_statistics(counts, means, variances):
    weights = (counts / counts.sum())[:, None]
    mean = {mean}
    within = (weights * variances).sum(0)
    between = (weights * (means - mean) ** 2).sum(0)
    return mean, {variance}
"""


def _share(result, refuse="len(keys) % processes"):
    return f"""
def my_share(keys, process, processes):
    if {refuse}:
        raise ValueError("cannot be dealt evenly")
    size = len(keys) // processes
    return {result}
"""


WRONG = {
    "check_gradient": [
        (_gradient("sum(gradients)"), "that is the sum of the gradients"),
        (_gradient("sum(gradients) / len(counts)"), "that is the plain mean"),
        (_gradient("weighted"), "these are sums of losses"),
        (_gradient("weighted / sum(counts) / len(counts)"), "divided twice"),
        (_gradient("weighted / len(counts)"), "divided by the number of processes"),
        (_gradient("gradients[0]"), "first process's gradient alone"),
        (_gradient("gradients[0].mul_(counts[0]).add_(weighted - weighted)"), "the gradient"),
        (
            "def my_gradient(gradients, counts):\n"
            "    for gradient, count in zip(gradients, counts):\n"
            "        gradient *= count\n"
            "    return sum(gradients) / sum(counts)\n",
            "have changed; make a new tensor",
        ),
        (_gradient("(weighted / sum(counts)).sum()"), "shape"),
    ],
    "check_statistics": [
        (_statistics(variance="within"), "the variance between the parts is missing: their means"),
        (_statistics(variance="variances.mean(0)"), "the variance between the parts is missing"),
        (_statistics(variance="between"), "that is the variance between the parts alone"),
        (
            _statistics(variance="within + ((means - mean) ** 2).mean(0)"),
            "between the parts must count each part",
        ),
        (
            _statistics(variance="variances.mean(0) + between"),
            "within the parts must count each part",
        ),
        (_statistics(mean="means.mean(0)"), "that is the mean of the means"),
        (_statistics(variance="(within + between).sqrt()"), "square root"),
        (
            _statistics(variance="(within + between) * counts.sum() / (counts.sum() - 1)"),
            "Bessel",
        ),
        (_statistics(variance="within + between + mean**2"), "that is the mean square"),
        ("def my_statistics(counts, means, variances):\n    return means.mean(0)\n", "two tensors"),
    ],
    "check_share": [
        (_share("keys[process * size : (process + 1) * size]"), "these are blocks"),
        (
            _share("keys[process * size : (process + 1) * size]", refuse="False"),
            "these are blocks",
        ),
        (_share("keys[process::processes]", refuse="False"), "must be refused"),
        (_share("keys[::processes]"), "in two shares"),
        (_share("keys"), "in two shares"),
        (_share("keys[process::processes][:-1]"), "in no share"),
        (_share("list(range(process, len(keys), processes))"), "not their places"),
        (_share("keys[processes - 1 - process :: processes]"), "begins with key r"),
        (_share("keys if process == 0 else []"), "not equal"),
        (_share("tuple(keys[process::processes])"), "return a list"),
    ],
}
