"""The images of a recipe: which, split how, transformed how, and what is refused."""

import shutil
import warnings
from itertools import islice

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as TF

from conformer_src import sources
from conformer_src.conformer import create_model
from conformer_src.data import FashionSubset, check_batch, fashion_transform, photo_transform
from conformer_src.recipes import Recipe, load_recipe
from conformer_src.scaling import write_shards
from conformer_src.sources import evaluation_images, image_transform, open_data, split_by_class
from conformer_src.training import build_trainer, evaluate, fit, steps_per_epoch

TINY = {"depth": 3, "embed_dim": 24, "num_heads": 3, "channel_ratio": 0.25}


def draw(path, colour="red", mode="RGB", size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, colour)
    image.paste("white", (0, 0, 7, 5))  # so that turning it shows
    image.convert(mode).save(path)


def fill(root, **counts):
    """Draw so many images into a sub-folder for each class."""
    for number, (name, count) in enumerate(counts.items()):
        for place in range(count):
            draw(root / name / f"{place}.png", (60 * number, 200 - place, 9 * place % 255))
    return root


def own(root, **changes):
    return Recipe(**{"data": str(root), "in_chans": 3, "model_options": TINY} | changes)


def paths(images):
    """Return the files behind a data set, in order."""
    if hasattr(images, "indices"):
        return [images.dataset.samples[index][0] for index in images.indices]
    return [path for path, _ in images.samples]


# --- Fashion-MNIST


def test_fashion_holds_out_of_the_training_images():
    data = open_data(load_recipe("fashion"))
    assert (len(data.train), len(data.val), len(data.test)) == (9_000, 1_000, 2_000)
    assert not set(data.train.indices) & set(data.val.indices)
    assert data.val.dataset.labels[data.val.indices].bincount().tolist() == [100] * 10
    assert data.classes == FashionSubset.classes


def test_fashion_is_transformed_as_in_chapter_1():
    data, plain = open_data(load_recipe("fashion")), FashionSubset()
    for images, train in ((data.train, True), (data.val, False)):
        transform = fashion_transform(train)
        for place in range(6):  # some of them are mirrored
            torch.manual_seed(place)
            own = images[place][0]
            torch.manual_seed(place)
            assert torch.equal(own, transform(plain.images[images.indices[place]]))
    torch.testing.assert_close(
        data.test[7][0], fashion_transform(False)(FashionSubset(False).images[7])
    )


def test_the_full_set_is_opened_by_its_name(monkeypatch):
    class Full(FashionSubset):
        def __init__(self, train, transform):
            super().__init__(train, transform)
            self.targets = self.labels
            del self.labels

    monkeypatch.setitem(sources._FASHION, "fashion", Full)
    data = open_data(load_recipe("fashion", data="fashion"))
    assert isinstance(data.test, Full)
    assert (len(data.train), len(data.val)) == (9_000, 1_000)


@pytest.mark.parametrize("changes", [{"in_chans": 3}, {"image_size": 64}])
def test_fashion_suits_one_size_and_grey_only(changes):
    words = "grey and padded to 32 pixels, so in_chans must be 1 and image_size 32, not"
    with pytest.raises(ValueError, match=words):
        open_data(Recipe(**changes))


def test_fashion_with_all_augmentation():
    recipe = Recipe(crop_scale=0.3, rand_augment=30, color_jitter=0.4, erasing=1.0, validation=0.01)
    images, labels = next(iter(DataLoader(open_data(recipe).train, batch_size=64)))
    check_batch(images, labels, in_chans=1, num_classes=10)
    assert images.shape == (64, 1, 32, 32)


# --- what is held out


def test_a_share_of_each_class_is_held_out():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 3 + [3] * 2 + [4])
    kept, held = split_by_class(labels, 0.2, seed=0)
    assert labels[held].bincount(minlength=5).tolist() == [10, 4, 1, 1, 0]
    assert sorted(kept + held) == list(range(76))


def test_the_seed_decides_what_is_held_out():
    labels = torch.arange(4).repeat(30)
    splits = [split_by_class(labels, 0.1, seed)[1] for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]


def test_a_class_is_never_held_out_whole():
    kept, held = split_by_class(torch.tensor([0, 0, 1, 1]), 0.99, seed=0)
    assert (len(kept), len(held)) == (2, 2)


def test_nothing_is_held_out_of_share_0():
    assert split_by_class(torch.tensor([0, 0, 1]), 0, seed=0) == ([0, 1, 2], [])


@pytest.mark.parametrize(
    ("counts", "share", "why"),
    [
        ({"cats": 3, "dogs": 3}, 0, "because validation is 0"),
        ({"cats": 1, "dogs": 1}, 0.1, "because no class has two images"),
    ],
)
def test_without_images_to_spare_the_training_images_are_scored(tmp_path, counts, share, why):
    recipe = own(fill(tmp_path, **counts), validation=share)
    with pytest.warns(UserWarning, match=f"no images are held out, {why}: the validation is on"):
        data = open_data(recipe)
    assert paths(data.train) == paths(data.val)
    assert torch.equal(data.val[0][0], data.val[0][0])
    assert data.train.transform is not data.val.transform


# --- folders


def test_a_folder_of_classes(tmp_path):
    data = open_data(own(fill(tmp_path, cats=10, dogs=20)))
    assert data.classes == ("cats", "dogs")
    assert (len(data.train), len(data.val), data.test) == (27, 3, None)
    assert not set(paths(data.train)) & set(paths(data.val))
    image, label = data.val[2]
    assert (image.shape, label) == ((3, 32, 32), 1)


def test_a_folder_with_parts(tmp_path):
    for part, count in (("train", 4), ("val", 2), ("test", 3)):
        fill(tmp_path / part, cats=count, dogs=count)
    data = open_data(own(tmp_path, rand_augment=5))
    assert (len(data.train), len(data.val), len(data.test)) == (8, 4, 6)
    assert all(
        f"/{part}/" in path
        for part in ("train", "val", "test")
        for path in paths(getattr(data, part))
    )
    assert len(data.train.transform.transforms) > len(data.val.transform.transforms)
    assert len(data.val.transform.transforms) == len(data.test.transform.transforms)


def test_train_alone_and_train_with_test(tmp_path):
    fill(tmp_path / "train", cats=10, dogs=10)
    data = open_data(own(tmp_path))
    assert (len(data.train), len(data.val), data.test) == (18, 2, None)
    fill(tmp_path / "test", dogs=3)
    data = open_data(own(tmp_path))
    assert (len(data.train), len(data.val), len(data.test)) == (18, 2, 3)


def test_labels_are_those_of_the_training_classes(tmp_path):
    fill(tmp_path / "train", ants=3, bees=3, cats=3)
    fill(tmp_path / "val", cats=2, bees=1)  # ants are missing, so cats come second here
    data = open_data(own(tmp_path))
    assert [label for _, label in data.val.samples] == [1, 2, 2]
    assert data.val[2][1] == 2


def test_unknown_classes_are_named(tmp_path):
    fill(tmp_path / "train", cats=3, dogs=3)
    fill(tmp_path / "val", cats=1, dog=1)
    with pytest.raises(ValueError, match="val has sub-folders that are no classes: dog; the class"):
        open_data(own(tmp_path))


def test_classes_may_be_called_train_and_test(tmp_path):
    fill(tmp_path, train=4, bus=4, test=4)
    (tmp_path / "train" / ".thumbnails").mkdir()
    data = open_data(own(tmp_path))
    assert data.classes == ("bus", "test", "train")


def test_folders_that_are_not_used_are_named(tmp_path):
    fill(tmp_path / "train", cats=3, dogs=3)
    fill(tmp_path / "valid", cats=3, dogs=3)
    (tmp_path / ".cache").mkdir()
    with pytest.warns(UserWarning, match="valid beside train is not used; only train, val and"):
        data = open_data(own(tmp_path))
    assert len(data.train) == 4


def test_a_test_folder_without_labels_is_not_used(tmp_path):
    fill(tmp_path / "train", cats=10, dogs=10)
    draw(tmp_path / "test" / "1.png")
    (tmp_path / "val").mkdir()
    with pytest.warns(UserWarning, match="test, val beside train is not used; only .* with a sub-"):
        data = open_data(own(tmp_path))
    assert data.classes == ("cats", "dogs")
    assert (len(data.train), len(data.val), data.test) == (18, 2, None)


def test_one_class_is_refused(tmp_path):
    fill(tmp_path, cats=5)
    with pytest.raises(ValueError, match="has one class, cats: with a single answer there is"):
        open_data(own(tmp_path))


def test_imbalance_is_said(tmp_path):
    fill(tmp_path, cats=20, dogs=2)
    words = "20 images of cats and 2 of dogs: compare each accuracy with the 91 % of always answer"
    with pytest.warns(UserWarning, match=words):
        data = open_data(own(tmp_path))
    assert len(data.val) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (tmp_path / "cats" / "0.png").unlink()
        fill(tmp_path, dogs=3)
        open_data(own(tmp_path))


def test_missing_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*gone; put it back, or name"):
        open_data(own(tmp_path / "gone"))
    with pytest.raises(ValueError, match="the recipe names no images; give --data FOLDER"):
        open_data(load_recipe("finetune"))
    with pytest.raises(FileNotFoundError, match=r"has no sub-folders\. One sub-folder a class"):
        open_data(own(tmp_path))


def test_parts_without_training_images(tmp_path):
    fill(tmp_path / "val", cats=3, dogs=3)
    fill(tmp_path / "test", cats=3, dogs=3)
    with pytest.raises(FileNotFoundError, match="has val, test, but no train; add it, or give a"):
        open_data(own(tmp_path))
    assert len(evaluation_images(own(tmp_path), ("cats", "dogs"))) == 6


def test_an_empty_class(tmp_path):
    fill(tmp_path, cats=3)
    (tmp_path / "dogs").mkdir()
    with pytest.raises(FileNotFoundError, match="dogs holds no images"):
        open_data(own(tmp_path))


@pytest.mark.parametrize("channels", [2, 4, 12])
def test_files_have_no_other_channels(tmp_path, channels):
    fill(tmp_path, cats=2, dogs=2)
    with pytest.raises(ValueError, match=rf"in_chans must be 1 .* or 3 .*, not {channels}; other"):
        open_data(own(tmp_path, in_chans=channels))


def test_corrupt_images(tmp_path):
    fill(tmp_path, cats=4, dogs=4)
    bad = tmp_path / "cats" / "2.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.warns(UserWarning, match=r"left out 1 of 8 files, unreadable: .*2\.png"):
        data = open_data(own(tmp_path, corrupt="skip"))
    assert len(data.train) + len(data.val) == 7
    data = open_data(own(tmp_path, corrupt="refuse"))
    images = next(images for images in (data.train, data.val) if str(bad) in paths(images))
    with pytest.raises(ValueError, match=r"2\.png cannot be read as an image"):
        images[paths(images).index(str(bad))]


@pytest.mark.parametrize("channels", [1, 3])
def test_grey_colour_and_transparent_files_mixed(tmp_path, channels):
    modes = ["L", "RGB", "RGBA", "P", "1", "LA", "CMYK", "I"]
    for number, mode in enumerate(modes):
        ending = "tif" if mode in ("CMYK", "I") else "png"
        for name in ("cats", "dogs"):
            draw(tmp_path / name / f"{number}.{ending}", mode=mode)
    data = open_data(own(tmp_path, in_chans=channels, rand_augment=9, color_jitter=0.3))
    for images in (data.train, data.val):
        batch, labels = next(iter(DataLoader(images, batch_size=16)))
        check_batch(batch, labels, channels, 2)


# --- transforms


def photo(size=(300, 200)):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.mark.parametrize("size", [128, 224])
def test_photographs_are_evaluated_as_predict_does(size):
    transform = image_transform(own("somewhere", image_size=size), train=False)
    assert torch.equal(transform(photo()), photo_transform(False, size)(photo()))


def test_training_on_photographs_is_that_of_chapter_1():
    recipe = own("somewhere", image_size=224, crop_scale=0.08)
    torch.manual_seed(3)
    ours = image_transform(recipe, train=True)(photo())
    torch.manual_seed(3)
    assert torch.equal(ours, photo_transform(True, 224)(photo()))


@pytest.mark.parametrize("train", [True, False])
def test_small_images_of_the_right_size_keep_each_pixel(train):
    transform = image_transform(own("somewhere", image_size=40, flip=False), train)
    image, (mean, std) = photo((40, 40)), sources._colours(own("somewhere"))
    shown = transform(image) * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    assert torch.equal((shown * 255).round().byte(), TF.pil_to_tensor(image))


@pytest.mark.parametrize("size", [(64, 40), (40, 64), (7, 9), (1, 1)])
@pytest.mark.parametrize("crop", [1.0, 0.3])
def test_any_side_becomes_the_square(size, crop):
    for train in (True, False):
        transform = image_transform(own("somewhere", image_size=48, crop_scale=crop), train)
        assert transform(photo(size)).shape == (3, 48, 48)


def test_grey_is_the_brightness():
    recipe = own("somewhere", in_chans=1)
    plain = Image.new("RGB", (32, 32), (200, 200, 200))
    expected = (200 / 255 - 0.449) / 0.226
    shown = image_transform(recipe, train=False)(plain)
    torch.testing.assert_close(shown, torch.full((1, 32, 32), expected), atol=1e-3, rtol=0)


def test_each_augmentation_can_be_switched():
    def kinds(**changes):
        recipe = own("somewhere", **{"flip": False} | changes)
        evaluated = image_transform(recipe, train=False).transforms
        trained = image_transform(recipe, train=True).transforms
        plain = [type(part).__name__ for part in evaluated]
        return [name for part in trained if (name := type(part).__name__) not in plain]

    assert kinds() == []
    assert kinds(flip=True) == ["RandomHorizontalFlip"]
    assert kinds(crop_scale=0.5) == ["RandomResizedCrop"]
    assert kinds(rand_augment=9) == ["RandAugment"]
    assert kinds(color_jitter=0.4) == ["ColorJitter"]
    assert kinds(erasing=0.25) == ["RandomErasing"]
    everything = {"flip": True, "rand_augment": 9, "color_jitter": 0.4, "erasing": 0.25}
    assert len(kinds(crop_scale=0.5, **everything)) == 5


def test_erased_places_hold_noise():
    recipe = own("somewhere", flip=False, erasing=1.0)
    plain = Image.new("RGB", (32, 32), "black")
    torch.manual_seed(0)
    shown = image_transform(recipe, train=True)(plain)
    assert 0.02 * 1024 <= (shown[0] != shown[0, 0, 0]).sum() <= 0.4 * 1024
    assert shown[0].unique().numel() > 20


# --- a model is scored


def test_images_to_score_are_labelled_as_the_model_counts(tmp_path):
    fill(tmp_path, bees=1, ants=2)
    images = evaluation_images(own(tmp_path), ("cats", "bees", "ants"))
    assert [label for _, label in images.samples] == [2, 2, 1]
    assert images.classes == ["cats", "bees", "ants"]
    assert [label for _, label in evaluation_images(own(tmp_path)).samples] == [0, 0, 1]
    with pytest.raises(ValueError, match="that are no classes: ants; the classes are cats, bees"):
        evaluation_images(own(tmp_path), ("cats", "bees"))


def test_the_test_images_come_first(tmp_path):
    fill(tmp_path / "train", cats=2)
    with pytest.raises(ValueError, match=r"holds train/ only; give a folder with test/ or val/"):
        evaluation_images(own(tmp_path), ("cats",))
    fill(tmp_path / "val", cats=3)
    assert len(evaluation_images(own(tmp_path), ("cats",))) == 3
    fill(tmp_path / "test", cats=4)
    assert len(evaluation_images(own(tmp_path), ("cats",))) == 4
    assert len(evaluation_images(own(tmp_path / "train"), ("cats",))) == 2


def test_fashion_is_scored_by_its_own_classes():
    recipe = load_recipe("fashion")
    assert len(evaluation_images(recipe, FashionSubset.classes)) == 2_000
    assert len(evaluation_images(recipe)) == 2_000
    with pytest.raises(ValueError, match="knows other classes than fashion-subset: cats, dogs"):
        evaluation_images(recipe, ("cats", "dogs"))


# --- shards


def shards(folder, **counts):
    pytest.importorskip("webdataset")
    pictures = fill(folder.with_name(f"{folder.name} files"), **counts)
    write_shards(pictures, folder, size=2)
    shutil.rmtree(pictures)


def test_shards_are_opened_with_their_transforms(tmp_path):
    shards(tmp_path / "train", cats=4, dogs=4)
    shards(tmp_path / "val", cats=1, dogs=2)
    fill(tmp_path / "test", dogs=2)
    data = open_data(own(tmp_path))
    assert (len(data.train), len(data.val), len(data.test)) == (8, 3, 2)
    assert len(data.train.transform.transforms) == 1 + len(data.val.transform.transforms)
    assert [label for _, label in data.test.samples] == [1, 1]
    assert data.classes == ("cats", "dogs")
    assert len(evaluation_images(own(tmp_path / "val"), data.classes)) == 3


def test_shards_are_trained_on(tmp_path):
    shards(tmp_path / "train", cats=4, dogs=4)
    shards(tmp_path / "val", cats=1, dogs=2)
    losses, scores = train(own(tmp_path, **SMALL | {"batch_size": 4}))
    assert len(losses) == 2
    assert scores.images == 3


def test_shards_need_images_for_validation(tmp_path):
    shards(tmp_path / "own", cats=1, dogs=1)
    words = r"own holds shards, of which no images can be held out; put them into .*train, and"
    with pytest.raises(ValueError, match=words):
        open_data(own(tmp_path / "own"))


def test_shards_have_no_repeated_draws(tmp_path):
    for part in ("train", "val"):
        shards(tmp_path / part, cats=2, dogs=2)
    with pytest.raises(ValueError, match="repeats must be 1 with shards, not 3"):
        open_data(own(tmp_path, repeats=3))


def test_shards_of_one_class(tmp_path):
    shards(tmp_path / "train", cats=2)
    shards(tmp_path / "val", cats=1)
    with pytest.raises(ValueError, match="has one class, cats: with a single answer"):
        open_data(own(tmp_path))


def test_shards_of_other_classes(tmp_path):
    shards(tmp_path / "train", cats=1, dogs=1)
    shards(tmp_path / "val", cats=1)
    with pytest.raises(ValueError, match="have other classes, or in another order: cats; they mus"):
        open_data(own(tmp_path))


# --- small data, trained on


def train(recipe, steps=2):
    """Open the images, take some steps, and score."""
    data = open_data(recipe)
    classes = len(data.classes)
    torch.manual_seed(0)
    model = create_model(
        recipe.model, num_classes=classes, in_chans=recipe.in_chans, **recipe.model_options
    )
    trainer = build_trainer(recipe, model, steps_per_epoch(len(data.train), recipe))
    losses = list(islice(fit(trainer, data.train), steps))
    assert all(loss > 0 for loss in losses)
    return losses, evaluate(model, data.val)


SMALL = {"workers": 0, "lr": 1e-3, "batch_size": 6}


@pytest.mark.parametrize("channels", [1, 3])
def test_fewer_images_than_a_batch(tmp_path, channels):
    fill(tmp_path, cats=2, dogs=2)
    losses, scores = train(own(tmp_path, in_chans=channels, **SMALL | {"batch_size": 9}))
    assert len(losses) == 2
    assert scores.images == 2


@pytest.mark.filterwarnings("ignore:no images are held out")
def test_one_image_a_class(tmp_path):
    fill(tmp_path, ants=1, bees=1, cats=1)
    losses, scores = train(own(tmp_path, **SMALL | {"epochs": 20, "lr": 5e-3}), steps=20)
    assert losses[-1] < losses[0]
    assert scores.images == 3


@pytest.mark.filterwarnings("ignore:.*compare each accuracy")
def test_one_class_far_larger_than_the_other(tmp_path):
    fill(tmp_path, cats=12, dogs=1)
    _, scores = train(own(tmp_path, **SMALL))
    assert scores.images == 1


@pytest.mark.parametrize("mix", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_odd_batches_are_mixed(tmp_path, mix):
    fill(tmp_path, ants=4, bees=4, cats=4)
    losses, _ = train(own(tmp_path, **SMALL | {"batch_size": 5} | mix))
    assert len(losses) == 2


def test_grey_and_colour_files_are_trained_on_together(tmp_path):
    for name in ("cats", "dogs"):
        for number, mode in enumerate(("L", "RGB", "RGBA", "P")):
            draw(tmp_path / name / f"{number}.png", mode=mode)
    losses, scores = train(own(tmp_path, erasing=0.5, rand_augment=9, **SMALL))
    assert len(losses) == 2
    assert scores.images == 2


def test_a_folder_that_vanishes_while_training(tmp_path):
    fill(tmp_path / "pictures", cats=6, dogs=6)
    recipe = own(tmp_path / "pictures", **SMALL)
    data = open_data(recipe)
    shutil.rmtree(tmp_path / "pictures")
    model = create_model(recipe.model, num_classes=2, in_chans=3, **TINY)
    trainer = build_trainer(recipe, model, steps_per_epoch(len(data.train), recipe))
    with pytest.raises(ValueError, match=r"\.png cannot be read as an image .*No such file"):
        next(fit(trainer, data.train))
    assert trainer.step == 0
