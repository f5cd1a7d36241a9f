"""Wrong answers to the exercises of chapter 5, each with words that its verdict must contain."""

_SIX = '{"conv_block.conv1", "conv_block.conv3", "down", "trans_block", "up", "fusion_block"}'
_LAST = '{"conv_block.conv3", "up", "fusion_block"}'


def _silent(last=_LAST, before="set()", on_maps="set()"):
    return f"def my_silent():\n    return {last}, {before}, {on_maps}\n"


_FORWARD = """
def my_forward(block, maps, tokens):
    wide, tap = block.conv_block(maps)
    update = block.down(tap, tokens)
    {tokens}
    {maps}
    return {result}
"""


def _forward(
    tokens="new = block.trans_block(tokens + update)",
    maps="wide = block.fusion_block(block.med_block(wide), block.up(new, tap)).maps",
    result="Features(wide, new)",
):
    return _FORWARD.format(tokens=tokens, maps=maps, result=result)


_MAPS = """
def my_maps(first, second, maps, reply):
    narrow = first.bn1(first.conv1(maps)).relu()
    raw = first.bn2(first.conv2(narrow))
    tap = raw.relu()
    wide = (first.bn3(first.conv3(tap)) + maps).relu()
    extra = reply({tap})
    inner = {inner}
    inner = second.bn2(second.conv2(inner)).relu(){behind}
    return (second.bn3(second.conv3(inner)) + {skip}).relu()
"""


def _maps(tap="tap", inner="second.bn1(second.conv1(wide)).relu() + extra", behind="", skip="wide"):
    return _MAPS.format(tap=tap, inner=inner, behind=behind, skip=skip)


_DEAF = "second.bn1(second.conv1(wide)).relu()"
_INSIDE = "(second.bn1(second.conv1(wide)) + extra).relu()"


_ABLATION = """
import copy

def my_ablation(block, coupling):
    {body}
    return block
"""


def _ablation(body):
    return _ABLATION.format(body=body.strip().replace("\n", "\n    "))


WRONG = {
    "check_silent": [
        (_silent(last='{"up", "fusion_block"}'), "conv_block.conv3 of the last block is missing"),
        (_silent(last='{"conv_block.conv3", "fusion_block"}'), "up of the last block is missing"),
        (_silent(last='{"conv_block.conv3", "up"}'), "fusion_block of the last block is missing"),
        (_silent(last=_SIX), "conv_block.conv1 of the last block learns: it leads to the tap"),
        (_silent(last=_LAST[:-1] + ', "down"}'), "keys and values"),
        (_silent(last=_LAST[:-1] + ', "trans_block"}'), "the class token is what it returns"),
        (_silent(before=_LAST), "lead to the tap of the last"),
        (_silent(on_maps='{"trans_block", "down"}'), "answer 3: down, trans_block learns"),
        (_silent(last='{"conv3"}'), "answer 1 names conv3: not one of the six"),
        (_silent(before="[]"), "answer 2 is a list"),
        (f"def my_silent():\n    return {_LAST}\n", "return three sets"),
    ],
    "check_forward": [
        (
            _forward(
                maps="wide = block.fusion_block(block.med_block(wide), block.up(tokens, tap))[0]"
                "\n    new = block.trans_block(tokens + update)",
                tokens="pass",
            ),
            "up reads the old tokens",
        ),
        (
            _forward(
                maps="wide = block.fusion_block(block.med_block(wide), "
                "block.up(tokens + update, tap)).maps"
            ),
            "up reads the sum",
        ),
        (_forward(tokens="new = block.trans_block(tokens) + update"), "behind the transformer"),
        (_forward(tokens="new = block.trans_block(update)"), "replaces the tokens"),
        (_forward(tokens="new = block.trans_block(tokens)"), "never hear the tap"),
        (_forward(tokens="new = tokens + update"), "transformer block is left out"),
        (
            _forward(
                tokens="update[:, 0] = 0\n    new = block.trans_block(tokens + update)",
            ),
            "the class token enters once",
        ),
        (
            _forward(tokens="new = block.trans_block((tokens + update)[:, 1:])", maps="pass"),
            "the class token is dropped",
        ),
        (
            _forward(
                tokens="tap = ConvBlock.forward(block.med_block[0], wide).tap\n"
                "    new = block.trans_block(tokens + block.down(tap, tokens))"
            ),
            "down hears the med block",
        ),
        (
            _forward(
                tokens="wide, tap = block.conv_block(block.med_block(maps))\n"
                "    new = block.trans_block(tokens + block.down(tap, tokens))",
                maps="wide = block.fusion_block(wide, block.up(new, tap)).maps",
            ),
            "before the first bottleneck",
        ),
        (
            _forward(
                tokens="tap = block.fusion_block(block.med_block(wide)).tap\n"
                "    new = block.trans_block(tokens + block.down(tap, tokens))"
            ),
            "down hears the second bottleneck",
        ),
        (
            _forward(
                maps="wide = block.med_block(block.fusion_block(wide, block.up(new, tap))[0])"
            ),
            "behind the second bottleneck",
        ),
        (
            _forward(maps="wide = block.fusion_block(wide, block.up(new, tap)).maps"),
            "the med block is left out",
        ),
        (
            _forward(maps="wide = block.fusion_block(block.med_block(wide)).maps"),
            "never hears the tokens",
        ),
        (_forward(maps="wide = block.med_block(wide)"), "the second bottleneck is left out"),
        (
            _forward(maps="wide = block.fusion_block(maps, block.up(new, tap)).maps"),
            "starts from the maps that came in",
        ),
        (_forward(maps="wide = block.fusion_block(wide, block.up(new, tap))"), "take .maps"),
        (_forward(result="new, wide"), "the tokens come first"),
        (_forward(result="wide"), "return Features(maps, tokens)"),
        ("def my_forward(block, maps, tokens):\n    return block(maps, tokens)", "its six steps"),
        (_forward(maps="wide = 2 * wide"), "the tokens are right, the maps are not"),
        (_forward(tokens="new = block.trans_block(tokens - update)"), "compare steps 2 to 4"),
    ],
    "check_maps": [
        (_maps(tap="narrow"), "before the 3x3: it leaves after"),
        (_maps(tap="raw"), "before the ReLU of the 3x3"),
        (_maps(tap="wide"), "after the last 1x1, at full width"),
        (_maps(inner=_DEAF, behind=" + extra"), "behind the 3x3 of the second"),
        (_maps(inner=_INSIDE), "before the ReLU of the first 1x1"),
        (_maps(inner=_DEAF), "the extra map is not used"),
        (_maps(skip="maps"), "the second shortcut starts at the maps"),
        (_maps("narrow", _DEAF, " + extra", "maps"), "before the 3x3"),
        (_maps("narrow", _DEAF, " + extra", "maps"), "behind the 3x3"),
        (_maps("narrow", _DEAF, " + extra", "maps"), "second shortcut"),
        (_maps(tap="0"), "given something else than a map"),
        (_maps(behind=" * 2"), "the numbers differ"),
        (
            "def my_maps(first, second, maps, reply):\n    return maps[:, :8]",
            "expected (2, 32, 6, 4)",
        ),
    ],
    "check_ablation": [
        (_ablation("pass"), "shares parameters"),
        (_ablation("block = copy.copy(block)"), "shares parameters"),
        (
            _ablation(
                'if coupling != "both":\n    block.down = NoCoupling()\n'
                "block = copy.deepcopy(block)"
            ),
            "has changed",
        ),
        (
            _ablation(
                "block = copy.deepcopy(block)\n"
                'if coupling in ("down", "none"):\n    block.down = NoCoupling()\n'
                'if coupling in ("up", "none"):\n    block.up = NoCoupling()'
            ),
            "the directions are swapped: 'down' keeps down",
        ),
        (
            _ablation(
                "block = copy.deepcopy(block)\n"
                "for name in {'down': ['up'], 'up': ['down'], 'none': ['down', 'up']}"
                ".get(coupling, []):\n"
                "    for parameter in getattr(block, name).parameters():\n"
                "        nn.init.zeros_(parameter)"
            ),
            "replace up by NoCoupling()",
        ),
        (
            _ablation(
                "block = copy.deepcopy(block)\n"
                'if coupling in ("up", "none"):\n    block.down = NoCoupling()\n'
                'if coupling == "down":\n    block.up = NoCoupling()'
            ),
            "for 'none' replace down and up",
        ),
        (
            _ablation("block = copy.deepcopy(block)\nnn.init.zeros_(block.conv_block.bn3.weight)"),
            "for 'both' the numbers differ",
        ),
        ("def my_ablation(block, coupling):\n    return None", "the result is a NoneType"),
    ],
}
