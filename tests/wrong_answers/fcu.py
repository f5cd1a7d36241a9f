"""Wrong answers to the exercises of chapter 4, each with words that its verdict must contain."""

_RIGHT = [(64, 56, 8, 50, 50496), (128, 28, 4, 50, 99840), (256, 14, 2, 50, 198528)]


def _predict(column, *values):
    stages = [list(stage) for stage in _RIGHT]
    for stage, value in zip(stages, values, strict=False):
        stage[column] = value
    return f"def my_prediction():\n    return {[tuple(stage) for stage in stages]}\n"


_DOWN = """
class MyFCUDown(nn.Module):
    def __init__(self, in_chans, embed_dim, stride):
        super().__init__()
        self.stride = stride
        self.conv_project = {conv}
        self.ln = {norm}

    def forward(self, maps, tokens):
        patches = {patches}
        rows = patches.flatten(2).mT
        rows = {rows}
        return {result}
"""


def _down(
    conv="nn.Conv2d(in_chans, embed_dim, 1)",
    norm="nn.LayerNorm(embed_dim, eps=1e-6)",
    patches="F.avg_pool2d(self.conv_project(maps), self.stride)",
    rows="F.gelu(self.ln(rows))",
    result="torch.cat([tokens[:, :1], rows], dim=1)",
):
    return _DOWN.format(conv=conv, norm=norm, patches=patches, rows=rows, result=result)


_UP = """
def my_up(tokens, maps, conv, bn, stride):
    rows = maps.shape[-2] // stride
    patches = rearrange({tokens}, "{layout} -> b e g h", g=rows)
    patches = {patches}
    return {result}
"""


def _up(
    tokens="tokens[:, 1:]",
    layout="b (g h) e",
    patches="bn(conv(patches)).relu()",
    result="F.interpolate(patches, scale_factor=stride)",
):
    return _UP.format(tokens=tokens, layout=layout, patches=patches, result=result)


WRONG = {
    "check_prediction": [
        (_predict(0, 256, 512, 1024), "blocks 2-4: 256 is the width of the stage"),
        (_predict(0, 64, 512), "blocks 5-8: 512 is the width of the stage"),
        (_predict(0, 16), "expected a quarter of 256"),
        (_predict(1, 28), "expected 56"),
        (_predict(2, 4, 2, 1), "belongs to patch 16"),
        (_predict(2, 32), "do not make 56"),
        (_predict(3, 49, 49, 49), "class token is missing"),
        (_predict(3, 197, 197, 197), "197 tokens belong to patch 16"),
        (_predict(3, 51), "expected 1 + (224 / 32)^2"),
        (_predict(4, 49152), "biases and norms are missing"),
        (_predict(4, 49600), "scales and shifts of both norms"),
        (_predict(4, 50048), "biases of both projections"),
        (_predict(4, 25728), "way down only"),
        (_predict(4, 24768), "way up only"),
        (_predict(4, 1), "expected (q E + 3 E) + (q E + 3 q)"),
        ("def my_prediction():\n    return 64, 56, 8", "return three stages"),
    ],
    "check_down": [
        (
            _down(norm="nn.BatchNorm2d(embed_dim, eps=1e-6)", rows="F.gelu(rows)"),
            "a BatchNorm goes down",
        ),
        (_down().replace("self.ln", "self.norm"), "no layer named ln"),
        (_down(conv="nn.Conv2d(in_chans, embed_dim, 1, bias=False)"), "projection needs a bias"),
        (
            _down(norm="nn.LayerNorm(embed_dim, eps=1e-6, elementwise_affine=False)"),
            "a LayerNorm with a scale and a shift",
        ),
        (_down(norm="nn.LayerNorm(embed_dim, eps=1e-6, bias=False)"), "80 parameters; expected 90"),
        (
            _down(conv="nn.Conv2d(in_chans, embed_dim, 3, padding=1)"),
            "a 1x1 convolution with bias",
        ),
        (_down(norm="nn.LayerNorm(embed_dim)"), "eps 1e-05"),
        (_down(result="rows"), "row of the class token is missing"),
        (
            _down(result="torch.cat([rows.mean(1, keepdim=True), rows], dim=1)"),
            "averaged in with the patches",
        ),
        (
            _down(result="torch.cat([tokens.mean(1, keepdim=True), rows], dim=1)"),
            "averaged in with the patches",
        ),
        (
            _down(
                result="torch.cat([(tokens[:, :1] + rows.sum(1, keepdim=True)) / tokens.shape[1], "
                "rows], dim=1)"
            ),
            "averaged in with the patches",
        ),
        (_down(result="torch.cat([0 * tokens[:, :1], rows], dim=1)"), "class token is zero"),
        (_down(result="torch.cat([2 * tokens[:, :1], rows], dim=1)"), "added already"),
        (_down(result="tokens + torch.cat([tokens[:, :1], rows], dim=1)"), "added already"),
        (_down(result="torch.cat([rows, tokens[:, :1]], dim=1)"), "comes last"),
        (
            _down(result="torch.cat([F.gelu(self.ln(tokens[:, :1])), rows], dim=1)"),
            "row 0 is not the class token",
        ),
        (_down(rows="self.ln(rows)"), "GELU after the norm is missing"),
        (_down(rows="self.ln(rows).relu()"), "a ReLU stands where the GELU belongs"),
        (_down(rows="self.ln(F.gelu(rows))"), "GELU comes before the norm"),
        (_down(rows='F.gelu(self.ln(rows), approximate="tanh")'), "tanh approximation"),
        (_down(rows="F.gelu(rows)"), "not used"),
        (
            _down(patches="F.avg_pool2d(self.conv_project(maps), self.stride).mT"),
            "H and W are swapped",
        ),
        (
            _down().replace("patches.flatten(2).mT", "patches.reshape(len(maps), -1, 10)"),
            "channels and positions are mixed up",
        ),
        (
            _down(
                patches="self.ln(self.conv_project(maps).movedim(1, -1)).movedim(-1, 1)",
                rows="F.gelu(F.avg_pool2d(patches, self.stride).flatten(2).mT)",
            ),
            "LayerNorm comes before the pooling",
        ),
        (
            _down(patches="F.max_pool2d(self.conv_project(maps), self.stride)"),
            "by its maximum",
        ),
        (
            _down(patches="self.conv_project(F.max_pool2d(maps, self.stride))"),
            "by its maximum",
        ),
        (
            _down(patches="F.interpolate(self.conv_project(maps), scale_factor=1 / self.stride)"),
            "nearest reads one position",
        ),
        (
            _down(
                patches="F.interpolate(self.conv_project(maps), scale_factor=1 / self.stride, "
                'mode="bilinear")'
            ),
            "bilinear reads the four positions",
        ),
        (_down(rows="-F.gelu(self.ln(rows))"), "the numbers differ"),
        (_down(result="rows.mT"), "expected (2, 7, 10)"),
        (_down(result="(rows, tokens)"), "returns a tuple"),
        (_down(patches="maps.mul_(2)[:, :1]"), "stopped with"),
        (_down(patches="F.avg_pool2d(self.conv_project(maps.mul_(2)), self.stride)"), "changed"),
        ("def MyFCUDown(*sizes):\n    return 3", "no nn.Module"),
    ],
    "check_up": [
        (_up(tokens="tokens[:, :-1]"), "the last token is left out"),
        (_up(tokens="(tokens[:, 1:] + tokens[:, :1]) / 2"), "averaged in with the patches"),
        (_up(layout="b (h g) e"), "H and W are swapped"),
        (
            _up().replace(
                'rearrange(tokens[:, 1:], "b (g h) e -> b e g h", g=rows)',
                "tokens[:, 1:].reshape(len(tokens), 10, rows, -1)",
            ),
            "channels and positions are mixed up",
        ),
        (_up(patches="bn(conv(patches))"), "the ReLU is missing"),
        (_up(patches="bn(conv(patches).relu())"), "ReLU comes before the norm"),
        (_up(patches="F.gelu(bn(conv(patches)))"), "a GELU stands where the ReLU belongs"),
        (_up(patches="conv(patches).relu()"), "the BatchNorm is not used"),
        (
            _up(result='F.interpolate(patches, scale_factor=stride, mode="bilinear")'),
            "up-sampled bilinearly",
        ),
        (
            _up(result='F.interpolate(patches, scale_factor=stride, mode="bicubic")'),
            "up-sampled by mode bicubic",
        ),
        (
            _up(tokens="tokens[:, :-1]", layout="b (h g) e", patches="bn(conv(patches).relu())"),
            "left out, not the first: the class token is row 0; the patches are laid out column",
        ),
        (_up(result="patches"), "one position for each token"),
        (_up(result="F.interpolate(patches, scale_factor=stride).mT"), "H and W are swapped"),
        (_up(patches="bn(conv(patches)).abs()"), "the numbers differ"),
        (_up(tokens="tokens"), "stopped with"),
        ("def my_up(*all):\n    return None", "a NoneType is returned"),
    ],
}
