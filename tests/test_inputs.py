"""How an image is made ready: one transform for evaluation and prediction, checked values."""

import copy
import pickle
from dataclasses import asdict

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from conformer_src.conformer import ConformerConfig
from conformer_src.data import (
    FASHION_MEAN,
    FASHION_STD,
    FashionSubset,
    fashion_transform,
    photo_transform,
)
from conformer_src.inputs import (
    InputConfig,
    input_transform,
    misfit_of_input,
    own_input,
    usual_crop,
)

FASHION = InputConfig(32, FASHION_MEAN, FASHION_STD, crop=1.0, pad=2)


def noise(width, height, channels=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (channels, height, width), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("sides", [(300, 200), (40, 97)])
def test_the_defaults_are_those_of_chapter_1(size, sides):
    image = TF.to_pil_image(noise(*sides))
    ours = input_transform(InputConfig(size))(image)
    assert torch.equal(ours, photo_transform(train=False, size=size)(image))


def test_padded_images_are_those_of_fashion_mnist():
    for image in FashionSubset(train=False).images[:20]:
        expected = fashion_transform(train=False)(image)
        assert torch.equal(input_transform(FASHION)(image), expected)
        assert torch.equal(input_transform(FASHION)(TF.to_pil_image(image)), expected)


@pytest.mark.parametrize("sides", [(28, 28), (56, 84), (300, 5), (1, 1)])
def test_other_sides_are_resized_into_the_padding(sides):
    shown = input_transform(FASHION)(noise(*sides, channels=1)) * FASHION_STD[0] + FASHION_MEAN[0]
    assert shown.shape == (1, 32, 32)
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:30, 2:30] = False
    assert shown[0, border].abs().max() < 1e-6
    assert shown[0, ~border].abs().max() > 0.01


@pytest.mark.parametrize(("crop", "kept"), [(1.0, 100), (0.8, 80), (0.5, 50)])
def test_the_share_in_the_middle_is_kept(crop, kept):
    image = torch.arange(100, dtype=torch.uint8).expand(1, 100, 100)  # its own columns
    config = InputConfig(50, (0.0,), (1.0,), crop=crop)
    shown = input_transform(config)(image)[0, 25] * 255
    step = kept / 50
    columns = (100 - kept) / 2 + step * (torch.arange(50) + 0.5) - 0.5
    assert (shown - columns)[3:-3].abs().max() < 1.01


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_any_number_of_channels(channels):
    config = InputConfig(48, [0.5] * channels, [0.25] * channels)
    assert input_transform(config)(noise(60, 70, channels)).shape == (channels, 48, 48)


def test_files_of_any_mode_get_the_channels():
    grey = InputConfig(32, (0.449,), (0.226,))
    for mode in ("L", "RGB", "RGBA", "CMYK", "P"):
        image = Image.new("RGB", (40, 50), (200, 200, 200)).convert(mode)
        assert input_transform(InputConfig(32))(image).shape == (3, 32, 32)
        if mode in ("L", "RGB"):
            assert torch.allclose(
                input_transform(grey)(image), torch.tensor((200 / 255 - 0.449) / 0.226)
            )


@pytest.mark.parametrize(("size", "crop"), [(32, 1.0), (127, 1.0), (128, 0.875), (224, 0.875)])
def test_small_images_have_no_margin_to_spare(size, crop):
    assert usual_crop(size) == crop


def test_it_is_a_value():
    config = InputConfig(64, [0, 1, 0], (1, 2, 3), crop=1)
    assert config == InputConfig(64, (0.0, 1.0, 0.0), [1.0, 2.0, 3.0], crop=1.0)
    assert hash(config) == hash(InputConfig(**asdict(config)))
    assert config == copy.deepcopy(config) == pickle.loads(pickle.dumps(config))
    assert config != InputConfig(64)
    with pytest.raises(AttributeError):
        config.pad = 2


HUGE = 10**400  # no float holds it


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_size": 0}, "^image_size must be a whole number of at least 1, not 0"),
        ({"image_size": 32.0}, "^image_size must be a whole number"),
        ({"image_size": True}, "^image_size must be a whole number"),
        ({"image_size": "32"}, "^image_size must be a whole number .*, not '32'"),
        ({"image_size": 20_000}, "^image_size / crop must be at most 10,000 pixels"),
        ({"image_size": HUGE}, "^image_size / crop must be at most 10,000 pixels, not 10000"),
        ({"crop": 0}, "^crop must be a number above 0 and at most 1, not 0"),
        ({"crop": 1.1}, "^crop must be"),
        ({"crop": float("nan")}, "^crop must be"),
        ({"crop": None}, "^crop must be"),
        ({"crop": 0.001}, "^image_size / crop must be at most"),
        ({"pad": -1}, "^pad must be a whole number of at least 0, not -1"),
        ({"pad": 112}, "^pad must leave room for the image, but twice 112 pixels fill the 224"),
        ({"pad": HUGE}, "^pad must leave room"),
        ({"mean": 0.5}, "^mean must hold a number from -1e"),
        ({"mean": "abc"}, "^mean must hold"),
        ({"mean": (0.1, 0.2, None)}, "^mean must hold"),
        ({"mean": (0.1, 0.2, float("inf"))}, "^mean must hold"),
        ({"mean": (0.1, 0.2)}, "^mean and std must be equally long, but mean has 2 channels and"),
        ({"mean": (), "std": ()}, "^mean must hold"),
        ({"mean": range(1000)}, "^mean and std must be equally long"),
        ({"mean": (0.1, 0.2, HUGE)}, "^mean must hold"),
        ({"std": (1, 1, 0)}, r"^std must hold a number .* for each channel, not \(1, 1, 0\)\.$"),
        ({"std": (1, -1, 1)}, "^std must hold"),
        ({"std": (1, 1, float("nan"))}, "^std must hold"),
        ({"std": (True, 1, 1)}, "^std must hold"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_work_is_refused(fields, words):
    with pytest.raises(ValueError, match=words) as error:
        InputConfig(**fields)
    assert len(str(error.value)) < 200
    assert "\n" not in str(error.value)


class Fake:
    """A model as far as it matters here."""

    def __init__(self, found):
        self.input, self.config = found, ConformerConfig()


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (FASHION, "mean and std for 1 channels, but the model takes 3"),
        (64, "int, not an InputConfig"),
        ({"image_size": 64}, "dict, not an InputConfig"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_does_not_fit_the_model_is_said(found, words):
    assert misfit_of_input(found, 3) == words
    with pytest.raises(ValueError, match=f"^model.input holds {words}; set an InputConfig that f"):
        own_input(Fake(found))


def test_what_fits_is_returned():
    assert misfit_of_input(InputConfig(64), 3) is None
    assert own_input(Fake(InputConfig(64))) == InputConfig(64)
    assert own_input(Fake(None)) is None
