"""The Conformer: two branches, coupled block by block, with a head on each.

Build one by its name::

    model = create_model("conformer_tiny_patch16", num_classes=10)
    logits = model(images)  # DualLogits(conv, trans); logits.sum() is what the paper ranks by

The letters are those of the book: B batch, C, H and W a map, N tokens (the class token and the
patches), E embedding width. `ConformerConfig` says what each choice means.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from fnmatch import fnmatch
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from conformer_src.attention import TransformerBlock
from conformer_src.conv_block import ConvBlock, ConvBlockOutput, Stem, _require_maps, conv_norm
from conformer_src.coupled_block import ConvTransBlock, Features, FirstBlock
from conformer_src.fcu import DOWN_MODES, UP_MODES, FCUDown, FCUUp, NoCoupling
from conformer_src.hub import HubMethods

STEM_STRIDES = {"standard": 4, "small": 2}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and abs(value) < math.inf


# Names of fields, what their values must satisfy, and the same in words.
_RULES = (
    (
        ("patch_size", "in_chans", "embed_dim", "depth", "num_heads"),
        lambda value: type(value) is int and value >= 1,
        "a whole number of at least 1",
    ),
    (
        ("num_classes", "num_med_block", "pos_embed"),
        lambda value: type(value) is int and value >= 0,
        "a whole number of at least 0",
    ),
    (
        ("drop_rate", "attn_drop_rate", "drop_path_rate"),
        lambda value: _is_number(value) and 0 <= value < 1,
        "a number of at least 0 and below 1",
    ),
    (
        ("channel_ratio", "mlp_ratio"),
        lambda value: _is_number(value) and value > 0,
        "a number above 0",
    ),
    (("qkv_bias", "pad"), lambda value: type(value) is bool, "True or False"),
)
_CHOICES = {
    "stem": tuple(STEM_STRIDES),
    "fcu_down": DOWN_MODES,
    "fcu_up": UP_MODES,
    "coupling": ("both", "down", "up", "none"),
    "branches": ("both", "conv", "trans"),
}


def _require(holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(rule)


class _Checked:
    """Base of the config: refuses values that cannot work as soon as they are given."""

    def __post_init__(self) -> None:
        self._check_each()
        self._check_together()

    def _check_each(self) -> None:
        for names, fits, words in _RULES:
            for name in names:
                value = getattr(self, name)
                _require(fits(value), f"{name} must be {words}, not {value!r}.")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            rule = f"{name} must be one of {', '.join(choices)}, not {value!r}."
            _require(value in choices, rule)

    def _check_together(self) -> None:
        unit = 4 * STEM_STRIDES[self.stem]
        _require(
            self.patch_size % unit == 0,
            f"patch_size must be a multiple of {unit} with the {self.stem} stem, not "
            f"{self.patch_size}, so that a patch is a square of whole positions in each stage.",
        )
        _require(
            self.depth % 3 == 0,
            f"depth must be a multiple of 3, not {self.depth}, because each of the three stages "
            "has a third of the blocks.",
        )
        _require(
            self.embed_dim % self.num_heads == 0,
            f"embed_dim must be a multiple of num_heads, so that the heads share it evenly, but "
            f"{self.embed_dim} is no multiple of {self.num_heads}.",
        )
        _require(
            16 * self.channel_ratio % 1 == 0,
            f"channel_ratio must be a multiple of 1/16, not {self.channel_ratio!r}, because the "
            "inside of the first bottlenecks is 16 times as wide.",
        )
        _require(
            int(self.embed_dim * self.mlp_ratio) > 0,
            f"mlp_ratio {self.mlp_ratio!r} leaves the MLP no hidden unit; choose more than "
            f"1 / {self.embed_dim}.",
        )


@dataclass(frozen=True)
class ConformerConfig(_Checked):
    """What defines a Conformer. The defaults are those of `conformer_tiny_patch16`."""

    patch_size: int = 16  # pixels per side of a patch, at the input
    in_chans: int = 3  # channels of an image
    num_classes: int = 1000  # logits of each head; 0 for the features before them
    channel_ratio: float = 1  # width of the CNN branch: 64, 128, 256 times this
    num_med_block: int = 0  # further bottlenecks inside each coupled block
    embed_dim: int = 384  # width of the transformer branch
    depth: int = 12  # blocks in all; each of three stages has a third
    num_heads: int = 6  # heads of each attention
    mlp_ratio: float = 4  # hidden width of the MLPs over embed_dim
    qkv_bias: bool = True  # whether queries, keys and values have a bias
    drop_rate: float = 0.0  # dropout in attention output and MLP
    attn_drop_rate: float = 0.0  # dropout on the attention weights
    drop_path_rate: float = 0.0  # stochastic depth of the last block; 0 in the first
    pad: bool = False  # pad images that do not fit, instead of refusing them
    stem: str = "standard"  # stride 4; "small": stride 2, for small images
    pos_embed: int = 0  # side of a learnable grid of positions; 0 for none
    fcu_down: str = "average"  # how FCUDown shrinks: see `fcu.DOWN_MODES`
    fcu_up: str = "nearest"  # how FCUUp grows: see `fcu.UP_MODES`
    coupling: str = "both"  # directions that couple: both, down, up or none
    branches: str = "both"  # branches that exist: both, conv or trans


def _misfit(sides: torch.Size, patch: int, stride: int) -> str:
    """Say which image sides do not fit, and the nearest that do."""
    advice = []
    for name, side in zip(("height", "width"), sides, strict=True):
        if not size_fits(side, patch, stride):
            below = side // patch * patch
            near = [f"{n - stride + 1} to {n}" for n in (below, below + patch) if n]
            advice.append(f"{name} {side} does not fit, {' or '.join(near)} does")
    return (
        f"{'; '.join(advice)}: the stem divides a side by {stride} and rounds up, and the result "
        f"must be a multiple of {patch // stride}; resize the images, or build the model with "
        "pad=True."
    )


@contextmanager
def _statistics_stand(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm update copies of its running statistics, and put the originals back."""
    kinds = nn.BatchNorm2d | nn.SyncBatchNorm
    norms = [part for part in module.modules() if isinstance(part, kinds)]
    kept = [(norm, *named) for norm in norms for named in norm.named_buffers()]
    for norm, name, buffer in kept:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in kept:
            setattr(norm, name, buffer)


class _Undrawn(TorchFunctionMode):
    """Leave new tensors unfilled: drawing values takes most of the time, and once is enough."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        fills = getattr(func, "__module__", None) == "torch.nn.init" or func in _FILLS
        return kwargs.get("tensor", *args[:1]) if fills else func(*args, **kwargs)


_FILLS = (Tensor.normal_, Tensor.uniform_, Tensor.fill_, Tensor.zero_)


class _NoConv(nn.Module):
    """Stands where the CNN branch is left out: the maps pass, nothing is added."""

    def forward(self, maps: Tensor, extra: Tensor | None = None) -> ConvBlockOutput:
        return ConvBlockOutput(maps, maps)


class _NoTokens(nn.Module):
    """Stands where the transformer branch is left out: no tokens at all."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.new_zeros(maps.shape[0], 0, 0)


class _NoHead(nn.Module):
    """Stands for the head of a branch that is left out: no opinion."""

    def forward(self, features: Tensor) -> None:
        return None


def _leave_out(model: "Conformer") -> None:
    """Put stand-ins where the config leaves out a direction of coupling or a branch."""
    coupling, branches = model.config.coupling, model.config.branches
    alone = branches != "both"
    for block in model.blocks:
        coupled = isinstance(block, ConvTransBlock)
        if coupled and (alone or coupling in ("up", "none")):
            block.down = NoCoupling()
        if coupled and (alone or coupling in ("down", "none")):
            block.up = NoCoupling()
        if branches == "conv":
            block.trans_block = nn.Identity()
        if branches == "trans":
            block.conv_block = _NoConv()
            if coupled:
                block.fusion_block, block.med_block = _NoConv(), nn.Identity()
    if branches == "conv":
        model.entry.token_embed, model.trans_head = _NoTokens(), _NoHead()
    if branches == "trans":
        model.conv_head = _NoHead()


def _misnamed(classes: object, count: int) -> str | None:
    """Say in words why these cannot be the names of so many classes; None if they can."""
    if not isinstance(classes, list | tuple):
        return f"{type(classes).__name__}, not a list of names"
    if others := [name for name in classes if not isinstance(name, str)]:
        return f"names of type {type(others[0]).__name__}"
    return f"{len(classes)} names for {count} classes" if len(classes) != count else None


def _own_classes(model: nn.Module) -> tuple[str, ...] | None:
    """Return the names that a model has for its classes; raise a `ValueError` for what are none."""
    classes = getattr(model, "classes", None)
    if classes is None:
        return None
    wrong = _misnamed(classes, model.config.num_classes)
    _require(not wrong, f"model.classes holds {wrong}; set a tuple with one name for each class.")
    return tuple(classes)


def stage_widths(config: ConformerConfig) -> tuple[int, int, int]:
    """Return the channels of the CNN branch in its three stages."""
    return tuple(int(64 * factor * config.channel_ratio) for factor in (1, 2, 4))


def fcu_strides(config: ConformerConfig) -> tuple[int, int, int]:
    """Return how many positions of each stage's maps make a side of a patch."""
    first = config.patch_size // STEM_STRIDES[config.stem]
    return first, first // 2, first // 4


class SmallStem(nn.Module):
    """Shrink images by 2 only, for images of 28 to 96 pixels (not in the paper)."""

    def __init__(self, in_chans: int, out_chans: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_norm(in_chans, out_chans, 3, stride=2)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to maps (B, out_chans, ceil(H / 2), ceil(W / 2))."""
        _require_maps(images, self.conv1.in_channels, "images")
        return self.bn1(self.conv1(images)).relu()


class TokenEmbed(nn.Module):
    """Cut the stem's maps into patches and put the class token first (paper, section 3.1)."""

    def __init__(self, in_chans: int, embed_dim: int, stride: int, pos_embed: int = 0) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.proj = nn.Conv2d(in_chans, embed_dim, stride, stride)
        self.pos_embed = None  # the authors' network has none
        if pos_embed:
            self.pos_embed = nn.Parameter(torch.zeros(1, embed_dim, pos_embed, pos_embed))

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, C, H, W) to tokens (B, 1 + (H / stride) (W / stride), E)."""
        patches = self.proj(maps)  # (B, E, H / stride, W / stride)
        if self.pos_embed is not None:
            grid = patches.shape[-2:]  # other than the one that was learnt: resize
            patches = patches + F.interpolate(self.pos_embed, grid, mode="bicubic")
        patches = rearrange(patches, "b e g h -> b (g h) e")
        return torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)


def size_fits(size: int, patch_size: int = 16, stem_stride: int = 4) -> bool:
    """Say whether an image side gives the stem's maps a whole number of patches."""
    side = -(-size // stem_stride)  # the stem rounds up
    return side > 0 and side % (patch_size // stem_stride) == 0


def fit_maps(maps: Tensor, images: Tensor, config: ConformerConfig) -> Tensor:
    """Return the stem's maps (B, C, H, W) in a size that whole patches cover.

    With `config.pad`, zeros are added at the right and at the bottom, as OpenMMLab does.

    Raises:
        ValueError: The image does not fit, and `config.pad` is off.
    """
    patch, stride = config.patch_size, STEM_STRIDES[config.stem]
    missing = [-side % (patch // stride) for side in maps.shape[-2:]]
    if config.pad:
        return F.pad(maps, (0, missing[1], 0, missing[0]))
    if any(missing):
        raise ValueError(_misfit(images.shape[-2:], patch, stride))
    return maps


class Entry(nn.Module):
    """What comes before block 1: the stem, whose maps both branches start from, and the tokens."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.config, patch = config, fcu_strides(config)[0]
        chans = 64 if config.stem == "standard" else stage_widths(config)[0]
        self.stem = (Stem if config.stem == "standard" else SmallStem)(config.in_chans, chans)
        self.token_embed = TokenEmbed(chans, config.embed_dim, patch, config.pos_embed)

    def forward(self, images: Tensor) -> Features:
        """Map images (B, in_chans, H, W) to maps (B, C, H / 4, W / 4) and tokens (B, N, E)."""
        maps = fit_maps(self.stem(images), images, self.config)
        return Features(maps, self.token_embed(maps))


def build_block(config: ConformerConfig, number: int) -> FirstBlock | ConvTransBlock:
    """Return block `number`, counted from 1: each stage begins with a stride, the last ends in one.

    The rate of stochastic depth grows with the number (Huang et al. 2016); the CNN branch has none.
    """
    stage, place = divmod(number - 1, config.depth // 3)
    widths, stride = stage_widths(config), fcu_strides(config)[stage]
    width, embed_dim = widths[stage], config.embed_dim
    rate = config.drop_path_rate * (number - 1) / (config.depth - 1)
    dropout = config.drop_rate, config.attn_drop_rate, rate
    heads = config.num_heads
    trans_block = TransformerBlock(embed_dim, heads, config.mlp_ratio, config.qkv_bias, *dropout)
    if number == 1:
        chans = 64 if config.stem == "standard" else width
        return FirstBlock(ConvBlock(chans, width, project_shortcut=True), trans_block)
    begins, ends = stage > 0 and place == 0, number == config.depth
    return ConvTransBlock(
        ConvBlock(widths[stage - begins], width, 1 + begins, project_shortcut=begins),
        FCUDown(width // 4, embed_dim, stride, config.fcu_down),
        trans_block,
        FCUUp(embed_dim, width // 4, stride, config.fcu_up),
        ConvBlock(width, width, 1 + ends, project_shortcut=ends),
        config.num_med_block,
    )


def run_block(block: nn.Module, features: Features, checkpointing: bool) -> Features:
    """Run a block; with checkpointing, keep only what enters it and compute the rest again.

    The second run must not count the same batch twice in the averages of BatchNorm.
    """
    if not checkpointing or not torch.is_grad_enabled():
        return block(*features)
    if torch.compiler.is_compiling():  # the compiler repeats no update of an average
        return checkpoint(block, *features, use_reentrant=False)
    contexts = lambda: (nullcontext(), _statistics_stand(block))  # noqa: E731
    return checkpoint(block, *features, use_reentrant=False, context_fn=contexts)


class ConformerBackbone(nn.Module):
    """Everything before the heads. Set `checkpointing = True` to train in less memory."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.config, self.checkpointing = config, False
        self.entry = Entry(config)
        self.blocks = nn.ModuleList(build_block(config, n) for n in range(1, config.depth + 1))

    def forward_features(self, images: Tensor) -> Features:
        """Map images (B, in_chans, H, W) to maps (B, C, H / 32, W / 32) and tokens (B, N, E)."""
        features = self.entry(images)
        for block in self.blocks:
            features = run_block(block, features, self.checkpointing)
        return features

    def forward_blocks(self, images: Tensor) -> list[Features]:
        """Return the features after each block; `[0]` are those of block 1."""
        outputs = [self.entry(images)]
        for block in self.blocks:
            outputs.append(run_block(block, outputs[-1], self.checkpointing))
        return outputs[1:]


class DualLogits(NamedTuple):
    """The opinions of the two heads, each (B, classes); None where a branch is left out."""

    conv: Tensor | None
    trans: Tensor | None

    def sum(self) -> Tensor:
        """Return the sum, (B, classes): what the paper ranks by (section 3.1)."""
        return torch.stack([logits for logits in self if logits is not None]).sum(0)


class ConvHead(nn.Module):
    """Average the maps over all places, then classify (Conformer paper, section 3.1)."""

    def __init__(self, in_chans: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(in_chans, num_classes) if num_classes else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, C, H, W) to logits (B, num_classes), or to the average (B, C)."""
        return self.fc(maps.mean((-2, -1)))


class TransHead(nn.Module):
    """Normalise the class token, then classify it (Conformer paper, section 3.1)."""

    def __init__(self, embed_dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(embed_dim)  # eps 1e-5 here, other than in the blocks
        self.fc = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, N, E) to logits (B, num_classes), or to the class token (B, E)."""
        return self.fc(self.norm(tokens[:, 0]))  # the other tokens are not read any more


@torch.no_grad()
def init_weights(module: nn.Module) -> None:
    """Start the parameters and buffers that a module itself holds, as the authors do."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):  # He et al. (2015), fan-out
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
        module.reset_parameters()  # scale 1, shift 0, running statistics 0 and 1
    elif isinstance(module, TokenEmbed):
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Conv2d) and module.bias is not None:
        bound = module.weight[0].numel() ** -0.5  # torch's own choice
        nn.init.uniform_(module.bias, -bound, bound)


class Conformer(ConformerBackbone, HubMethods):
    """The dual-head network (Peng et al. 2021)."""

    def __init__(self, config: ConformerConfig) -> None:
        with _Undrawn():  # every value is drawn once, by init_weights
            super().__init__(config)
            self.conv_head = ConvHead(stage_widths(config)[2], config.num_classes)
            self.trans_head = TransHead(config.embed_dim, config.num_classes)
            _leave_out(self)
        self.apply(init_weights)

    def forward(self, images: Tensor) -> DualLogits:
        """Map images (B, in_chans, H, W) to the logits of both heads, each (B, num_classes)."""
        maps, tokens = self.forward_features(images)
        return DualLogits(self.conv_head(maps), self.trans_head(tokens))

    def forward_pyramid(self, images: Tensor) -> list[Features]:
        """Return the features whose maps are 4, 8, 16 and 32 times smaller than the images."""
        stage = self.config.depth // 3
        _require(stage > 1, "with depth 3 the last block shrinks twice; choose 6 or more.")
        outputs = self.forward_blocks(images)
        return [outputs[n] for n in (stage - 1, 2 * stage - 1, -2, -1)]


VARIANTS = {
    "conformer_tiny_patch16": ConformerConfig(),
    "conformer_small_patch16": ConformerConfig(channel_ratio=4),
    "conformer_small_patch32": ConformerConfig(patch_size=32, channel_ratio=4),
    "conformer_base_patch16": ConformerConfig(channel_ratio=6, embed_dim=576, num_heads=9),
    "conformer_micro": ConformerConfig(
        patch_size=8,
        num_classes=10,
        channel_ratio=0.5,
        embed_dim=64,
        depth=6,
        num_heads=4,
        pad=True,
        stem="small",
    ),
}


class ModelCard(NamedTuple):
    """What is known about a variant, with the classes and channels of its config."""

    image_size: int  # side of the square image for which macs and top1 hold
    parameters: int
    macs: int  # multiply-accumulates for one image, in the authors' order of operations
    top1: float | None = None  # percent on ImageNet-1k; None: nobody published one
    source: str = "none"  # of top1


CARDS = {
    "conformer_tiny_patch16": ModelCard(224, 23_524_704, 5_225_936_896, 81.3, "the paper"),
    "conformer_small_patch16": ModelCard(224, 37_673_424, 10_599_350_272, 83.4, "the paper"),
    "conformer_small_patch32": ModelCard(224, 38_853_072, 7_045_835_776, 81.96, "OpenMMLab"),
    "conformer_base_patch16": ModelCard(224, 83_289_136, 23_325_745_152, 84.1, "the paper"),
    "conformer_micro": ModelCard(32, 469_068, 10_041_984),
}


def list_models(pattern: str = "*") -> list[str]:
    """Return the names of the variants that match, sorted; `*` and `?` are wildcards."""
    return sorted(name for name in VARIANTS if fnmatch(name, pattern))


def _require_variant(name: str) -> None:
    """Raise a `ValueError` for a name that is no variant's."""
    if name not in VARIANTS:
        close = get_close_matches(str(name), VARIANTS, 1) or list_models()
        raise ValueError(f"there is no model {name!r}; choose {', '.join(close)}.")


def _require_fields(names: Iterable[str]) -> None:
    """Raise a `ValueError` for a name that is no field of the config."""
    known = [field.name for field in fields(ConformerConfig)]
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, 1) or known
            raise ValueError(f"ConformerConfig has no field {name!r}; choose {', '.join(close)}.")


def model_card(name: str) -> ModelCard:
    """Return what is known about a variant, for example its parameters.

    Raises:
        ValueError: There is no such variant.
    """
    _require_variant(name)
    return CARDS[name]


def create_model(name: str, **changes: object) -> Conformer:
    """Build a variant with fresh weights; changes replace fields of its config by name.

    Raises:
        ValueError: There is no such variant or field, or a value cannot work.
    """
    _require_variant(name)
    _require_fields(changes)
    return Conformer(replace(VARIANTS[name], **changes))
