"""Checks of the exercises of chapter 9, scaling."""

from collections.abc import Callable

import torch
from torch import Tensor

from conformer_src.checks import agrees, exercise, require, require_shape


def _require_value(given: Tensor, right: Tensor, mistakes: dict[str, Tensor], name: str) -> None:
    """Require a value; name the mistake that gives another one."""
    if not agrees(given, right):
        found = [words for words, value in mistakes.items() if agrees(given, value)]
        require(False, found[0] if found else f"{name} is off by {(given - right).abs().max():.3g}")


@exercise
def check_gradient(answer: Callable[[list[Tensor], list[int]], Tensor]) -> str:
    """Check the mean of gradients of shares that are not equal."""
    images, targets = torch.randn(2, 12, dtype=torch.float64)
    weights = torch.randn(3, dtype=torch.float64, requires_grad=True)
    powers = torch.stack([images**power for power in range(3)], 1)

    def gradient(share: slice) -> Tensor:
        loss = ((powers[share] @ weights - targets[share]) ** 2).mean()
        return torch.autograd.grad(loss, weights)[0]

    for counts in ([6, 6], [1, 3, 8], [12]):
        ends = torch.tensor(counts).cumsum(0).tolist()
        gradients = [gradient(slice(e - n, e)) for e, n in zip(ends, counts, strict=True)]
        before = [one.clone() for one in gradients]
        given = answer(gradients, list(counts))
        require_shape(given, (3,), "the gradient")
        right, added = gradient(slice(None)), sum(before)
        weighted = sum(one * count for one, count in zip(before, counts, strict=True))
        mistakes = {
            "that is the sum of the gradients; take their mean": added,
            "that is the plain mean: a process with more images counts for more": (
                added / len(counts)
            ),
            "these are sums of losses; divide by the number of all images": weighted,
            "that is divided twice: by the images and by the processes again": right / len(counts),
            "that is divided by the number of processes; divide by that of all images": (
                weighted / len(counts)
            ),
            "that is the first process's gradient alone": before[0],
        }
        _require_value(given, right, mistakes, "the gradient")
        same = all(torch.equal(one, old) for one, old in zip(gradients, before, strict=True))
        require(same, "the gradients that you were given have changed; make a new tensor")
    return "the gradient of the whole batch, whatever the shares"


@exercise
def check_statistics(answer: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> str:
    """Check mean and variance of all values from those of the parts."""
    for sizes in ([8, 8], [2, 6, 16], [5]):
        values = [3 * n + torch.randn(size, 4).double() for n, size in enumerate(sizes)]
        counts = torch.tensor(sizes, dtype=torch.float64)
        means = torch.stack([part.mean(0) for part in values])
        variances = torch.stack([part.var(0, correction=0) for part in values])
        given = answer(counts, means, variances)
        pair = isinstance(given, tuple | list) and len(given) == 2
        require(pair, "return two tensors: the mean and the variance")
        for value, name in zip(given, ("the mean", "the variance"), strict=True):
            require_shape(value, (4,), name)
        everything, weights = torch.cat(values), (counts / counts.sum())[:, None]
        mean = everything.mean(0)
        plain = {
            "that is the mean of the means: a part with more values counts for more": (
                means.mean(0)
            )
        }
        _require_value(given[0], mean, plain, "the mean")
        within, between = (weights * variances).sum(0), (weights * (means - mean) ** 2).sum(0)
        mistakes = {
            "the variance between the parts is missing: their means differ": within,
            "that is the mean of the variances: the variance between the parts is missing, and "
            "a part with more values counts for more": variances.mean(0),
            "that is the variance between the parts alone; add the one within them": between,
            "the variance between the parts must count each part by its values": (
                within + ((means - mean) ** 2).mean(0)
            ),
            "the variance within the parts must count each part by its values": (
                variances.mean(0) + between
            ),
            "that is the square root, the standard deviation; return the variance": (
                everything.std(0, correction=0)
            ),
            "that has Bessel's correction; divide by the number of values": everything.var(0),
            "that is the mean square; subtract the square of the mean": (everything**2).mean(0),
        }
        _require_value(given[1], everything.var(0, correction=0), mistakes, "the variance")
    return "mean and variance of all values, from three numbers a part"


@exercise
def check_share(answer: Callable[[list[int], int, int], list[int]]) -> str:
    """Check the deal: equal shares, nothing twice, nothing lost, else a refusal."""
    for images, processes in ((8, 2), (12, 3), (6, 1)):
        keys = [100 + image for image in range(images)]
        shares = [answer(list(keys), process, processes) for process in range(processes)]
        for share in shares:
            listed = isinstance(share, list) and all(isinstance(key, int) for key in share)
            require(listed, "return a list of keys")
        dealt = [key for share in shares for key in share]
        require(set(dealt) <= set(keys), "return keys of the batch, not their places")
        require(len(set(dealt)) == len(dealt), "some images are in two shares")
        require(len(dealt) == images, "some images are in no share")
        require(
            len({len(share) for share in shares}) == 1,
            "the shares are not equal, so the mean of their gradients is not that of the batch",
        )
        blocks = [keys[n * images // processes :][: images // processes] for n in range(processes)]
        require(
            processes == 1 or shares != blocks,
            "these are blocks: a fair deal, but not how this loop deals; take every p-th key",
        )
        right = [keys[process::processes] for process in range(processes)]
        require(shares == right, "process r begins with key r, and takes every p-th from there on")
    for images, processes in ((7, 2), (2, 3)):
        try:
            share = answer(list(range(images)), 0, processes)
        except ValueError as error:
            require(bool(str(error)), "say in the ValueError what does not fit")
        else:
            require(
                False,
                f"{images} images for {processes} processes must be refused with a ValueError; "
                f"process 0 got {len(share)}",
            )
    return "every p-th key, equal shares, and a refusal where that cannot be"
