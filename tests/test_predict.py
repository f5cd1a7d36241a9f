"""Prediction and features: any kind of image in, nothing lost on the way, nothing misread."""

import io
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from small_runs import TINY, small_recipe
from torch import nn
from torchvision.transforms.v2 import functional as TF

from conformer_src import optimize_for_inference
from conformer_src.checks import golden
from conformer_src.conformer import VARIANTS, Conformer, ConformerConfig, DualLogits
from conformer_src.data import (
    FASHION_CLASSES,
    IMAGENET_MEAN,
    IMAGENET_STD,
    fashion_transform,
    photo_transform,
)
from conformer_src.inputs import InputConfig, input_transform
from conformer_src.predict import (
    class_names,
    default_transform,
    extract_features,
    list_images,
    open_image,
    predict,
    rank,
)
from conformer_src.recipes import Recipe, write_recipe
from conformer_src.runs import build_model, evaluate_file, start_run
from conformer_src.sources import evaluation_images, input_config
from conformer_src.training import TwoHeadLoss
from conformer_src.weights import load_model, official_name, save_weights

FIELDS = {"channel_ratio": 0.25, "embed_dim": 48, "depth": 6, "num_heads": 3, "num_classes": 10}


def build(**changes):
    model = Conformer(ConformerConfig(**{**FIELDS, **changes}))
    return golden.fill_(model, official_name).eval()


@pytest.fixture(scope="module")
def model():
    return build()


def picture(height=256, width=256, seed=0):
    """Smooth colours, so that JPEG and resizing change little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    """Three images, and what is none of them."""
    inner = tmp_path / "inner"
    hidden = tmp_path / ".ipynb_checkpoints"
    inner.mkdir()
    hidden.mkdir()
    for seed, path in enumerate([tmp_path / "b.png", tmp_path / "A.JPG", inner / "c.webp"]):
        picture(40, 60, seed).save(path)
    for path in (hidden / "d.png", tmp_path / "._e.png"):
        picture(40, 60).save(path)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


def link(path):
    path.symlink_to("nowhere.jpg")


def truncated(path):
    picture(300, 300).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def text(path):
    path.write_text("<html>404</html>")


def empty(path):
    path.touch()


BROKEN = pytest.mark.parametrize("spoil", [truncated, text, empty, lambda path: None, link])


def same(one, other, tolerance=1e-6):
    assert one.labels == other.labels
    assert one.indices == other.indices
    assert one.probabilities == pytest.approx(other.probabilities, abs=tolerance)
    assert one.conv == pytest.approx(other.conv, abs=tolerance)
    assert one.trans == pytest.approx(other.trans, abs=tolerance)


class Calls(list):
    """The batch sizes that a model was run with."""

    def __init__(self, model):
        self.handle = model.register_forward_hook(lambda _, args, out: self.append(len(args[0])))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


# --- what is computed ---------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(300, 400), (500, 256), (64, 100)])
def test_the_default_transform_is_the_recipe(height, width, model):
    image = picture(height, width)
    scale = 256 / min(height, width)
    resized = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 224) / 2), round((resized.height - 224) / 2)
    pixels = np.asarray(resized.crop((left, top, left + 224, top + 224)), dtype=np.float64) / 255
    expected = torch.tensor((pixels - IMAGENET_MEAN) / IMAGENET_STD).permute(2, 0, 1).float()
    result = default_transform(model)(image)
    assert result.shape == (3, 224, 224)
    assert result.dtype == torch.float32
    step = 1 / 255 / min(IMAGENET_STD)
    assert (result - expected).abs().max() < 1.01 * step  # rounding to bytes


def test_probabilities_are_the_softmax_of_the_sum_and_of_each_head(model):
    image = picture()
    with torch.no_grad():
        conv, trans = model(photo_transform(train=False)(image).unsqueeze(0))
    both = torch.softmax(conv + trans, 1)[0]
    order = sorted(range(10), key=lambda n: -both[n])[:4]
    [found] = predict(model, image, topk=4)
    assert found.indices == tuple(order)
    assert found.labels == tuple(f"class {n}" for n in order)
    assert found.probabilities == pytest.approx([both[n].item() for n in order])
    for own, logits in ((found.conv, conv), (found.trans, trans)):
        chances = torch.softmax(logits, 1)[0]
        assert own == (f"class {chances.argmax()}", pytest.approx(chances.max().item()))
    assert all(type(p) is float for p in found.probabilities)


def test_the_heads_may_disagree_with_the_sum():
    logits = DualLogits(torch.tensor([[0.0, 3.0, 2.0]]), torch.tensor([[3.0, 0.0, 2.0]]))
    [(labels, _, conv, trans, indices)] = rank(logits, ["a", "b", "c"], 2)
    assert (labels[0], conv[0], trans[0], indices[0]) == ("c", "b", "a", 2)


def test_1000_classes_have_the_names_of_imagenet():
    names = class_names(1000)
    assert (names[0], names[281], names[999]) == ("tench", "tabby", "toilet tissue")
    [found] = predict(build(num_classes=1000), picture(), topk=1)
    assert found.labels == (names[found.indices[0]],)


def test_other_classes_have_numbers_or_the_names_that_are_given(model):
    assert class_names(3) == ["class 0", "class 1", "class 2"]
    [found] = predict(model, picture(), topk=10, classes="abcdefghij")
    assert found.labels == tuple("abcdefghij"[n] for n in found.indices)
    with pytest.raises(ValueError, match="2 names were given for 10 classes"):
        predict(model, picture(), classes=["a", "b"])


def test_the_model_knows_the_names_of_its_classes():
    """First those that are given, then the model's own, then ImageNet's, then numbers."""
    model = build()
    for own in (tuple("klmnopqrst"), list("klmnopqrst")):
        model.classes = own
        [found] = predict(model, picture(), topk=10)
        assert found.labels == tuple(own[n] for n in found.indices)
        assert found.conv[0] in own
        [given] = predict(model, picture(), topk=10, classes="abcdefghij")
        assert given.labels == tuple("abcdefghij"[n] for n in given.indices)
    many = build(num_classes=1000)
    many.classes = tuple(f"kind {n}" for n in range(1000))
    [found] = predict(many, picture(), topk=1)
    assert found.labels == (f"kind {found.indices[0]}",)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (("a", "b"), "2 names for 10 classes"),
        ("abcdefghij", "str, not a list of names"),
        (list(range(10)), "names of type int"),
    ],
)
def test_wrong_names_in_the_model_are_refused_unless_others_are_given(own, words):
    model = build()
    model.classes = own
    with pytest.raises(ValueError, match=rf"^model\.classes holds {words}; set a tuple with one"):
        predict(model, picture())
    assert predict(model, picture(), topk=1, classes="abcdefghij")[0].labels[0] in "abcdefghij"


def test_topk_is_at_most_all_classes(model):
    [found] = predict(model, picture(), topk=99)
    assert sorted(found.indices) == list(range(10))
    assert sum(found.probabilities) == pytest.approx(1)


@pytest.mark.parametrize("name", ["topk", "batch_size"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3"])
def test_counts_are_whole_numbers_of_at_least_1(model, name, value):
    with pytest.raises(ValueError, match=f"^{name} must be a whole number of at least 1, not"):
        predict(model, picture(), **{name: value})


@pytest.mark.parametrize(("branches", "missing"), [("conv", "trans"), ("trans", "conv")])
def test_a_missing_branch_has_no_opinion(branches, missing):
    [found] = predict(build(branches=branches), picture())
    assert getattr(found, missing) is None
    assert getattr(found, branches) == (found.labels[0], pytest.approx(found.probabilities[0]))


def test_without_classes_there_is_nothing_to_predict():
    with pytest.raises(ValueError, match="num_classes=0 predicts nothing; use extract_features"):
        predict(build(num_classes=0), picture())


def test_images_go_through_in_batches(model):
    images = [picture(seed=seed) for seed in range(5)]
    with Calls(model) as calls:
        found = predict(model, images, batch_size=2)
        assert calls == [2, 2, 1]
    assert [one.image for one in found] == [f"image {n}" for n in range(5)]
    for image, one in zip(images, found, strict=True):
        same(predict(model, image)[0], one, 1e-5)


# --- what is taken for an image -----------------------------------------------------------------


def each_kind(path):
    """Return the same 256 x 256 pixels in each kind that predict takes."""
    image = Image.open(path)
    pixels = np.asarray(image)
    tensor = torch.tensor(pixels).permute(2, 0, 1)
    return {
        "str": str(path),
        "path": path,
        "PIL image": image,
        "array": pixels,
        "array of floats": pixels / 255,
        "array of int64": pixels.astype(np.int64),
        "array of uint16": pixels.astype(np.uint16) * 257,
        "big-endian array": pixels.astype(">i4"),
        "reversed array": np.ascontiguousarray(pixels[:, ::-1])[:, ::-1],
        "array with alpha": np.dstack([pixels, pixels[..., 0]]),
        "array of one": pixels[None],
        "tensor": tensor,
        "tensor of floats": tensor / 255,
        "tensor of doubles": tensor.double() / 255,
        "tensor with gradient": (tensor / 255).requires_grad_(),
        "batch": tensor[None],
        "list": [path],
        "tuple": (path,),
        "nested": [[path]],
        "generator": (one for one in [path]),
        "glob": path.parent.glob("*.png"),
        "folder": path.parent,
        "name of a folder": str(path.parent),
    }


def test_each_kind_gives_the_same_prediction(model, tmp_path):
    picture().save(tmp_path / "one.png")
    kinds = each_kind(tmp_path / "one.png")
    expected = predict(model, picture())[0]
    for kind, images in kinds.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = predict(model, images)
        assert len(found) == 1, kind
        same(found[0], expected, 1e-5)


def test_kinds_mix_and_keep_their_order_and_names(model, folder):
    pixels = np.asarray(picture(seed=7))
    images = [pixels, folder, [torch.tensor(pixels).permute(2, 0, 1)], folder / "b.png"]
    names = ["image 0", "A.JPG", "b.png", "inner/c.webp", "image 4", "b.png"]
    names = [str(folder / name) if "." in name else name for name in names]
    assert [name for name, _ in list_images(images)] == names
    found = predict(model, images)
    assert [one.image for one in found] == names
    same(found[0], found[4], 1e-5)
    same(found[2], found[5], 1e-5)
    same(found[3], predict(model, folder / "inner" / "c.webp")[0], 1e-5)


def test_a_folder_counts_from_itself_on(folder):
    """A hidden folder above it hides nothing."""
    found = list_images(folder / ".ipynb_checkpoints")
    assert [path.name for _, path in found] == ["d.png"]


@pytest.mark.parametrize("spoil", [truncated, text, empty, link])
def test_the_unreadable_in_a_folder_are_named(model, folder, spoil):
    spoil(folder / "bad.jpg")
    with pytest.raises(ValueError, match=str(folder / "bad.jpg")):
        predict(model, folder)
    heard = []
    assert len(predict(model, folder, on_unreadable=heard.append)) == 3
    assert len(heard) == 1


def test_a_folder_without_images_is_refused(model, tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=rf"^there are no images in {tmp_path}; expected \.jpg, "):
        predict(model, tmp_path)


def test_no_images_no_predictions(model):
    assert predict(model, []) == []
    with pytest.raises(ValueError, match=r"^no images were given; give at least one"):
        extract_features(model, [])


GREY = np.arange(256, dtype=np.uint8).repeat(16).reshape(64, 64)
COLOUR = np.dstack([GREY, GREY.T, 255 - GREY])


def saved(tmp_path, image, name="image.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def palette(transparency=None):
    image = Image.new("P", (64, 64))
    image.putpalette([value for n in range(256) for value in (n, 255 - n, n // 2)])
    image.putdata(GREY.flatten().tolist())
    options = {} if transparency is None else {"transparency": transparency}
    return image, np.dstack([GREY, 255 - GREY, GREY // 2]), options


def with_alpha(pixels):
    return Image.fromarray(np.dstack([pixels, GREY.T]))


MODES = {
    "L": (Image.fromarray(GREY), GREY, {}),
    "LA": (with_alpha(GREY), GREY, {}),
    "1": (Image.fromarray(GREY > 99), (GREY > 99) * np.uint8(255), {}),
    "I;16": (Image.fromarray(GREY.astype(np.uint16) * 257), GREY, {}),
    "RGB": (Image.fromarray(COLOUR), COLOUR, {}),
    "RGB, one colour transparent": (Image.fromarray(COLOUR), COLOUR, {"transparency": (0, 0, 255)}),
    "RGBA": (with_alpha(COLOUR), COLOUR, {}),
    "P": palette(),
    "P, one colour transparent": palette(3),
    "P, colours half transparent": palette(bytes(range(256))),
}


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_shows_its_colours(tmp_path, mode):
    image, expected, options = MODES[mode]
    path = saved(tmp_path, image, **options)
    assert Image.open(path).mode[0] == mode[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_image(path)
    assert opened.mode == "RGB"
    expected = np.broadcast_to(np.atleast_3d(expected), (64, 64, 3))
    np.testing.assert_array_equal(np.asarray(opened), expected)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV"])
def test_other_colour_spaces_become_rgb(mode):
    image = Image.fromarray(COLOUR)
    opened = np.asarray(open_image(image.convert(mode)), dtype=int)
    assert np.abs(opened - COLOUR).max() < 10  # each conversion rounds


def test_cmyk_files_are_read(model, tmp_path):
    image = picture(seed=3)
    path = saved(tmp_path, image.convert("CMYK"), "print.jpg", quality=100, subsampling=0)
    assert Image.open(path).mode == "CMYK"
    opened = np.asarray(open_image(path), dtype=int)
    assert np.abs(opened - np.asarray(image, dtype=int)).max() < 10
    same(predict(model, path)[0], predict(model, opened.astype(np.uint8))[0])


def test_16_bits_use_the_whole_range(tmp_path):
    """Cut at 255, nearly all of such a picture is white."""
    deep = np.linspace(0, 65535, 4096).reshape(64, 64).astype(np.uint16)
    expected = deep // 257
    opened = open_image(saved(tmp_path, Image.fromarray(deep)))
    np.testing.assert_array_equal(np.asarray(opened)[..., 0], expected)
    for kind in (deep, torch.tensor(deep)):
        np.testing.assert_array_equal(open_image(kind)[0], expected)


def test_float_pictures_keep_their_fractions(tmp_path):
    floats = (GREY / 255).astype(np.float32)
    opened = open_image(saved(tmp_path, Image.fromarray(floats), "float.tiff"))
    torch.testing.assert_close(opened, torch.tensor(floats).expand(3, -1, -1))


def test_masks_are_black_and_white():
    mask = torch.tensor(GREY > 99)
    assert open_image(mask).unique().tolist() == [0, 255]


# How the pixels lie in the file, for each note of a camera.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("note", STORED)
def test_photographs_are_turned_upright(model, tmp_path, note):
    upright = picture(40, 60)
    stored = upright if note == 1 else upright.transpose(STORED[note])
    exif = Image.Exif()
    exif[0x0112] = note
    path = saved(tmp_path, stored, exif=exif)
    np.testing.assert_array_equal(np.asarray(open_image(path)), np.asarray(upright))
    same(predict(model, path)[0], predict(model, upright)[0])


def test_a_photograph_with_a_broken_note_is_read_as_it_lies(tmp_path):
    note = b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff"
    path = saved(tmp_path, picture(40, 60), "broken.jpg", exif=note)
    with warnings.catch_warnings(action="ignore"):  # Pillow's
        assert open_image(path).size == (60, 40)


def test_of_an_animation_the_first_picture_is_taken(tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green", "blue")]
    path = saved(tmp_path, frames[0], "film.gif", save_all=True, append_images=frames[1:])
    assert Image.open(path).n_frames == 3
    assert np.asarray(open_image(path)).reshape(-1, 3).tolist() == [[255, 0, 0]] * 400


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2), (1, 100), (100, 1), (3, 200)])
def test_the_smallest_images_are_predicted(model, height, width):
    [found] = predict(model, picture(height, width))
    assert sum(found.probabilities) <= 1


def test_a_strip_is_refused(model):
    rule = "^image 1 cannot be used as an image: it is 5000 x 1 pixels, one side more than 100 "
    with pytest.raises(ValueError, match=rule):
        predict(model, [picture(), picture(1, 5000)])


NO_IMAGES = {
    "int is no image; give a path": 3,
    "NoneType is no image": None,
    "bytes is no image": b"cat.jpg",
    "dict is no image": {},
    r"its shape is \(3, 8, 9\); give an array \(H, W\)": np.zeros((3, 8, 9), np.uint8),
    r"its shape is \(8, 9, 3\); give an array \(H, W\)": torch.zeros(8, 9, 3),
    r"its shape is \(3, 0, 9\)": torch.zeros(3, 0, 9),
    r"its shape is \(7,\)": np.zeros(7, np.uint8),
    r"its shape is \(1, 1, 3, 8, 9\)": torch.zeros(1, 1, 3, 8, 9),
    "its values are not 0 to 255": np.full((8, 9), 256),
    "its values are not 0 to 255;": np.full((8, 9), -1),
    "its values are not 0 to 255; scale": np.zeros((8, 9), complex),
    "its floats go from 0 to 255 instead of 0 to 1": np.linspace(0, 255, 64).reshape(8, 8),
    "its floats go from nan to nan instead": torch.full((3, 8, 8), float("nan")),
    "object": np.full((8, 9), None),
}


@pytest.mark.parametrize("words", NO_IMAGES)
def test_what_is_no_image_is_refused_by_its_place(model, words):
    with pytest.raises(ValueError, match=f"^image 1 cannot be used as an image: .*{words}"):
        predict(model, [picture(), NO_IMAGES[words]])


def test_normalised_tensors_need_no_transform_but_must_say_so(model):
    ready = photo_transform(train=False)(picture())
    with pytest.raises(ValueError, match=r"^image 0 .* give transform=torch\.nn\.Identity\(\)"):
        predict(model, ready)
    same(predict(model, ready, transform=nn.Identity())[0], predict(model, picture())[0])


def test_a_transform_that_leaves_sizes_apart_is_named(model):
    images = [torch.zeros(3, 64, 64), torch.zeros(3, 64, 80)]
    rule = r"^image 1 became \(3, 64, 80\), but image 0 \(3, 64, 64\); let the transform end in one"
    with pytest.raises(ValueError, match=rule):
        predict(model, images, transform=nn.Identity())
    assert len(predict(model, images, transform=nn.Identity(), batch_size=1)) == 2


# --- what cannot be read ------------------------------------------------------------------------


@BROKEN
def test_what_cannot_be_read_is_named_before_anything_is_computed(model, tmp_path, spoil):
    paths = [saved(tmp_path, picture(seed=n), f"{n}.jpg") for n in range(5)]
    bad = tmp_path / "bad.jpg"
    spoil(bad)
    for given in ([*paths, bad], [bad, *paths]):
        with Calls(model) as calls, pytest.raises(ValueError, match=rf"{bad}[ .]") as caught:
            predict(model, given, batch_size=2)
        assert calls == []
        assert "\n" not in str(caught.value)


@BROKEN
def test_the_others_are_predicted_if_somebody_listens(model, tmp_path, spoil):
    paths = [saved(tmp_path, picture(seed=n), f"{n}.jpg") for n in range(3)]
    bad, heard = tmp_path / "bad.jpg", []
    spoil(bad)
    given = [paths[0], bad, *paths[1:]]
    found = predict(model, given, batch_size=2, on_unreadable=heard.append)
    assert [one.image for one in found] == [str(path) for path in paths]
    assert len(heard) == 1
    assert str(bad) in heard[0]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (truncated, "cannot be used as an image: .*truncated"),
        (text, "is no image of a kind that Pillow can read"),
        (empty, "is no image of a kind that Pillow can read"),
        (lambda path: None, r"^there is no file or folder .*bad\.jpg\.$"),
    ],
)
def test_it_is_said_why(model, tmp_path, spoil, words):
    spoil(tmp_path / "bad.jpg")
    with pytest.raises(ValueError, match=words):
        predict(model, tmp_path / "bad.jpg")


def test_an_opened_image_that_is_truncated_is_named_by_its_place(model, tmp_path):
    truncated(tmp_path / "bad.jpg")
    with (
        Image.open(tmp_path / "bad.jpg") as bad,
        pytest.raises(ValueError, match=r"^image 1 .*truncated"),
    ):
        predict(model, [picture(), bad])


def test_an_image_too_large_to_be_one_is_named(model, tmp_path, monkeypatch):
    path = saved(tmp_path, picture())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=f"^{path} cannot be used as an image: .*bomb"):
        predict(model, path)


def test_nothing_readable_no_predictions(model, tmp_path):
    heard = []
    assert predict(model, [tmp_path / "bad.jpg"], on_unreadable=heard.append) == []
    assert len(heard) == 1


class Screen(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_shows_on_a_terminal_for_several_batches(model, monkeypatch, capsys):
    images = [picture(seed=seed) for seed in range(3)]
    predict(model, images, batch_size=2)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr", Screen())
    predict(model, images, batch_size=3)
    assert sys.stderr.getvalue() == ""
    predict(model, images, batch_size=2)
    assert "0/3" in sys.stderr.getvalue()


# --- models -------------------------------------------------------------------------------------


def test_the_small_stem_sees_32_pixels_without_a_margin():
    micro = Conformer(VARIANTS["conformer_micro"]).eval()
    pixels = picture(32, 32, seed=3)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    expected = (TF.pil_to_tensor(pixels) / 255 - mean) / std  # each pixel stays
    torch.testing.assert_close(default_transform(micro)(pixels), expected)
    assert default_transform(micro)(picture(300, 400)).shape == (3, 32, 32)
    with torch.no_grad():
        best = micro(expected.unsqueeze(0)).sum().softmax(1).max().item()
    assert predict(micro, pixels)[0].probabilities[0] == pytest.approx(best)


def test_grey_models_ask_for_a_transform_and_get_grey_images(tmp_path):
    config = ConformerConfig(**{**vars(VARIANTS["conformer_micro"]), "in_chans": 1})
    micro = golden.fill_(Conformer(config), official_name)
    grey = GREY[:28, :28]
    with pytest.raises(ValueError, match=r"^a model of 1 channels has no usual transform; set"):
        predict(micro, grey)
    path = saved(tmp_path, Image.fromarray(grey))
    colour = np.dstack([grey] * 3)
    kinds = [grey, path, Image.open(path), Image.fromarray(colour), colour, torch.tensor(grey)]
    found = predict(micro, kinds, transform=fashion_transform(train=False))
    for one in found[1:]:
        same(one, found[0], 1e-5)


def logits_of(model, tensors):
    with torch.no_grad():
        return model(torch.stack(tensors)).sum().softmax(1)


def test_the_model_says_how_its_images_are_made_ready(tmp_path):
    """First the transform that is given, then the model's own input, then what is usual."""
    model, images = build(pad=True), [picture(90, 70, seed) for seed in range(3)]
    model.input = InputConfig(64, (0.2, 0.3, 0.4), (0.5, 0.6, 0.7), crop=0.8, pad=3)
    own = input_transform(model.input)
    for transform, given in ((own, None), (photo_transform(False, 96), photo_transform(False, 96))):
        expected = logits_of(model, [transform(image) for image in images])
        found = predict(model, images, topk=10, transform=given, batch_size=2)
        for row, one in zip(expected, found, strict=True):
            assert one.probabilities == pytest.approx(row[list(one.indices)].tolist(), abs=1e-6)
    features = extract_features(model, images, 1)
    assert features.tokens.shape[1] == 1 + (64 // 16) ** 2
    path = saved(tmp_path, images[0])
    same(predict(model, path)[0], predict(model, images[0])[0])
    model.input = None
    assert extract_features(model, images, 1).tokens.shape[1] == 1 + (224 // 16) ** 2


def test_a_grey_model_with_an_input_needs_no_transform():
    grey = build(in_chans=1)
    grey.input = InputConfig(64, (0.5,), (0.25,), crop=1.0)
    image = picture(64, 64)
    expected = (TF.pil_to_tensor(image.convert("L")) / 255 - 0.5) / 0.25
    torch.testing.assert_close(default_transform(grey)(image.convert("L")), expected)
    best = logits_of(grey, [expected]).max().item()
    assert predict(grey, image)[0].probabilities[0] == pytest.approx(best)


def test_an_input_that_does_not_fit_is_refused(model):
    wrong = build()
    for found, words in (
        (InputConfig(32, (0.5,), (1,)), "mean and std for 1 channels"),
        (64, "int"),
    ):
        wrong.input = found
        for use in (predict, extract_features):
            with pytest.raises(ValueError, match=f"^model.input holds {words}"):
                use(wrong, picture())
    same(
        predict(wrong, picture(), transform=photo_transform(False))[0],
        predict(model, picture())[0],
    )


def agree(model, images, found):
    """Say whether predictions are what the model makes of a data set's (tensor, label)."""
    expected = logits_of(model, [tensor for tensor, _ in images])
    for row, one in zip(expected, found, strict=True):
        assert one.probabilities == pytest.approx(row[list(one.indices)].tolist(), abs=1e-6)
        assert row[one.indices[0]] == row.max()


def test_a_trained_model_predicts_files_as_it_was_evaluated(tmp_path):
    sides = [(48, 48), (60, 48), (90, 130), (31, 40)]
    for label, name in enumerate("abc"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(12):
            noise = np.random.default_rng(number).integers(0, 256, (*sides[number % 4], 3))
            noise[..., label] //= 4
            image = Image.fromarray(noise.astype(np.uint8))
            image.save(tmp_path / "images" / name / f"{number:02}.{('png', 'jpg')[number % 2]}")
    recipe = small_recipe(tmp_path / "images", image_size=48, lr=0.01)
    start_run(recipe, tmp_path / "run", lambda line: None)
    model = load_model(tmp_path / "run/best.safetensors").eval()
    assert model.input == input_config(recipe) == InputConfig(48, crop=1.0)
    images = evaluation_images(recipe, model.classes)
    paths = [path for path, _ in images.samples]
    found = predict(model, paths, topk=3)
    agree(model, images, found)
    right = [
        images.classes[label] == one.labels[0]
        for one, (_, label) in zip(found, images, strict=True)
    ]
    scores = evaluate_file(tmp_path / "run", data=str(tmp_path / "images"))
    assert scores["sum"] == pytest.approx(100 * sum(right) / len(right))
    assert sum(right) > 0


def test_a_run_from_other_weights_has_its_own_names_and_input(tmp_path):
    recipe = small_recipe(tmp_path, image_size=48)
    before = build_model(recipe, ("a", "b", "c"))
    before.input = InputConfig(64)
    save_weights(before, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="^the weights call 'b' what the model calls 'x'"):
        model = build_model(
            replace(recipe, weights=str(tmp_path / "a.safetensors")), ("a", "x", "c")
        )
    assert (model.classes, model.input) == (("a", "x", "c"), InputConfig(48, crop=1.0))
    assert torch.equal(model.entry.stem.conv1.weight, before.entry.stem.conv1.weight)


def test_files_of_fashion_mnist_are_predicted_as_they_were_evaluated(tmp_path):
    """By their data set, and by a folder of them, whose recipe knows nothing of Fashion-MNIST."""
    recipe = Recipe(data="fashion-subset", model_options=TINY)
    names = [name.replace("/", " ") for name in FASHION_CLASSES]
    trained = golden.fill_(build_model(recipe, names), official_name)
    save_weights(trained, tmp_path / "a.safetensors")
    write_recipe(recipe, tmp_path / "recipe.toml")
    model = load_model(tmp_path / "a.safetensors").eval()
    images = evaluation_images(recipe)
    for place, label in enumerate(images.labels[:40]):
        folder = tmp_path / "images" / names[label]
        folder.mkdir(parents=True, exist_ok=True)
        TF.to_pil_image(images.images[place]).save(folder / f"{place:02}.png")
    paths = sorted((tmp_path / "images").rglob("*.png"), key=lambda path: path.name)
    some = [images[place] for place in range(40)]
    agree(model, some, predict(model, paths, topk=10))
    tensors, labels = zip(*some, strict=True)
    with torch.no_grad():
        loss = TwoHeadLoss()(model(torch.stack(tensors)), torch.tensor(labels)).item()

    def scored():
        return evaluate_file(tmp_path / "a.safetensors", data=str(tmp_path / "images"))["loss"]

    assert scored() == pytest.approx(loss, rel=1e-5)
    trained.input = None
    save_weights(trained, tmp_path / "a.safetensors")
    assert scored() != pytest.approx(loss, rel=1e-3)


def test_models_of_other_channels_take_tensors_as_they_are():
    many = build(in_chans=5)
    images = torch.rand(2, 5, 64, 64)
    found = predict(many, images, transform=nn.Identity())
    with torch.no_grad():
        best = many(images).sum().argmax(1).tolist()
    assert [one.indices[0] for one in found] == best


@pytest.mark.parametrize("use", [predict, extract_features])
@pytest.mark.parametrize("fails", [False, True])
def test_each_part_keeps_its_own_mode(use, fails):
    model = build().train()
    model.blocks[0].eval()  # frozen
    modes = [part.training for part in model.modules()]
    assert len(set(modes)) == 2
    before = model.entry.stem.bn1.running_mean.clone()
    if fails:
        with pytest.raises(ValueError, match="no file"):
            use(model, "missing.jpg")
    else:
        use(model, picture())
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(model.entry.stem.bn1.running_mean, before)


def test_a_model_in_training_mode_predicts_like_one_that_is_not(model):
    same(predict(build(drop_rate=0.5).train(), picture())[0], predict(model, picture())[0])


def test_nothing_is_kept_for_gradients(model):
    assert not extract_features(model, picture()).tokens.requires_grad


def compiled(model):
    return torch.compile(model, backend="eager")


def checkpointed(model):
    model.checkpointing = True
    return model


def folded(model):
    return optimize_for_inference(model, compile=False)


@pytest.mark.parametrize("change", [compiled, checkpointed, folded])
def test_other_forms_of_a_model_predict_the_same(model, change):
    other = change(build()).train()
    same(predict(other, picture())[0], predict(model, picture())[0], 1e-4)
    for ours, theirs in zip(
        extract_features(other, picture(), 3), extract_features(model, picture(), 3), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert all(part.training for part in other.modules())


def test_a_model_of_another_precision_is_given_its_own():
    exact = build().double()
    expected = predict(build(), picture())[0]
    same(predict(exact, picture())[0], expected, 1e-5)
    [rough] = predict(build().bfloat16(), picture())
    assert rough.probabilities[0] == pytest.approx(expected.probabilities[0], abs=0.05)


@pytest.mark.parametrize("use", [predict, extract_features])
def test_other_networks_are_refused(use):
    with pytest.raises(TypeError, match=r"^Linear has no ConformerConfig; give a Conformer"):
        use(nn.Linear(2, 2), picture())


# --- features -----------------------------------------------------------------------------------


def test_features_after_each_block_of_both_branches(model):
    images = [picture(seed=seed) for seed in range(3)]
    batch = torch.stack([photo_transform(train=False)(image) for image in images])
    with torch.no_grad():
        expected = model.forward_blocks(batch)
    for block in (*range(1, 7), None):
        found = extract_features(model, images, block, batch_size=2)
        wanted = expected[-1 if block is None else block - 1]
        assert (found.maps.shape, found.tokens.shape) == (wanted.maps.shape, wanted.tokens.shape)
        torch.testing.assert_close(found.maps, wanted.maps, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.tokens, wanted.tokens, rtol=1e-4, atol=1e-4)


def test_later_blocks_are_not_run(model):
    with Calls(model.blocks[2]) as third, Calls(model.blocks[3]) as fourth:
        extract_features(model, picture(), 3)
        assert (len(third), len(fourth)) == (1, 0)


@pytest.mark.parametrize("block", [0, 7, -1, True, 1.0, "last"])
def test_there_is_no_such_block(model, block):
    with pytest.raises(ValueError, match=r"^block must be a whole number from 1 to 6, not"):
        extract_features(model, picture(), block)


def test_features_of_one_branch():
    conv = extract_features(build(branches="conv"), picture())
    assert (conv.maps.shape, conv.tokens.shape) == ((1, 64, 7, 7), (1, 0, 0))
    trans = extract_features(build(branches="trans"), picture())
    assert (trans.maps.shape, trans.tokens.shape) == ((1, 64, 56, 56), (1, 197, 48))


def test_features_need_no_classes(model):
    headless = extract_features(build(num_classes=0), picture())
    torch.testing.assert_close(headless.maps, extract_features(model, picture()).maps)


def test_features_of_a_folder_are_in_the_order_of_its_list(model, folder):
    names = [name for name, _ in list_images(folder)]
    found = extract_features(model, folder, 1)
    for row, name in enumerate(names):
        alone = extract_features(model, name, 1)
        torch.testing.assert_close(found.maps[row], alone.maps[0], rtol=1e-4, atol=1e-4)


@BROKEN
def test_features_name_what_cannot_be_read(model, tmp_path, spoil):
    spoil(tmp_path / "bad.jpg")
    with pytest.raises(ValueError, match=str(tmp_path / "bad.jpg")):
        extract_features(model, [picture(), tmp_path / "bad.jpg"])
