"""Wrong answers to the exercises of chapter 10, each with words that its verdict must contain."""

_INTERVAL = """
def my_interval(base, own):
    seeds = sorted(base.keys() & own.keys())
    gaps = {gaps}
    n, mean, spread = len(gaps), {mean}, {spread}
    half = {half}
    return {result}
"""


def _interval(
    gaps="[own[seed] - base[seed] for seed in seeds]",
    mean="statistics.mean(gaps)",
    spread="statistics.stdev(gaps)",
    half="STUDENT_T[n - 2] * spread / math.sqrt(n)",
    result="mean - half, mean + half",
):
    return _INTERVAL.format(gaps=gaps, mean=mean, spread=spread, half=half, result=result)


_VARIANCES = (
    "sum(statistics.variance([side[seed] for seed in seeds]) for side in (base, own)) ** 0.5"
)

_SEEDS = """
def my_seeds(difference, spread):
    for n in range(2, {stop}):
        if {factor} * spread < difference:
            return n
    return {none}
"""


def _seeds(factor="STUDENT_T[n - 2] / math.sqrt(n)", stop="11", none="None"):
    return _SEEDS.format(factor=factor, stop=stop, none=none)


_KEY = """
import hashlib, json
def my_key(options, seed):
    text = {text}
    return {result}
"""


def _key(
    text="json.dumps([options, seed], sort_keys=True)",
    result="hashlib.sha256(text.encode()).hexdigest()[:16]",
):
    return _KEY.format(text=text, result=result)


_FAULTY = """
def my_key(options, seed):
    return str(hash(str(options)))
"""

WRONG = {
    "check_interval": [
        (_interval(gaps="[base[seed] - own[seed] for seed in seeds]"), "are exchanged"),
        (
            _interval(gaps="[b - a for a, b in zip(base.values(), own.values())]"),
            "match them by seed",
        ),
        (
            _interval(mean="statistics.mean(own.values()) - statistics.mean(base.values())"),
            "leave them out of the mean",
        ),
        (_interval(spread=_VARIANCES), "the interval for runs without pairs: take"),
        (
            _interval(spread=_VARIANCES, half="STUDENT_T[2 * n - 3] * spread / math.sqrt(n)"),
            "with 2n - 2 degrees of freedom",
        ),
        (_interval(half="STUDENT_T[n - 2] * spread"), "where single differences lie"),
        (_interval(half="STUDENT_T[n - 2] * spread / n"), "not by n"),
        (_interval(half="STUDENT_T[n - 1] * spread / math.sqrt(n)"), "degrees of freedom, not n:"),
        (_interval(half="STUDENT_T[n - 3] * spread / math.sqrt(n)"), "not n - 2"),
        (_interval(half="1.96 * spread / math.sqrt(n)"), "1.96 is for many runs"),
        (_interval(half="2 * spread / math.sqrt(n)"), "a rule of thumb"),
        (_interval(spread="statistics.pstdev(gaps)"), "not pstdev"),
        (_interval(half="spread / math.sqrt(n)"), "multiply by Student's t"),
        (_interval(half="3.182 * spread / math.sqrt(n)"), "with 2 pairs, Student's t is 12.706"),
        (_interval(result="mean + half, mean - half"), "the lower end comes first"),
        (_interval(half="7 * spread"), "half the width is"),
        (_interval(mean="7"), "the middle is 7.000"),
        (_interval(result="mean"), "return two numbers"),
        (_interval(result="(mean, half, n)"), "return two numbers"),
        (_interval(result="(mean, math.nan)"), "finite numbers"),
        (_interval(gaps="[own[seed] - base[seed] for seed in own]"), "KeyError"),
    ],
    "check_seeds": [
        (_seeds("1.96 / math.sqrt(n)"), "1.96 is for many runs"),
        (_seeds("STUDENT_T[n - 2]"), "s / √n, not s"),
        (_seeds("STUDENT_T[n - 2] / n"), "not s / n"),
        (_seeds("STUDENT_T[min(n - 1, 8)] / math.sqrt(n)"), "n - 1 degrees of freedom"),
        (_seeds("math.sqrt(2) * STUDENT_T[n - 2] / math.sqrt(n)"), "no factor √2"),
        (_seeds("2 * STUDENT_T[n - 2] / math.sqrt(n)"), "once, not twice"),
        (_seeds(none="10"), "return None"),
        (_seeds(stop="6"), "needs"),
        (_seeds(none="'many'"), "a whole number or None"),
        (_seeds("STUDENT_T[n - 2] / math.sqrt(n) + 0.1"), "needs"),
    ],
    "check_key": [
        (_FAULTY, "another number each time Python starts"),
        (_key(result="hash(text)"), "another number each time Python starts"),
        (_key("json.dumps([options, seed])"), "order in which options are written"),
        (_key("str(sorted(options.items())) + str(seed)"), "inside a dict of options either"),
        (_key("json.dumps(options, sort_keys=True)"), "another seed is another training"),
        (_key("json.dumps([sorted(options), seed])"), "has the same name"),
        (_key(result="text"), "letters and digits"),
        (_key(result="hashlib.sha256(text.encode()).hexdigest()[:3]"), "share a name"),
        (_key(result="hashlib.sha256(text.encode()).digest()"), "return a text"),
        (_key(result="__import__('uuid').uuid4().hex"), "two calls"),
        (
            _key("str(seed) + json.dumps(options, sort_keys=True)[::-1]", "text"),
            "letters and digits",
        ),
        (
            _key("''.join(c for c in json.dumps([options, seed], sort_keys=True) if c.isalnum())"),
            "run into each other",
        ),
    ],
}
