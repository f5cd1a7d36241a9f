"""Data sets, transforms and what happens to bad input."""

import gzip
import hashlib
import itertools
import shutil

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets

from conformer_src import data


@pytest.fixture
def assets(tmp_path, monkeypatch):
    """A copy of the shipped files that a test may damage."""
    package = tmp_path / "package"
    shutil.copytree(data.files("conformer_src") / "assets", package / "assets")
    monkeypatch.setattr(data, "files", lambda _: package)
    return package / "assets"


@pytest.fixture
def pictures(tmp_path):
    """Two classes of three pictures each."""
    for name, colour in (("cats", "red"), ("dogs", "blue")):
        (tmp_path / "own" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (20, 10), colour).save(tmp_path / "own" / name / f"{number}.png")
    return tmp_path / "own"


# --- the shipped subset


@pytest.mark.parametrize(("train", "count"), [(True, 10_000), (False, 2_000)])
def test_subset_is_stratified(train, count):
    subset = data.FashionSubset(train)
    assert subset.images.shape == (count, 1, 28, 28)
    assert subset.images.dtype == torch.uint8
    assert subset.labels.bincount().tolist() == [count // 10] * 10
    assert len(subset) == count
    assert len(subset.classes) == 10


def test_subset_is_not_chosen_by_a_string():
    with pytest.raises(TypeError, match="train is 'test'; give True for the training images"):
        data.FashionSubset("test")


def test_subset_fits_the_budget():
    sheets = (data.files("conformer_src") / "assets").glob("fashion_*.png")
    assert sum(path.stat().st_size for path in sheets) <= 5e6


def test_subset_feeds_a_loader():
    subset = data.FashionSubset(train=False, transform=data.fashion_transform(train=True))
    images, labels = next(iter(DataLoader(subset, batch_size=8)))
    assert images.shape == (8, 1, 32, 32)
    data.check_batch(images, labels, in_chans=1, num_classes=10)


def test_subset_test_images_are_not_in_the_training_images():
    def hashes(train):
        images = data.FashionSubset(train).images
        return {hashlib.sha256(image.numpy().tobytes()).digest() for image in images}

    assert not hashes(True) & hashes(False)


def test_missing_sheet(assets):
    (assets / "fashion_test.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"fashion_test\.png is missing\. Reinstall"):
        data.FashionSubset(train=False)


@pytest.mark.parametrize("keep", [0, 10, 5_000, 700_000])
def test_truncated_sheet(assets, keep):
    sheet = assets / "fashion_test.png"
    sheet.write_bytes(sheet.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"fashion_test\.png cannot be read .* Reinstall"):
        data.FashionSubset(train=False)


def test_altered_sheet(assets):
    with Image.open(assets / "fashion_test.png") as image:
        sheet = image.copy()
    sheet.putpixel((100, 100), 255 - sheet.getpixel((100, 100)))
    sheet.save(assets / "fashion_test.png")
    with pytest.raises(ValueError, match="was altered"):
        data.FashionSubset(train=False)


def test_sheet_of_another_size(assets):
    Image.new("L", (30, 30)).save(assets / "fashion_test.png")
    with pytest.raises(ValueError, match="was altered"):
        data.FashionSubset(train=False)


# --- the full set


@pytest.fixture(scope="session")
def debian_root(tmp_path_factory):
    """A root filled from Debian's package."""
    if not data._DEBIAN.is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    root = tmp_path_factory.mktemp("fashion")
    data.fashion_mnist(root=root, download=False)
    return root


def test_debian_files_are_found(debian_root):
    train = data.fashion_mnist(train=True, root=debian_root, download=False)
    test = data.fashion_mnist(train=False, root=debian_root, download=False)
    assert train.data.shape == (60_000, 28, 28)
    assert test.data.shape == (10_000, 28, 28)
    assert sorted(p.name for p in debian_root.iterdir()) == ["FashionMNIST"]  # no scratch left


@pytest.mark.parametrize("train", [True, False])
def test_shipped_subset_is_part_of_the_full_set(debian_root, train):
    full = data.fashion_mnist(train=train, root=debian_root, download=False)
    subset = data.FashionSubset(train)
    count = len(subset) // 10
    chosen = torch.cat([torch.nonzero(full.targets == c).flatten()[:count] for c in range(10)])
    assert torch.equal(full.data[chosen], subset.images[:, 0])
    assert torch.equal(full.targets[chosen], subset.labels)


def test_an_existing_root_comes_first(debian_root, monkeypatch):
    monkeypatch.setattr(data, "_unpack_debian", lambda raw: pytest.fail("looked at Debian"))
    monkeypatch.setattr(datasets.FashionMNIST, "download", lambda self: pytest.fail("downloaded"))
    assert len(data.fashion_mnist(train=False, root=debian_root)) == 10_000


def test_damaged_root(debian_root, tmp_path):
    shutil.copytree(debian_root, tmp_path / "copy")
    labels = tmp_path / "copy/FashionMNIST/raw/t10k-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"t10k-labels-idx1-ubyte is damaged.* Delete the folder"):
        data.fashion_mnist(train=False, root=tmp_path / "copy")


@pytest.mark.parametrize("download", [True, False])
def test_nothing_found_names_all_three(tmp_path, monkeypatch, download):
    def offline(self):
        (data.Path(self.raw_folder)).mkdir(parents=True, exist_ok=True)
        (data.Path(self.raw_folder) / "train-images-idx3-ubyte.gz").write_bytes(b"half")
        raise RuntimeError("Error downloading")

    monkeypatch.setattr(data, "_DEBIAN", tmp_path / "nowhere")
    monkeypatch.setattr(datasets.FashionMNIST, "download", offline)
    with pytest.raises(FileNotFoundError) as caught:
        data.fashion_mnist(root=tmp_path / "root", download=download)
    message = str(caught.value)
    assert "no complete set in" in message
    assert "dataset-fashion-mnist is not installed" in message
    assert ("the download failed" if download else "download=False") in message
    assert list((tmp_path / "root").rglob("*")) == []  # nothing half-written


def test_download_is_unpacked_and_checked(debian_root, tmp_path, monkeypatch):
    def download(self):
        raw = data.Path(self.raw_folder)
        raw.mkdir(parents=True, exist_ok=True)
        for name in data._FASHION_FILES:
            content = (debian_root / "FashionMNIST/raw" / name).read_bytes()
            (raw / name).write_bytes(content)
            (raw / f"{name}.gz").write_bytes(gzip.compress(b"archive"))

    monkeypatch.setattr(data, "_DEBIAN", tmp_path / "nowhere")
    monkeypatch.setattr(datasets.FashionMNIST, "download", download)
    full = data.fashion_mnist(train=False, root=tmp_path / "root")
    assert len(full) == 10_000
    names = sorted(path.name for path in (tmp_path / "root/FashionMNIST/raw").iterdir())
    assert names == sorted(data._FASHION_FILES)


def test_altered_debian_file_is_refused(debian_root, tmp_path, monkeypatch):
    fake = tmp_path / "debian"
    fake.mkdir()
    for name in data._FASHION_FILES:
        (fake / f"{name}.gz").write_bytes(gzip.compress(b"not the data"))
    monkeypatch.setattr(data, "_DEBIAN", fake)
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte\.gz is damaged.*Mend"):
        data.fashion_mnist(root=tmp_path / "root", download=False)
    assert list((tmp_path / "root").rglob("*")) == []


@pytest.mark.parametrize(
    "content",
    [b"", b"no archive", gzip.compress(b"x" * 999)[:-9]],
    ids=["empty", "no archive", "cut short"],  # a gzip header holds the time: no name for a test
)
def test_broken_debian_archive_is_one_sentence(tmp_path, monkeypatch, content):
    for name in data._FASHION_FILES:
        (tmp_path / f"{name}.gz").write_bytes(content)
    monkeypatch.setattr(data, "_DEBIAN", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"ubyte\.gz (cannot be read|is damaged)") as caught:
        data.fashion_mnist(root=tmp_path / "root", download=False)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "root").rglob("*")) == []


def test_damaged_download_is_refused(tmp_path, monkeypatch):
    def download(self):
        raw = data.Path(self.raw_folder)
        raw.mkdir(parents=True, exist_ok=True)
        for name in data._FASHION_FILES:
            (raw / name).write_bytes(b"half")

    monkeypatch.setattr(data, "_DEBIAN", tmp_path / "nowhere")
    monkeypatch.setattr(datasets.FashionMNIST, "download", download)
    monkeypatch.setattr(datasets.FashionMNIST, "_load_data", lambda self: (None, None))
    with pytest.raises(FileNotFoundError, match=r"the download is damaged \(train-images"):
        data.fashion_mnist(root=tmp_path / "root")
    assert list((tmp_path / "root").rglob("*")) == []


def test_root_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"cannot be stored in .*file.*another folder with root="):
            data.fashion_mnist(root=root, download=False)


@pytest.fixture
def small_set(tmp_path, monkeypatch):
    """Four small files in the place of Debian's."""
    monkeypatch.setattr(data, "_DEBIAN", tmp_path / "debian")
    (tmp_path / "debian").mkdir()
    for name in data._FASHION_FILES:
        (tmp_path / "debian" / f"{name}.gz").write_bytes(gzip.compress(name.encode()))
    sums = {name: hashlib.sha256(name.encode()).hexdigest() for name in data._FASHION_FILES}
    monkeypatch.setattr(data, "_FASHION_FILES", sums)
    return tmp_path / "root"


def test_full_disk_leaves_nothing(small_set, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"cannot be stored in .*No space left.*Make room"):
        data._install_fashion(small_set, download=False)
    assert list(small_set.rglob("*")) == []


@pytest.mark.parametrize("after", [0, 2])
def test_interruption_leaves_no_scratch_and_is_mended_by_the_next_call(
    small_set, monkeypatch, after
):
    replace, moved = data.os.replace, []

    def interrupted(source, target):
        if len(moved) == after:
            raise KeyboardInterrupt
        moved.append(target)
        replace(source, target)

    raw = small_set / "FashionMNIST" / "raw"
    with monkeypatch.context() as patch:
        patch.setattr(data.os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            data._install_fashion(small_set, download=False)
    assert [path.name for path in small_set.iterdir()] == ["FashionMNIST"]
    assert not data._fashion_is_whole(raw)
    data._install_fashion(small_set, download=False)
    assert data._fashion_is_whole(raw)


# --- own images


def test_image_folder(pictures):
    dataset = data.image_folder(pictures, data.photo_transform(train=False, size=32))
    image, label = dataset[5]
    assert image.shape == (3, 32, 32)
    assert (label, dataset.classes) == (1, ["cats", "dogs"])


def test_corrupt_image_is_named_when_refused(pictures):
    (pictures / "cats/1.png").write_bytes(b"no picture")
    dataset = data.image_folder(pictures)
    assert len(dataset) == 6
    with pytest.raises(ValueError, match=r'cats.1\.png cannot be read.*corrupt="skip"'):
        dataset[1]


def test_corrupt_image_is_named_when_skipped(pictures):
    (pictures / "cats/1.png").write_bytes(b"no picture")
    content = (pictures / "dogs/2.png").read_bytes()
    (pictures / "dogs/2.png").write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match=r"left out 2 of 6 files, unreadable: .*1\.png, .*2\.png"):
        dataset = data.image_folder(pictures, corrupt="skip")
    assert dataset.targets == [0, 0, 1, 1]
    assert [label for _, label in dataset] == [0, 0, 1, 1]


def test_class_of_corrupt_images_only(pictures):
    for path in (pictures / "cats").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match='No image of class "cats" can be read'):
        data.image_folder(pictures, corrupt="skip")


def test_message_names_a_file_of_the_unreadable_class(pictures):
    for path in [pictures / "cats/0.png", *(pictures / "dogs").iterdir()]:
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r'class "dogs" can be read; the first is .*dogs.0\.png'):
        data.image_folder(pictures, corrupt="skip")


def test_many_unreadable_files_are_counted_and_ten_named(pictures):
    for number in range(100, 130):
        (pictures / f"cats/{number}.jpg").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"left out 30 of 36 files.* and 20 more$") as caught:
        assert len(data.image_folder(pictures, corrupt="skip")) == 6
    assert str(caught[0].message).count(".jpg") == 10
    assert caught[0].filename == __file__  # it points at the caller's line


def test_hidden_files_and_folders_do_not_count(pictures):
    (pictures / ".ipynb_checkpoints").mkdir()
    shutil.copytree(pictures / "cats", pictures / "cats/.ipynb_checkpoints")
    (pictures / "cats/._0.png").write_bytes(b"left by macOS")
    dataset = data.image_folder(pictures)
    assert (dataset.classes, dataset.targets) == (["cats", "dogs"], [0, 0, 0, 1, 1, 1])
    hidden = pictures.rename(pictures.parent / ".own")
    assert len(data.image_folder(hidden)) == 6  # where the folder itself lies plays no part


def test_linked_folders_are_followed(pictures, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/all").symlink_to(pictures / "cats", target_is_directory=True)
    (tmp_path / "linked/nested").mkdir()
    (tmp_path / "linked/nested/below").symlink_to(pictures / "dogs", target_is_directory=True)
    assert data.image_folder(tmp_path / "linked").targets == [0, 0, 0, 1, 1, 1]


def test_a_folder_named_like_a_picture_is_no_picture(tmp_path):
    (tmp_path / "cats/1.png").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="cats holds no images"):
        data.image_folder(tmp_path)


def test_huge_image_counts_as_unreadable(pictures, monkeypatch):
    Image.new("RGB", (100, 100)).save(pictures / "cats/1.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)
    with pytest.raises(ValueError, match=r"1\.png cannot be read .*exceeds limit"):
        data.image_folder(pictures)[1]


def test_sixteen_bits_keep_their_shades(tmp_path):
    (tmp_path / "a").mkdir()
    shades = torch.tensor([[0, 257 * 100, 65_535]], dtype=torch.uint16)
    Image.fromarray(shades.numpy()).save(tmp_path / "a/1.png")
    image, _ = data.image_folder(tmp_path)[0]
    assert [image.getpixel((column, 0))[0] for column in range(3)] == [0, 100, 255]


def test_unknown_choice(pictures):
    with pytest.raises(ValueError, match='corrupt is "ignore"; choose "refuse" or "skip"'):
        data.image_folder(pictures, corrupt="ignore")


def test_folders_without_images(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere"):
        data.image_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no sub-folders"):
        data.image_folder(tmp_path)
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats/notes.txt").write_text("no image")
    with pytest.raises(FileNotFoundError, match=r"cats holds no images \(.jpg"):
        data.image_folder(tmp_path)


def test_rotated_photograph_is_turned_upright(tmp_path):
    (tmp_path / "a").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter
    Image.new("L", (20, 10)).save(tmp_path / "a/1.jpg", exif=exif)
    image, _ = data.image_folder(tmp_path)[0]
    assert (image.mode, image.size) == ("RGB", (10, 20))


# --- transforms


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK", "P"])
def test_photo_transform_takes_any_image(train, mode):
    image = data.photo_transform(train)(Image.new("RGB", (300, 260)).convert(mode))
    assert image.shape == (3, 224, 224)
    assert image.dtype == torch.float32


def test_evaluation_transform_is_the_recipe():
    resize, crop = data.photo_transform(train=False).transforms[2:4]
    assert (resize.size, crop.size) == ([256], (224, 224))


def test_normalised_fashion_has_mean_zero_and_deviation_one():
    images = data.FashionSubset().images
    inside = data.fashion_transform(train=False)(images)[:, :, 2:-2, 2:-2]
    assert abs(inside.mean().item()) < 0.01
    assert abs(inside.std().item() - 1) < 0.01


# --- the drawn set


def test_drawn_set_is_made_by_its_seed():
    first, again, other = (data.local_global(50, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.images, other.images)
    assert first.images.shape == (50, 1, 64, 64)
    assert first.images.dtype == torch.float32


def test_drawing_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    data.local_global(5)
    assert torch.equal(torch.get_rng_state(), before)


def test_both_cues_are_balanced_and_independent():
    drawn = data.local_global(8_000)
    counts = drawn.additive_label().bincount(minlength=8)
    assert counts.min() > 900  # 1,000 expected, standard deviation 30
    assert counts.max() < 1_100


def test_a_detector_of_each_cue_reads_it():
    """The cues are in the pixels: matched filters read them almost without error."""
    drawn = data.local_global(400, seed=3)
    corner = torch.zeros(5, 5)
    corner[:, 0] = corner[4, :] = 1
    filters = torch.stack([(corner - corner.mean()).rot90(k) for k in range(4)])[:, None]
    middle = drawn.images[:, :, :, 12:52]
    answer = torch.nn.functional.conv2d(middle, filters).flatten(2)
    rotation = answer.topk(4).values.sum(2).argmax(1)
    assert (rotation == drawn.rotation).float().mean() > 0.9
    columns = drawn.images[:, 0].mean(1) - drawn.images[:, 0].median(1).values
    left, right = columns[:, :10].sum(1), columns[:, -10:].sum(1)
    assert ((left * right > 0).long() == drawn.agreement).float().mean() > 0.8


def test_no_sum_of_two_opinions_solves_the_coupled_label():
    """Scores f[class, rotation] + g[class, agreement] get at most 7 of the 8 combinations right."""
    cells = list(itertools.product(range(4), range(2)))
    drawn = data.LocalGlobal(torch.empty(0), *torch.tensor(cells).unbind(1))
    target = drawn.coupled_label()
    local = torch.nn.functional.one_hot(torch.tensor([r for r, _ in cells]), 4).double()
    far = torch.nn.functional.one_hot(torch.tensor([g for _, g in cells]), 2).double()
    cues = torch.cat([local, far], 1)
    best = 0
    for seed in range(20):
        torch.manual_seed(seed)
        weights = torch.randn(6, 4, dtype=torch.double, requires_grad=True)
        optimiser = torch.optim.Adam([weights], 0.1)
        for _ in range(200):
            scores = cues @ weights
            loss = torch.nn.functional.cross_entropy(scores, target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            best = max(best, int((scores.argmax(1) == target).sum()))
    assert best == 7


def test_labels():
    drawn = data.LocalGlobal(torch.empty(0), torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 1, 1]))
    assert drawn.additive_label().tolist() == [0, 3, 5, 7]
    assert drawn.coupled_label().tolist() == [0, 0, 3, 3]


@pytest.mark.parametrize(("count", "size"), [(0, 64), (-1, 64), (1, 47), (1e3, 64), (1, 64.0)])
def test_drawn_set_refuses_sizes_that_do_not_fit(count, size):
    with pytest.raises(ValueError, match="at least 1 image of at least 48 pixels"):
        data.local_global(count, size=size)


# --- batches


GOOD = torch.zeros(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize(
    ("images", "labels", "error", "words"),
    [
        (GOOD[0].to(torch.uint8), GOOD[1], TypeError, "images are torch.uint8; convert"),
        (GOOD[0].numpy(), GOOD[1], TypeError, "images and labels must both be tensors"),
        (GOOD[0], [0, 1, 2, 3], TypeError, "images and labels must both be tensors"),
        (GOOD[0][0], GOOD[1], ValueError, r"images are \(1, 8, 8\); expected \(B, 1, H, W\)"),
        (GOOD[0].expand(4, 3, 8, 8), GOOD[1], ValueError, r"images are \(4, 3, 8, 8\)"),
        (GOOD[0], GOOD[1].float(), TypeError, "labels are torch.float32; class numbers are int64"),
        (GOOD[0], GOOD[1][:3], ValueError, r"labels are \(3,\); expected \(4,\)"),
        (GOOD[0], GOOD[1] + 1, ValueError, "label 4 is not among the 4 classes 0 to 3"),
        (GOOD[0], GOOD[1] - 1, ValueError, "label -1 is not among"),
    ],
)
def test_bad_batches(images, labels, error, words):
    data.check_batch(*GOOD, in_chans=1, num_classes=4)
    with pytest.raises(error, match=words):
        data.check_batch(images, labels, in_chans=1, num_classes=4)


# --- photographs and pictures


@pytest.mark.parametrize("name", data.PHOTOGRAPHS)
def test_photographs(name):
    image = data.photograph(name, size=64)
    assert image.shape == (3, 64, 64)
    assert 0 <= image.min() < 0.2
    assert 0.8 < image.max() <= 1


def test_unknown_photograph():
    with pytest.raises(ValueError, match='no photograph "dog"; there are cat, coffee'):
        data.photograph("dog")


@pytest.mark.parametrize("damage", [None, b"", b"no picture", 5_000])
def test_missing_and_broken_photograph(assets, damage):
    path = assets / "cat.jpg"
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:damage] if isinstance(damage, int) else damage)
    error, words = (FileNotFoundError, "missing") if damage is None else (ValueError, "cannot be")
    with pytest.raises(error, match=rf"cat\.jpg .*{words}.*Reinstall"):
        data.photograph("cat")


@pytest.mark.parametrize("size", [0, -3, 3.5, (3, 4), "64"])
def test_sizes_that_are_no_number_of_pixels(size):
    for call in (lambda: data.photograph("cat", size), lambda: data.photo_transform(True, size)):
        with pytest.raises(ValueError, match=r"size is .*; give the side of a square"):
            call()


@pytest.mark.parametrize(
    ("count", "titles"), [(0, None), (2, ["a"]), (1, ["a", "b"])], ids=["none", "few", "many"]
)
def test_show_images_wants_a_title_each(count, titles):
    with pytest.raises(ValueError, match=f"{count} images and .*; give at least one image"):
        data.show_images([torch.rand(8, 8)] * count, titles)


def test_show_images():
    data.show_images([torch.rand(3, 8, 8), torch.rand(1, 8, 8), torch.rand(8, 8)], ["a", "b", "c"])
    assert [axis.get_title() for axis in plt.gcf().axes] == ["a", "b", "c"]
    plt.close()
