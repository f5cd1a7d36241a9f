"""What the branches see: what passes through a network, and which places speak for a class.

All functions take a `Conformer`, any variant of it, and images (B, C, H, W) as it takes them, after
its transform. They run it in eval mode and leave it as it was: modes, gradients and hooks. What
they return lies on the CPU. The letters are those of the book: B batch, C, H and W a map, N tokens
(the class token and the patches), E embedding width, h heads.

`target` means the same everywhere: the number of a class, one for each image (B,), or None for
the class that the sum of both heads ranks first. Blocks are counted from 1. With `pad=True`, maps
and grids also cover the zeros that were added at the right and at the bottom.
"""

import base64
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from html import escape
from string import Template
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from PIL import Image
from torch import Tensor, nn

from conformer_src.attention import scaled_dot_product, split_heads
from conformer_src.conformer import STEM_STRIDES, Conformer, DualLogits, _misfit, size_fits
from conformer_src.conv_block import _require_maps
from conformer_src.coupled_block import Features
from conformer_src.fcu import NoCoupling
from conformer_src.predict import _config, _evaluating, _require_block

if TYPE_CHECKING:  # matplotlib is imported where it is used, so that importing this stays quick
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class BlockRecord(NamedTuple):
    """What happened in a block; None for what it does not have."""

    maps: Tensor | None = None  # (B, C, H, W), what the CNN branch put out
    tokens: Tensor | None = None  # (B, N, E), what the transformer branch put out
    attention: Tensor | None = None  # (B, h, N, N), [b, i, n, m]: head i hands token m to token n
    down: Tensor | None = None  # (B, N, E), what crossed to the tokens, before it was added
    up: Tensor | None = None  # (B, C / 4, H', W'), what crossed to the maps, before it was added


@contextmanager
def _inspecting(model: Conformer, images: Tensor) -> Iterator[Tensor]:
    """Without autograd, and in eval mode: gives the images on the model's device, in its type."""
    config = _config(model)
    if not isinstance(images, Tensor):
        kind = type(images).__name__
        raise TypeError(f"images are of type {kind}, but must be a tensor; use the transform.")
    _require_maps(images, config.in_chans, "images")
    if not len(images):
        raise ValueError("there are no images in the batch; give at least one.")
    with _evaluating(model) as like, torch.inference_mode(False), torch.no_grad():
        yield images.to(like)


def _require_branch(model: Conformer, name: str, head: bool = True) -> None:
    """Raise a `ValueError` for a model without this branch ("conv" or "trans"), or its classes."""
    config = _config(model)
    if config.branches not in ("both", name):
        lacks, word = ("CNN", "maps") if name == "conv" else ("transformer", "attention")
        raise ValueError(
            f'this model has no {lacks} branch (branches="{config.branches}") and so no {word} to '
            "look at; choose a function for the branch that it has."
        )
    if head and not (config.num_classes and hasattr(model, "conv_head")):
        raise ValueError(
            "this model names no classes, so that there is none to explain; give a Conformer with "
            "num_classes of at least 1."
        )


def _choose(logits: DualLogits, target: Any) -> Tensor:
    """Return the number of the class to explain for each image, (B,)."""
    total = logits.sum()
    count, classes = total.shape
    if target is None:
        return total.argmax(1)
    chosen = torch.as_tensor(target, device=total.device)
    whole = not (chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool)
    fits = whole and chosen.ndim < 2 and chosen.numel() in (1, count)
    if not fits or chosen.min() < 0 or chosen.max() >= classes:
        raise ValueError(
            f"target must be a class from 0 to {classes - 1}, or one for each of the {count} "
            f"images, not {target!r}."
        )
    return chosen.long().expand(count)


def _score(logits: Tensor, chosen: Tensor) -> Tensor:
    """Add up the logits (B, classes) of the chosen classes; images do not mix in eval mode."""
    return logits.gather(1, chosen.unsqueeze(1)).sum()


def _ready(values: Tensor) -> Tensor:
    return values.detach().cpu()


@contextmanager
def watch(model: Conformer) -> Iterator[list[dict[str, Tensor]]]:
    """While it is open, note for each block what crosses ("down", "up") and the "attention".

    Attention is written out, because the fused function keeps its weights to itself. The numbers
    are the same to rounding, and a gradient flows back through the weights.
    """
    seen = [{} for _ in model.blocks]

    def note(notes: dict, name: str, part: nn.Module, inputs: tuple, output: Tensor) -> Any:
        if name != "attention":
            notes[name] = output
            return output
        parts = split_heads(part.qkv(*inputs), part.num_heads)  # each (B, h, N, E / h)
        mixed, notes[name] = scaled_dot_product(*parts)  # the weights are (B, h, N, N)
        return part.proj(rearrange(mixed, "b h n d -> b n (h d)"))

    with ExitStack() as hooks:
        for block, notes in zip(model.blocks, seen, strict=True):
            for name, part in _watched(block).items():
                hooks.enter_context(part.register_forward_hook(partial(note, notes, name)))
        yield seen


def _watched(block: nn.Module) -> dict[str, nn.Module]:
    """Return the parts of a block that exist: FCUs in either direction, and the attention."""
    parts = {
        "down": getattr(block, "down", None),
        "up": getattr(block, "up", None),
        "attention": getattr(block.trans_block, "attn", None),
    }
    return {name: part for name, part in parts.items() if not isinstance(part, NoCoupling | None)}


def record_blocks(model: Conformer, images: Tensor) -> list[BlockRecord]:
    """Return what happened in each block; `[0]` is block 1, in which nothing crosses."""
    config = _config(model)
    with _inspecting(model, images) as images, watch(model) as seen:
        outputs = model.forward_blocks(images)
    records = []
    for (maps, tokens), notes in zip(outputs, seen, strict=True):
        if config.branches != "trans":
            notes["maps"] = maps
        if config.branches != "conv":
            notes["tokens"] = tokens
        records.append(BlockRecord(**{name: _ready(part) for name, part in notes.items()}))
    return records


def token_grid(model: Conformer, images: Tensor) -> tuple[int, int]:
    """Return how many rows and columns of patches cover the images (B, C, H, W).

    Raises:
        ValueError: The model does not take images of this size.
    """
    config, sides = _config(model), images.shape[-2:]
    patch, stride = config.patch_size, STEM_STRIDES[config.stem]
    if not (config.pad or all(size_fits(side, patch, stride) for side in sides)):
        raise ValueError(_misfit(sides, patch, stride))
    rows, columns = (-(-side // patch) for side in sides)  # rounded up
    return rows, columns


def tokens_to_maps(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Lay patch tokens (B, N, E) out as they lie in the image, (B, E, rows, columns).

    Raises:
        ValueError: They are not as many as the grid has patches, beside the class token.
    """
    rows, columns = grid
    if tokens.ndim != 3 or tokens.shape[1] != 1 + rows * columns:
        raise ValueError(
            f"tokens of shape {tuple(tokens.shape)} do not fill {rows} x {columns} patches; give "
            f"(B, {1 + rows * columns}, E), the class token first."
        )
    return rearrange(tokens[:, 1:], "b (g h) e -> b e g h", g=rows)


def strength(maps: Tensor) -> Tensor:
    """Say how much happens at each place: (B, C, H, W) -> (B, H, W).

    It is the mean over the channels of the absolute values. The paper does not say how the many
    channels of its Figure 1 became one picture; this is a choice.
    """
    return maps.abs().mean(1)


def finish(model: Conformer, features: Features, after: int) -> DualLogits:
    """Run the blocks after number `after` (0: all of them) and the heads."""
    for block in model.blocks[after:]:
        features = block(*features)
    return DualLogits(model.conv_head(features.maps), model.trans_head(features.tokens))


def class_activation(model: Conformer, images: Tensor, target: Any = None) -> Tensor:
    """Return each place's share of a class's logit, (B, H, W) of the last maps (Zhou et al. 2016).

    The conv head averages over places and then weighs the channels. The other order gives the same
    number, so the shares and the head's bias sum to the logit of the conv head, exactly.

    Raises:
        ValueError: There is no CNN branch, or no such class.
    """
    _require_branch(model, "conv")
    with _inspecting(model, images) as images:
        features = model.forward_features(images)
        chosen = _choose(finish(model, features, model.config.depth), target)
        weights = model.conv_head.fc.weight[chosen]  # (B, C)
        shares = einsum(weights, features.maps, "b c, b c h w -> b h w")
    return _ready(shares / shares[0].numel())


def grad_cam(model: Conformer, images: Tensor, block: int | None = None, target=None) -> Tensor:
    """Return where the maps after a block speak for a class, (B, H, W) (Selvaraju et al. 2017).

    A channel's weight is the mean over places of the gradient of the conv head's logit. Only what
    speaks for the class is kept. The gradient takes all ways, also those through the tokens.

    Args:
        model: with a CNN branch.
        images: (B, C, H, W).
        block: 1 to depth; by default the last, where this is the positive part of
            `class_activation`.
        target: see the module.
    """
    _require_branch(model, "conv")
    after = _require_block(block, model.config.depth)
    with _inspecting(model, images) as images:
        maps, tokens = _features_after(model, images, after)
        with torch.enable_grad():
            logits = finish(model, Features(maps.requires_grad_(), tokens), after)
            score = _score(logits.conv, _choose(logits, target))
        (slopes,) = torch.autograd.grad(score, maps)  # (B, C, H, W)
    weights = slopes.mean((-2, -1))
    return _ready(einsum(weights, maps, "b c, b c h w -> b h w").relu())


def _features_after(model: Conformer, images: Tensor, after: int) -> Features:
    features = model.entry(images)
    for block in model.blocks[:after]:
        features = block(*features)
    return features


def attention_rollout(attentions: Sequence[Tensor]) -> Tensor:
    """Follow attention through blocks: entry [b, n, m] says how much of m arrives at n, (B, N, N).

    Heads are averaged; half of each residual sum counts as the token itself; each block mixes what
    the one before has mixed (Abnar and Zuidema 2020). Each row sums to 1. Nothing else is followed:
    neither the values, nor the MLPs, nor what crosses between the branches.

    Args:
        attentions: weights (B, h, N, N) of block 1, 2, and so on, at least one.
    """
    fit = [part is not None and part.ndim == 4 for part in attentions]
    if not (fit and all(fit)) or len({part.shape[::2] for part in attentions}) > 1:
        raise ValueError(
            "attention_rollout needs weights (B, h, N, N) of blocks that mix the same tokens; "
            "take them from record_blocks, of a model with a transformer branch."
        )
    arrived = torch.eye(attentions[0].shape[-1]).to(attentions[0])
    for weights in attentions:
        mixing = weights.mean(1) + torch.eye(weights.shape[-1]).to(weights)
        arrived = mixing / mixing.sum(-1, keepdim=True) @ arrived
    return arrived


def class_attention(model: Conformer, images: Tensor, block: int | None = None) -> Tensor:
    """Return how much of each patch has reached the class token, (B, rows, columns).

    This is the first row of `attention_rollout` over the blocks up to `block`, by default all. It
    does not depend on a class. The rest, up to 1, is the class token's own.

    Raises:
        ValueError: There is no transformer branch, or no such block.
    """
    _require_branch(model, "trans", head=False)
    last = _require_block(block, model.config.depth)
    attentions = [record.attention for record in record_blocks(model, images)[:last]]
    row = attention_rollout(attentions)[:, :1]  # (B, 1, N)
    return tokens_to_maps(row.mT, token_grid(model, images)).squeeze(1)


def relevance(model: Conformer, images: Tensor, target: Any = None) -> Tensor:
    """Return how far patches speak for a class of the transformer head, (B, rows, columns).

    As `attention_rollout`, but each weight is multiplied by the gradient of the class's logit and
    counts only if that is positive (Chefer, Gur and Wolf, ICCV 2021): R = R + A R.

    Raises:
        ValueError: There is no transformer branch, or no such class.
    """
    _require_branch(model, "trans")
    with _inspecting(model, images) as images, watch(model) as seen:
        maps, tokens = _features_after(model, images, 0)
        with torch.enable_grad():
            logits = finish(model, Features(maps, tokens.requires_grad_()), 0)
            score = _score(logits.trans, _choose(logits, target))
        weights = [notes["attention"] for notes in seen]
        slopes = torch.autograd.grad(score, weights)
    total = torch.eye(tokens.shape[1]).to(tokens)
    for weight, slope in zip(weights, slopes, strict=True):
        total = total + (weight * slope).relu().mean(1).detach() @ total
    return _ready(tokens_to_maps(total[:, :1].mT, token_grid(model, images)).squeeze(1))


def overlay(image: Tensor, heat: Tensor, axis: "Axes | None" = None) -> "Axes":
    """Draw heat (h, w) over an image (C, H, W): red speaks for, blue against, clear says nothing.

    The image is drawn in grey, from its darkest to its brightest value, and the heat is scaled up
    to its size. Where no heat is negative, the weakest place is clear. Returns the axis.
    """
    import matplotlib.pyplot as plt

    axis = axis or plt.gca()
    image, heat = (_ready(values).float() for values in (image, heat))
    heat = heat - heat.min().clamp(min=0)
    heat = F.interpolate(heat[None, None], image.shape[1:], mode="bilinear")[0, 0]
    heat = (heat / heat.abs().max().clamp(min=1e-12)).numpy()  # from -1 to 1
    axis.imshow(image.mean(0).numpy(), cmap="gray")
    axis.imshow(heat, cmap="coolwarm", vmin=-1, vmax=1, alpha=0.8 * abs(heat))
    axis.set_axis_off()
    return axis


def show_maps(rows: Mapping[str, Sequence[Tensor | None]], titles: Sequence[str]) -> "Figure":
    """Draw maps (H, W) in rows with names, under titles; None leaves a gap.

    Each map has its own scale, from its smallest value (dark) to its largest (bright).
    """
    import matplotlib.pyplot as plt

    if not rows or not titles or any(len(maps) != len(titles) for maps in rows.values()):
        counts = ", ".join(f"{len(maps)} maps of {name}" for name, maps in rows.items())
        raise ValueError(f"{counts or 'no maps'} under {len(titles)} titles; give a map for each.")
    shape = len(rows), len(titles)
    size = 0.4 + 1.2 * shape[1], 0.3 + 1.2 * shape[0]
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for line, (name, maps) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, fontsize=9)
        for axis, values in zip(line, maps, strict=True):
            axis.set(xticks=[], yticks=[], frame_on=False)
            if values is not None:
                axis.imshow(_ready(values).float().numpy(), cmap="viridis")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9)
    return figure


# Without scripts the slider stays hidden. Styles stand in the page, because themes may show what
# is only marked as hidden.
_SLIDER = Template("""
<div class="$name" data-label="$label">
<div>$pictures</div>
<p>$label 1 of $count: $first</p>
<label style="display:none">$label <input type="range" min="1" max="$count" value="1"
style="width:100%;max-width:30em;height:2.75em;accent-color:#2f7d4f"></label>
<p><em>This is the first of $count pictures. Where scripts run, a slider shows the others.</em></p>
</div>
<script>
for (const box of document.querySelectorAll(".$name")) {
  const pictures = box.querySelectorAll("img"), input = box.querySelector("input");
  const [caption, note] = box.querySelectorAll("p");
  const show = () => {
    pictures.forEach((picture, place) => {
      picture.style.display = place + 1 == input.value ? "block" : "none";
    });
    const words = input.value + " of " + input.max + ": " + pictures[input.value - 1].alt;
    caption.textContent = box.dataset.label + " " + words;
    input.setAttribute("aria-valuetext", words);
  };
  input.addEventListener("input", show);
  input.parentNode.style.display = "block";
  note.style.display = "none";
  show();
}
</script>
""")


def _png(figure: "Figure") -> str:
    """Draw a figure as a PNG of few colours, in base64, and close it."""
    import matplotlib.pyplot as plt

    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", facecolor="white")
    plt.close(figure)
    Image.open(drawn).convert("RGB").quantize(64).save(packed, "png", optimize=True)
    return base64.b64encode(packed.getvalue()).decode()


def _pictures(frames: Sequence["Figure"], captions: Sequence[str]) -> str:
    """Return the HTML of pictures of which the first is shown."""
    if not len(frames) or len(frames) != len(captions):
        counts = f"{len(frames)} figures and {len(captions)} captions"
        raise ValueError(f"{counts} make no slider; give at least one figure, and a caption each.")
    return "".join(
        f'<img src="data:image/png;base64,{_png(frame)}" alt="{escape(caption)}"'
        f' style="display:{"none" if place else "block"};max-width:100%;background:#fff">'
        for place, (frame, caption) in enumerate(zip(frames, captions, strict=True))
    )


class Slider:
    """Pictures behind a slider, for a notebook's output and for the web pages made of it."""

    def __init__(self, html: str, text: str) -> None:
        self.html, self.text = html, text

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def block_slider(frames: Sequence["Figure"], captions: Sequence[str], label: str) -> Slider:
    """Put figures behind a slider; it needs no network, and shows the first without scripts.

    Args:
        frames: matplotlib figures of one size; they are closed.
        captions: what each shows, for the line below and for those who do not see the figure.
        label: what the slider moves through, for example "Block".

    Raises:
        ValueError: There are no figures, or not a caption for each.
    """
    pictures = _pictures(frames, captions)
    name = "slider-" + hashlib.sha256(pictures.encode()).hexdigest()[:8]
    html = _SLIDER.substitute(
        name=name,
        label=escape(label),
        count=len(frames),
        pictures=pictures,
        first=escape(captions[0]),
    )
    return Slider(html, f"a slider over {len(frames)} figures ({label})")
