"""Wrong answers to the exercises of chapter 2, each with words that its verdict must contain."""

_FORWARD = """
def my_forward(block, maps, extra):
    extra = 0 if extra is None else extra
    inner = {inner}
    bare = block.bn2(block.conv2(inner))
    tap = {tap}
    shortcut = {shortcut}
    change = block.bn3(block.conv3({into}))
    return {result}
"""


def _forward(
    inner="block.bn1(block.conv1(maps)).relu() + extra",
    tap="bare.relu()",
    into="bare.relu()",
    shortcut="block.residual_bn(block.residual_conv(maps))",
    result="(change + shortcut).relu(), tap",
):
    return _FORWARD.format(inner=inner, tap=tap, into=into, shortcut=shortcut, result=result)


_BLOCK = """
class MyConvBlock(nn.Module):
    def __init__(self, in_chans, out_chans, stride):
        super().__init__()
        inner = {inner}
        self.conv1 = nn.Conv2d(in_chans, inner, 1, {stride1}, bias={bias1})
        self.bn1 = nn.BatchNorm2d(inner, eps={eps})
        self.conv2 = nn.Conv2d(inner, inner, 3, {stride2}, padding={padding}, bias=False)
        self.bn2 = nn.BatchNorm2d(inner, eps=1e-6)
        self.conv3 = nn.Conv2d(inner, out_chans, 1, {stride3}, bias=False)
        self.bn3 = nn.BatchNorm2d(out_chans, eps=1e-6)
        self.residual_conv = nn.Conv2d(in_chans, out_chans, 1, {stride4}, bias=False)
        self.residual_bn = {norm}

    def forward(self, maps):
        inner = self.bn1(self.conv1(maps)).relu()
        tap = self.bn2(self.conv2(inner)){relu}
        shortcut = self.residual_bn(self.residual_conv(maps))
        return (self.bn3(self.conv3(tap.relu())) + shortcut){last}, tap
"""


def _block(**changes):
    parts = {
        "inner": "out_chans // 4",
        **{"stride1": 1, "stride2": "stride", "stride3": 1, "stride4": "stride"},
        **{"bias1": False, "eps": 1e-6, "padding": 1, "relu": ".relu()", "last": ".relu()"},
        "norm": "nn.BatchNorm2d(out_chans, eps=1e-6)",
    }
    return _BLOCK.format(**(parts | changes))


_FOLD = """
def my_fold(conv, norm):
    scale = {scale}
    shift = {shift}
    sizes = conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding
    folded = nn.Conv2d(*sizes, bias=True)
    with torch.no_grad():
        folded.weight.copy_(conv.weight * scale{axis})
        folded.bias.copy_({bias})
    return folded
"""


def _fold(
    scale="norm.weight / torch.sqrt(norm.running_var + norm.eps)",
    shift="0 if conv.bias is None else conv.bias",
    axis="[:, None, None, None]",
    bias="(shift - norm.running_mean) * scale + norm.bias",
):
    return _FOLD.format(scale=scale, shift=shift, axis=axis, bias=bias)


def _predict(maps=(1024, 14, 14), tap=(256, 14, 14), parameters=1512448, macs=372506624):
    return f"def my_prediction():\n    return {maps}, {tap}, {parameters}, {macs}\n"


_Q, _ALL = 256, 1512448
_FIRST, _SECOND, _THIRD, _PROJECT = 512 * _Q, 9 * _Q**2, _Q * 1024, 512 * 1024

WRONG = {
    "check_prediction": [
        (_predict(maps=(1024, 28, 28)), "halves 28"),
        (_predict(tap=(256, 28, 28)), "after the 3x3, which holds the stride"),
        (_predict(tap=(128, 14, 14)), "a quarter of what goes out"),
        (_predict(tap=(1024, 14, 14)), "where the block is narrow"),
        (_predict(maps=(512, 14, 14)), "expected (1024, 14, 14)"),
        (_predict(maps=1024), "a tuple of three numbers"),
        (_predict(parameters=_ALL - _PROJECT - 2048), "projected shortcut is missing"),
        (_predict(parameters=_ALL - 2048), "BatchNorm of the shortcut"),
        (_predict(parameters=_ALL - 5120), "scales and shifts"),
        (_predict(parameters=_ALL - 3072), "only the shortcut's BatchNorm"),
        (_predict(parameters=_ALL - 8 * _Q**2), "nine weights"),
        (_predict(parameters=_ALL + 2560), "no bias"),
        (_predict(parameters=_ALL + 5120), "its averages are buffers"),
        (_predict(parameters=7), "expected 1,512,448"),
        (_predict(macs=196 * (_FIRST + _SECOND + _THIRD + _PROJECT)), "works on the map of 28"),
        (
            _predict(macs=784 * (_FIRST + _SECOND) + 196 * (_THIRD + _PROJECT)),
            "already in the 3x3",
        ),
        (_predict(macs=784 * (_FIRST + _SECOND + _THIRD + _PROJECT)), "the map is 14 wide"),
        (_predict(macs=784 * _FIRST + 196 * (_SECOND + _THIRD)), "shortcut is missing"),
        (_predict(macs=2 * 372506624), "count as one"),
        (_predict(macs=1), "expected 372,506,624"),
        ("def my_prediction():\n    return 1512448", "return four things"),
    ],
    "check_forward": [
        (_forward(tap="bare"), "before the ReLU"),
        (_forward(tap="inner"), "after the 1x1"),
        (
            _forward(
                inner="block.bn1(block.conv1(maps)).relu()", tap="bare.relu() + extra"
            ).replace("(bare.relu()))", "(tap))"),
            "after the 3x3",
        ),
        (_forward(inner="(block.bn1(block.conv1(maps)) + extra).relu()"), "before the ReLU of"),
        (_forward(inner="block.bn1(block.conv1(maps)).relu()"), "not used"),
        (_forward(inner="block.bn1(block.conv1(maps)) + extra"), "no ReLU between bn1"),
        (_forward(shortcut="maps"), "not projected"),
        (_forward(shortcut="block.residual_conv(maps)"), "no BatchNorm"),
        (_forward(shortcut="0"), "the shortcut is not added"),
        (_forward(result="change + shortcut, tap"), "no ReLU after the addition"),
        (_forward(result="change.relu() + shortcut, tap"), "comes before the addition"),
        (_forward(result="(change.relu() + shortcut).relu(), tap"), "free to be negative"),
        (_forward(tap="bare", shortcut="maps"), "before the ReLU; the shortcut is not projected"),
        (_forward(into="bare"), "the tap is right, the maps are not"),
        (_forward(result="tap, (change + shortcut).relu()"), "swapped"),
        (_forward(result="(change + shortcut).relu()"), "return two tensors"),
        (_forward().replace("0 if extra is None else extra", "extra + 0"), "TypeError"),
        (
            "def my_forward(block, maps, extra):\n"
            "    result = block(maps, extra)\n    maps += 1\n    return result",
            "were changed",
        ),
    ],
    "check_block": [
        (_block(stride1="stride", stride2=1), "sits in conv1"),
        (_block(stride2=1, stride3="stride"), "sits in conv3"),
        (_block(stride2=1, stride4=1), "nothing in the main path"),
        (_block(stride4=1), "the shortcut must have the stride too"),
        (_block(bias1=True), "conv1: a bias before a BatchNorm"),
        (_block(norm="nn.Identity()"), "has no BatchNorm"),
        (_block(eps=1e-5), "bn1 has eps 1e-05"),
        (_block(inner="in_chans // 4"), "conv1 has 2 channels"),
        (_block(padding=0), "padding 1"),
        (_block(relu=""), "the tap is taken before the ReLU"),
        (_block(last=""), "the tap is right, the maps are not"),
        (_block(last=".relu()[:, :8]"), "the first result"),
        (
            _block().replace("conv3", "expand"),
            "missing: conv3",
        ),
        ("def MyConvBlock(in_chans, out_chans, stride):\n    return 1", "must be an nn.Module"),
    ],
    "check_fold": [
        (_fold(bias="shift * scale + norm.bias"), "running mean is not subtracted"),
        (_fold(scale="norm.weight / torch.sqrt(norm.running_var)"), "eps is missing"),
        (_fold(scale="norm.weight / (norm.running_var + norm.eps)"), "its root"),
        (_fold(scale="1 / torch.sqrt(norm.running_var + norm.eps)"), "gamma"),
        (_fold(bias="(shift - norm.running_mean) * scale"), "beta"),
        (_fold(bias="shift - norm.running_mean + norm.bias"), "divided by the deviation too"),
        (_fold(axis="[:, None, None]"), "axis 0"),
        (_fold(shift="0"), "already has is lost"),
        (_fold().replace("bias=True", "bias=False"), "AttributeError"),
        (_fold().replace(", conv.stride, conv.padding", ""), "stride or padding"),
        (_fold().replace("conv.weight * ", "conv.weight.mul_(2) * "), "were changed"),
        (_fold(bias="norm.bias + 1"), "the numbers differ"),
        ("def my_fold(conv, norm):\n    return conv", "needs bias=True"),
        ("def my_fold(conv, norm):\n    return nn.Sequential(conv, norm)", "one nn.Conv2d"),
    ],
}
