"""Recipes: everything that decides how a training run goes, in one small checked file."""

from dataclasses import dataclass, field
from typing import Any


def _about(default: Any, group: str, about: str, **more: Any) -> Any:
    kind = {"default_factory": default} if callable(default) else {"default": default}
    return field(**kind, metadata={"group": group, "about": about, **more})


@dataclass(frozen=True)
class Recipe:
    """The fields of a recipe; `conformer train --help` explains each."""

    model: str = _about("conformer_micro", "model", "a name of `conformer list`")
    model_options: dict = _about(dict, "model", "fields of the model's config to replace")
    weights: str = _about("", "model", "start from a file, an address, or `published`")
    freeze: str = _about("none", "model", "what is not trained: none, conv, trans, backbone")
    freeze_norm: bool = _about(False, "model", "keep the statistics of all BatchNorms")

    data: str = _about("fashion-subset", "data", "fashion-subset, fashion, or a folder")
    in_chans: int = _about(3, "data", "channels of an image: 1 grey, 3 RGB")
    image_size: int = _about(224, "data", "side of the square images, in pixels")
    validation: float = _about(0.1, "data", "share of the training images held out")
    corrupt: str = _about("refuse", "data", "unreadable images: refuse or skip")

    crop_scale: float = _about(1.0, "augmentation", "least share of the area in a random crop")
    flip: bool = _about(True, "augmentation", "mirror half of the images")
    rand_augment: int = _about(0, "augmentation", "magnitude of RandAugment, 0 to 30")
    color_jitter: float = _about(0.0, "augmentation", "strength of colour jitter")
    erasing: float = _about(0.0, "augmentation", "probability of erasing a rectangle")
    mixup: float = _about(0.0, "augmentation", "alpha of mixup")
    cutmix: float = _about(0.0, "augmentation", "alpha of CutMix")
    repeats: int = _about(1, "augmentation", "draws of an image in a row (repeated augmentation)")

    reduction: str = _about("mean", "loss", "how the losses of both heads become one: mean, sum")
    conv_weight: float = _about(1.0, "loss", "weight of the CNN head's loss")
    trans_weight: float = _about(1.0, "loss", "weight of the transformer head's loss")
    label_smoothing: float = _about(0.1, "loss", "share of the label given to all classes")

    epochs: int = _about(5, "optimizer", "how often each image is seen")
    batch_size: int = _about(64, "optimizer", "images of a step, in all processes together")
    lr: float = _about(1e-3, "optimizer", "highest learning rate")
    warmup_epochs: float = _about(0.5, "optimizer", "epochs in which the rate rises")
    warmup_lr: float = _about(1e-6, "optimizer", "learning rate of the first step")
    min_lr: float = _about(1e-5, "optimizer", "learning rate of the last step")
    weight_decay: float = _about(0.05, "optimizer", "of AdamW; not for biases and scales")
    clip_grad: float = _about(0.0, "optimizer", "largest norm of the gradient; 0: any")
    ema: float = _about(0.0, "optimizer", "decay of the moving average of the weights; 0: none")

    precision: str = _about("fp32", "machine", "fp32, bf16 or fp16")
    accumulate: int = _about(1, "machine", "parts of a batch that are computed one by one")
    workers: int = _about(1, "machine", "processes that read images, for each that trains")
    channels_last: bool = _about(True, "machine", "store maps with the channels last")
    compile: bool = _about(False, "machine", "compile the model")
    checkpointing: bool = _about(False, "machine", "compute features twice to save memory")
    sync_norm: bool = _about(False, "machine", "BatchNorm over all processes")
    fsdp: bool = _about(False, "machine", "share parameters out among processes (FSDP)")

    seed: int = _about(0, "run", "decides all random numbers")
    save_steps: int = _about(0, "run", "steps between checkpoints; 0: after each epoch only")
    keep: int = _about(2, "run", "checkpoints that are kept")
    tensorboard: bool = _about(False, "run", "write a log for TensorBoard as well")
