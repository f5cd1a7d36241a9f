"""Checks of the exercises of chapter 10, ablation."""

import builtins
import math
import statistics
from collections.abc import Callable
from unittest.mock import patch

from conformer_src.ablation import STUDENT_T, margin
from conformer_src.checks import Mistake, exercise, require

_BASE = {0: 80.0, 1: 84.0, 2: 78.0, 3: 82.0, 7: 60.0}
_OWN = {3: 84.5, 2: 79.0, 1: 86.0, 0: 81.0, 5: 95.0}  # in another order, and with a seed of its own


def _numbers(value: object, count: int) -> list[float]:
    """Return that many finite numbers of an answer."""
    if not (isinstance(value, tuple | list) and len(value) == count):
        raise Mistake("return two numbers, the lower and the upper end")
    kinds = (int, float)
    require(
        all(isinstance(one, kinds) and math.isfinite(one) for one in value),
        "both ends must be finite numbers",
    )
    return [float(one) for one in value]


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=2e-3, abs_tol=1e-6)


def _interval_mistakes(base: dict[int, float], own: dict[int, float]) -> dict[str, tuple]:
    """Return (mean, half width) of wrong intervals, under what is wrong with them."""
    seeds = sorted(base.keys() & own.keys())
    gaps = [own[seed] - base[seed] for seed in seeds]
    mean, count, spread = statistics.mean(gaps), len(gaps), statistics.stdev(gaps)
    ordered = [b - a for a, b in zip(base.values(), own.values(), strict=True)]
    all_mean = statistics.mean(own.values()) - statistics.mean(base.values())
    both = [statistics.variance([side[seed] for seed in seeds]) for side in (base, own)]
    apart = math.sqrt(sum(both) / count)
    root, t = math.sqrt(count), STUDENT_T[count - 2]
    return {
        "base and variant are exchanged: subtract the base": (-mean, t * spread / root),
        "the values are matched by their place in the dicts; match them by seed": (
            statistics.mean(ordered),
            margin(ordered),
        ),
        "seeds that only one side has make no pair: leave them out of the mean": (
            all_mean,
            t * spread / root,
        ),
        "that is the interval for runs without pairs: take the spread of the differences": (
            mean,
            t * apart,
        ),
        "that is the interval for runs without pairs, with 2n - 2 degrees of freedom: take the "
        "spread of the differences": (mean, STUDENT_T[2 * count - 3] * apart),
        "that is where single differences lie; a mean of n spreads √n times less": (
            mean,
            t * spread,
        ),
        "divide by √n, not by n": (mean, t * spread / count),
        "n - 1 degrees of freedom, not n: the mean is estimated from the same numbers": (
            mean,
            STUDENT_T[count - 1] * spread / root,
        ),
        "n - 1 degrees of freedom, not n - 2: STUDENT_T starts with 1": (
            mean,
            STUDENT_T[count - 3] * spread / root,
        ),
        "1.96 is for many runs; with few, Student's t is larger": (mean, 1.96 * spread / root),
        "2 is a rule of thumb for many runs; with few, Student's t is larger": (
            mean,
            2 * spread / root,
        ),
        "the spread divides by n - 1 (stdev, not pstdev)": (
            mean,
            t * statistics.pstdev(gaps) / root,
        ),
        "that is the mean and its standard error; multiply by Student's t": (mean, spread / root),
    }


@exercise
def check_interval(answer: Callable[[dict, dict], tuple[float, float]]) -> str:
    """Check the 95 % interval of a mean paired difference."""
    low, high = _numbers(answer(dict(_BASE), dict(_OWN)), 2)
    seeds = sorted(_BASE.keys() & _OWN.keys())
    gaps = [_OWN[seed] - _BASE[seed] for seed in seeds]
    mean, half = statistics.mean(gaps), margin(gaps)
    centre, width = (low + high) / 2, (high - low) / 2
    if not (_close(centre, mean) and _close(width, half)):
        for words, (other, side) in _interval_mistakes(_BASE, _OWN).items():
            require(not (_close(centre, other) and _close(width, side)), words)
        require(width > 0, "the lower end comes first")
        require(_close(centre, mean), f"the middle is {centre:.3f}; expected {mean:.3f}")
        require(False, f"half the width is {width:.3f}; expected {half:.3f}")
    for count in (2, 5, 8):  # other numbers of seeds, other degrees of freedom
        base = {seed: 80.0 + seed % 3 for seed in range(count)}
        own = {seed: 80.0 + 2 * seed for seed in range(count)}
        gaps = [own[seed] - base[seed] for seed in range(count)]
        low, high = _numbers(answer(base, own), 2)
        right = _close((high - low) / 2, margin(gaps))
        require(right, f"with {count} pairs, Student's t is {STUDENT_T[count - 2]}")
    return "the interval of the pairs: mean, spread, √n and the right t"


def _count(difference: float, spread: float, factor: Callable[[int], float]) -> int | None:
    found = (n for n in range(2, 11) if factor(n) * spread < difference)
    return next(found, None)


def _t(count: int) -> float:
    return STUDENT_T[count - 2]


def _seed_mistakes(difference: float, spread: float) -> dict[str, int | None]:
    """Return the numbers of seeds that wrong rules give."""
    rules = {
        "1.96 is for many runs: Student's t depends on n": lambda n: 1.96 / math.sqrt(n),
        "the spread of the mean is s / √n, not s": _t,
        "the spread of the mean is s / √n, not s / n": lambda n: _t(n) / n,
        "n seeds leave n - 1 degrees of freedom": lambda n: (
            STUDENT_T[min(n - 1, len(STUDENT_T) - 1)] / math.sqrt(n)
        ),
        "with pairs, s is the spread of the differences already: no factor √2": lambda n: (
            math.sqrt(2) * _t(n) / math.sqrt(n)
        ),
        "the margin is half the width: compare the difference with it once, not twice": lambda n: (
            2 * _t(n) / math.sqrt(n)
        ),
    }
    return {words: _count(difference, spread, rule) for words, rule in rules.items()}


_CASES = ((0.5, 0.3), (1.0, 0.5), (0.3, 0.3), (0.5, 0.6), (1.0, 0.85), (0.5, 0.65))


@exercise
def check_seeds(answer: Callable[[float, float], int | None]) -> str:
    """Check how many pairs a difference needs to stand out of its margin."""
    given = {case: answer(*case) for case in (*_CASES, (0.1, 1.0), (3.0, 0.2))}
    right = {case: _count(*case, lambda n: _t(n) / math.sqrt(n)) for case in given}
    for value in given.values():
        fits = value is None or (isinstance(value, int) and not isinstance(value, bool))
        require(fits, f"return a whole number or None, not {value!r}")
    if given == right:
        return "Student's t and √n: few seeds pay twice"
    tables = {case: _seed_mistakes(*case) for case in given}
    for words in tables[_CASES[0]]:
        require(any(given[case] != tables[case][words] for case in given), words)
    require(given[0.1, 1.0] is None, "10 seeds do not show 0.1 with a spread of 1: return None")
    case = next(case for case in given if given[case] != right[case])
    raise Mistake(
        f"a difference of {case[0]} with a spread of {case[1]} needs {right[case]}, "
        f"not {given[case]}"
    )


@exercise
def check_key(answer: Callable[[dict, int], str]) -> str:
    """Check that equal trainings have equal names, and different ones different names."""
    options = {"pos_embed": 4, "fcu": {"up": "nearest", "down": "max"}}
    turned = {"fcu": {"down": "max", "up": "nearest"}, "pos_embed": 4}

    def salted(_: object) -> int:
        raise Mistake("hash() of a text is another number each time Python starts: use hashlib")

    with patch.object(builtins, "hash", salted):
        key = answer(options, 0)
    require(isinstance(key, str), f"return a text, not a {type(key).__name__}")
    require(key == answer(options, 0), "two calls with the same training give two names")
    plain = key.isalnum() and len(key) <= 64
    require(plain, "the name becomes a file's: at most 64 letters and digits, nothing else")
    require(
        answer(turned, 0) == key,
        "the order in which options are written must not matter, inside a dict of options either",
    )
    require(answer(options, 1) != key, "another seed is another training: it belongs in the key")
    seeds = {answer(options, seed) for seed in range(2000)}
    require(len(seeds) == 2000, "two of 2,000 seeds share a name: keep more of the digest")
    for changed in (
        {**options, "pos_embed": 8},
        {**options, "fcu": {"up": "nearest", "down": "conv"}},
        {**options, "depth": 3},
        {"pos_embeds": 4, "fcu": options["fcu"]},
    ):
        require(answer(changed, 0) != key, f"{changed} has the same name as {options}")
    glued = answer({"depth": 3}, 11) == answer({"depth": 31}, 1)
    require(
        not glued, "options and seed run into each other: depth 3, seed 11 and depth 31, seed 1"
    )
    return "a name for each training, the same in each process"
