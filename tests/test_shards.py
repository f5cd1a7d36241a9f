"""Shards: what is written, in which order it is read, what a stopped run goes on with."""

import io
import json
import shutil
import sys
import tarfile
from collections import Counter
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from processes import run
from torchvision.transforms import v2

from conformer_src import scaling
from conformer_src.conformer import Conformer, ConformerConfig
from conformer_src.data import image_folder
from conformer_src.files import WeightsError, sha256_of
from conformer_src.recipes import Recipe
from conformer_src.scaling import deal_shards, open_shards, read_shard, stream_keys, write_shards
from conformer_src.training import build_trainer, evaluate, fit, steps_per_epoch

CLASSES = ["boot", "shirt", "trouser"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """23 images in three classes: JPEG and PNG, names with dots, upper case, spaces."""
    root, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    endings = [".jpg", ".PNG", " 1.5.jpeg"]
    for number in range(23):
        path = root / CLASSES[number % 3] / f"{number}{endings[number % len(endings)]}"
        path.parent.mkdir(exist_ok=True)
        pixels = draw.integers(0, 256, (40, 36, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return root


@pytest.fixture(scope="module")
def shards(source, tmp_path_factory):
    """The same in six shards of 3 or 4."""
    folder = tmp_path_factory.mktemp("shards") / "train"
    done = write_shards(str(source), str(folder), size=4)
    assert done == {"folder": str(folder), "shards": 6, "total": 23}
    return folder


@pytest.fixture
def copy(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "copy")


VARIED = v2.Compose(
    [v2.ToImage(), v2.RandomCrop(32), v2.ToDtype(torch.float32, scale=True), v2.RandomErasing(0.5)]
)
PLAIN = v2.Compose([v2.ToImage(), v2.CenterCrop(32), v2.ToDtype(torch.float32, scale=True)])


def process(index, processes):
    """What the loaders ask an accelerator."""
    return SimpleNamespace(process_index=index, num_processes=processes, device=torch.device("cpu"))


def recipe(**changes):
    return Recipe(**{"batch_size": 4, "epochs": 3, "workers": 0, "in_chans": 3, **changes})


def same(one, other):
    """Whether two steps got the same parts, to the last bit."""
    return all(
        images.equal(others) and labels.equal(theirs) and names == their_names
        for (images, labels, names), (others, theirs, their_names) in zip(one, other, strict=True)
    )


@pytest.fixture
def reads(monkeypatch):
    """The names of the shards that are read, in this order."""
    found = []

    def note(address, checksum):
        found.append(address.rpartition("/")[2])
        return read_shard(address, checksum)

    monkeypatch.setattr(scaling, "read_shard", note)
    return found


# --- writing ------------------------------------------------------------------------------------


def test_shards_hold_each_file_byte_for_byte(source, shards):
    images = image_folder(source)
    expected = {
        (Path(path).read_bytes(), label, path[len(str(source)) + 1 :])
        for path, label in images.samples
    }
    listed = json.loads((shards / "shards.json").read_text())
    found = [read_shard(f"{shards}/{s['name']}", s["sha256"]) for s in listed["shards"]]
    assert sorted(map(len, found)) == [3, 4, 4, 4, 4, 4]
    assert set(chain(*found)) == expected
    assert len(list(chain(*found))) == len(expected) == listed["total"] == 23
    assert listed["classes"] == CLASSES == open_shards(shards).classes
    assert len(open_shards(shards)) == 23


def test_webdataset_itself_reads_what_was_written(source, shards):
    import webdataset

    pattern = f"{shards}/{{000000..000005}}.tar"
    found = webdataset.WebDataset(pattern, shardshuffle=False).decode("pil")
    labels = Counter(sample["cls"] for sample in found)
    assert labels == Counter(image_folder(source).targets)
    sizes = {
        (sample.get("png") or sample.get("jpg") or sample.get("jpeg")).size for sample in found
    }
    assert sizes == {(36, 40)}


def test_the_order_is_drawn_by_the_seed_and_the_bytes_are_always_the_same(source, shards, tmp_path):
    write_shards(image_folder(source), tmp_path / "again", size=4)
    write_shards(source, tmp_path / "other", size=4, seed=1)
    sums = [
        [sha256_of(path) for path in sorted(folder.glob("*.tar"))]
        for folder in (shards, tmp_path / "again", tmp_path / "other")
    ]
    assert sums[0] == sums[1]
    assert not set(sums[0]) & set(sums[2])
    labels = [label for _, label, _ in read_shard(f"{shards}/000000.tar", sums[0][0])]
    assert len(set(labels)) > 1  # not class after class, as in the folder


@pytest.mark.parametrize("seen", range(0, 23, 5))
def test_interrupted_writing_goes_on(source, shards, tmp_path, monkeypatch, seen):
    left, encoded = iter(range(seen)), scaling._encoded

    def fail_later(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return encoded(*arguments)

    folder = tmp_path / "shards"
    monkeypatch.setattr(scaling, "_encoded", fail_later)
    with pytest.raises(KeyboardInterrupt):
        write_shards(source, folder, size=4)
    monkeypatch.undo()
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    assert len(before) in (seen // 4, (seen + 1) // 4)
    with pytest.raises(ValueError, match=r"of 23 images, because writing was interrupted; run"):
        open_shards(folder)
    (folder / ".0123456789abcdef.part").write_text("of a process that was killed")
    write_shards(source, folder, size=4)
    for path in shards.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in shards.iterdir()
    )
    assert all((folder / name).stat().st_mtime_ns == time for name, time in before.items())


def test_a_shard_that_is_gone_is_written_again(source, shards, copy):
    (copy / "000002.tar").unlink()
    write_shards(source, copy, size=4)
    assert (copy / "000002.tar").read_bytes() == (shards / "000002.tar").read_bytes()


def test_what_cannot_be_written_is_refused(source, copy, tmp_path):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    for changes in ({"seed": 1}, {"size": 5}):
        with pytest.raises(ValueError, match=r"copy holds shards of other images, or of another"):
            write_shards(source, copy, **{"size": 4, **changes})
    assert before == {path.name: path.read_bytes() for path in copy.iterdir()}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(ValueError, match=r"mine is not empty; give a new folder"):
        write_shards(source, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match=r"^size must be a whole number of at least 1, not 0\.$"):
        write_shards(source, tmp_path / "new", size=0)
    with pytest.raises(ValueError, match=r"^list has no files to copy; give a folder or an Image"):
        write_shards([], tmp_path / "new")
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        write_shards(tmp_path / "nowhere", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_broken_image_is_named_before_it_is_in_a_shard(source, tmp_path):
    images = shutil.copytree(source, tmp_path / "images")
    broken = images / "boot" / "0.jpg"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:600])
    with pytest.raises(ValueError, match=r"^\S+boot/0\.jpg cannot be read as an image \(.+\)\.$"):
        write_shards(images, tmp_path / "shards", size=4)
    broken.write_bytes(whole)
    assert write_shards(images, tmp_path / "shards", size=4)["total"] == 23


def test_a_full_disk_is_said_in_a_sentence_and_nothing_half_written_stays(
    source, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scaling, "sha256_of", full)
    with pytest.raises(WeightsError, match=r"000000\.tar cannot be written \(No space left"):
        write_shards(source, tmp_path / "shards")
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["shards.json"]


def test_without_webdataset_the_sentence_says_what_to_install(
    source, shards, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ValueError, match=r"pip install webdataset$"):
        write_shards(source, tmp_path / "shards")
    with pytest.raises(ValueError, match=r"pip install webdataset$"):
        open_shards(shards)


# --- reading ------------------------------------------------------------------------------------


def test_an_image_is_what_the_folder_gives(source, shards):
    images, sharded = image_folder(source, PLAIN), open_shards(shards, PLAIN)
    places = {path[len(str(source)) + 1 :]: n for n, (path, _) in enumerate(images.samples)}
    for number, size in enumerate(sharded.sizes):
        for place in range(size):
            expected, label = images[places[sharded.sample((number, place))[2]]]
            assert sharded[number, place][0].equal(expected)
            assert sharded[number, place][1] == label


def test_an_address_is_read_by_webdataset(shards):
    first, second = open_shards(f"file://{shards}", PLAIN), open_shards(shards, PLAIN)
    assert first[1, 2][0].equal(second[1, 2][0])
    with pytest.raises(ValueError, match=r"file:/\S+/shards.json cannot be read \(No such file"):
        open_shards(f"file://{shards}-not")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-700])


def flip(path):
    content = bytearray(path.read_bytes())
    content[1500] ^= 1
    path.write_bytes(content)


def exchange(path):
    path.write_bytes(path.with_name("000003.tar").read_bytes())


@pytest.mark.parametrize("spoil", [truncate, flip, exchange])
def test_a_damaged_shard_is_named(copy, spoil):
    spoil(copy / "000002.tar")
    images = open_shards(copy)
    with pytest.raises(ValueError, match=r"^the shard \S+/000002\.tar is damaged; copy or write"):
        images[2, 0]
    assert images[3, 0][1] in range(3)


def test_a_missing_shard_is_named_and_can_be_put_back(copy):
    images = open_shards(copy)
    (copy / "000002.tar").rename(copy / "aside")
    with pytest.raises(ValueError, match=r"^the shard \S+/000002\.tar cannot be read \(No such"):
        images[2, 0]
    (copy / "aside").rename(copy / "000002.tar")
    assert images[2, 0][1] in range(3)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"total": 3, "shards": [{}]}', "7"])
def test_a_damaged_list_is_said(copy, text):
    (copy / "shards.json").write_text(text)
    with pytest.raises(ValueError, match=r"/shards\.json is damaged; copy or write"):
        open_shards(copy)


def test_a_folder_without_a_list_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"shards\.json cannot be read \(No such file.*conformer"):
        open_shards(tmp_path)


def test_an_unreadable_image_in_a_shard_is_named(source, tmp_path, monkeypatch):
    monkeypatch.setattr(scaling, "_decode", lambda *_: None)  # as other programs write shards
    images = shutil.copytree(source, tmp_path / "images")
    (images / "boot" / "0.jpg").write_bytes(b"no image")
    write_shards(images, tmp_path / "shards")
    monkeypatch.undo()
    found = open_shards(tmp_path / "shards")
    with pytest.raises(ValueError, match=r"^boot/0\.jpg in \S+/000000\.tar cannot be read as an"):
        [found[0, place] for place in range(23)]


# --- the order of training ----------------------------------------------------------------------


def test_shards_are_dealt_anew_in_each_epoch_each_to_one_stream():
    first, second, other = (deal_shards(7, 3, *seeds) for seeds in ((0, 0), (0, 1), (1, 0)))
    for dealt in (first, second, other):
        assert sorted(chain(*dealt)) == list(range(7))
        assert sorted(map(len, dealt)) == [2, 2, 3]
    assert first == deal_shards(7, 3, 0, 0)
    assert first not in (second, other)
    with pytest.raises(ValueError, match=r"^2 shards cannot feed 3 streams \(processes x workers"):
        deal_shards(2, 3, 0, 0)


def test_a_stream_takes_all_its_images_before_any_returns_with_another_seed():
    keys = stream_keys([3, 5, 2], [2, 0], recipe(), 0)
    first, second = ([next(keys) for _ in range(5)] for _ in range(2))
    for lap in (first, second):
        assert [shard for (shard, _), _ in lap] == [2, 2, 0, 0, 0]
        assert {index for index, _ in lap} == {(2, 0), (2, 1), (0, 0), (0, 1), (0, 2)}
    assert not {seed for _, seed in first} & {seed for _, seed in second}


@pytest.mark.parametrize("skip", [0, 1, 3, 4, 7, 9, 20, 31])
def test_skipping_keys_is_taking_them_and_throwing_them_away(skip):
    options = [3, 5, 2], [2, 0, 1], recipe(), 4
    taken, skipped = stream_keys(*options), stream_keys(*options, skip)
    for _ in range(skip):
        next(taken)
    assert [next(taken) for _ in range(30)] == [next(skipped) for _ in range(30)]


def steps_of(shards, options, start, index, processes):
    images = open_shards(shards, VARIED)
    return list(images.load_batches(options, start, process(index, processes)))


@pytest.mark.parametrize(
    ("processes", "changes"),
    [
        (1, {}),
        (2, {"accumulate": 2}),
        (3, {"batch_size": 6}),
        (1, {"accumulate": 2, "workers": 2}),
        (2, {"workers": 2}),
    ],
)
def test_resuming_gives_the_same_batches_to_the_last_bit(shards, processes, changes):
    options = recipe(**changes)
    steps = steps_per_epoch(23, options)
    for index in range(processes):
        whole = steps_of(shards, options, 0, index, processes)
        assert len(whole) == 3 * steps  # in each process
        parts = options.accumulate
        assert {len(step) for step in whole} == {parts}
        size = options.batch_size // processes // parts
        assert {len(images) for step in whole for images, *_ in step} == {size}
        starts = (1, steps - 1, steps, 2 * steps + 1) if options.workers else range(3 * steps)
        for start in starts:
            rest = steps_of(shards, options, start, index, processes)
            assert all(same(*pair) for pair in zip(rest, whole[start:], strict=True))
        assert not same(whole[0], whole[steps])  # another order in another epoch


def test_no_image_comes_twice_in_an_epoch_that_streams_share_evenly(shards):
    options, seen = recipe(batch_size=6, epochs=2), []
    for index in range(3):  # two shards each, at least 7 images, of which each takes 6
        seen.append([names for [(_, _, names)] in steps_of(shards, options, 0, index, 3)])
    for epoch in range(2):
        names = [name for own in seen for part in own[3 * epoch : 3 * epoch + 3] for name in part]
        assert len(names) == len(set(names)) == 18


def test_transforms_are_drawn_by_the_seed_of_a_sample(shards):
    torch.manual_seed(1)
    first = steps_of(shards, recipe(), 0, 0, 1)
    torch.manual_seed(2)
    assert all(same(*pair) for pair in zip(first, steps_of(shards, recipe(), 0, 0, 1), strict=True))
    assert not same(first[0], steps_of(shards, recipe(seed=1), 0, 0, 1)[0])


def test_each_shard_is_read_once_and_none_before_the_start(shards, reads):
    options = recipe(epochs=1)
    steps_of(shards, options, 0, 0, 1)
    assert len(reads) == len(set(reads)) >= 5  # 20 of 23 images make five batches
    whole = list(reads)
    reads.clear()
    steps_of(shards, options, 3, 0, 1)  # 12 of 23 images are skipped
    assert reads == whole[-len(reads) :]
    assert len(reads) < 4


def test_a_batch_that_cannot_be_dealt_out_is_refused(shards):
    with pytest.raises(ValueError, match=r"^batch_size 4 must be a multiple of 3"):
        steps_of(shards, recipe(), 0, 0, 3)
    with pytest.raises(ValueError, match=r"^6 shards cannot feed 8 streams"):
        steps_of(shards, recipe(workers=2), 0, 0, 4)


def test_a_worker_names_the_shard_that_is_gone(copy):
    images = open_shards(copy, VARIED)
    (copy / "000002.tar").unlink()
    with pytest.raises(ValueError, match=r"the shard \S+/000002\.tar cannot be read"):
        list(images.load_batches(recipe(workers=1), 0, process(0, 1)))


# --- scores -------------------------------------------------------------------------------------


def build():
    torch.manual_seed(0)
    shape = {"patch_size": 8, "channel_ratio": 0.25, "embed_dim": 24, "depth": 3, "num_heads": 3}
    return Conformer(ConformerConfig(**shape, stem="small", num_classes=3))


def evaluated(shards, processes, workers=0, size=3):
    """By number: images, labels and names of a batch, over all processes."""
    found, counts = {}, set()
    for index in range(processes):
        images = open_shards(shards, PLAIN)
        loader, numbers = images.evaluation_batches(process(index, processes), size, workers)
        batches = list(loader)
        counts.add(len(batches))
        found.update(zip(numbers, batches, strict=True))
    assert len(counts) == 1  # in step
    return found


@pytest.mark.parametrize(
    ("processes", "workers"), [(1, 0), (1, 2), (2, 0), (2, 2), (4, 0), (6, 1), (9, 0)]
)
def test_the_batches_of_an_evaluation_do_not_depend_on_processes(shards, processes, workers):
    expected = evaluated(shards, 1)
    found = evaluated(shards, processes, workers)
    assert sorted(found) == list(range(11))  # 5 shards of 4 make two batches each, one of 3 one
    assert sorted(name for *_, names in found.values() for name in names) == sorted(
        name for *_, names in expected.values() for name in names
    )
    assert all(same([found[number]], [expected[number]]) for number in expected)


def test_workers_of_an_evaluation_read_a_shard_each(shards):
    numbers, keys = scaling._evaluation_share([4] * 6, 2, 0, 1, 3)
    assert sorted(numbers) == list(range(12))
    for worker in range(3):
        order = [key[0][0] for part in keys[worker::3] for key in part]
        assert order == sorted(order)
        assert len(set(order)) == 2


def score(shards):
    return evaluate(build(), open_shards(shards, PLAIN), Accelerator(), batch_size=3)


def test_scores_are_those_of_the_folder_on_one_and_on_two_processes(source, shards):
    folder = evaluate(build(), image_folder(source, PLAIN), Accelerator(), batch_size=3)
    [alone] = run(1, score, shards)
    assert run(2, score, shards) == [alone, alone]
    assert alone._replace(loss=0) == folder._replace(loss=0)
    assert alone.loss == pytest.approx(folder.loss)


# --- training -----------------------------------------------------------------------------------


def train(shards, stop, saved):
    """Train in this process of several; return the names that were seen, and the weights."""
    from conformer_src.checkpoints import collect, restore

    images, options, seen = open_shards(shards, VARIED), recipe(batch_size=4, epochs=2), []
    trainer = build_trainer(options, build(), steps_per_epoch(len(images), options))
    if saved:
        restore(trainer, torch.load(io.BytesIO(saved), weights_only=True))
    for _ in fit(trainer, images):
        seen.append(trainer.step)
        if trainer.step == stop:
            break
    buffer = io.BytesIO()
    torch.save(collect(trainer), buffer)
    return seen, buffer.getvalue()


def test_two_processes_train_on_shards_and_go_on_to_the_same_bits(shards):
    whole, weights = run(2, train, shards, 8, None)[0]
    assert whole == list(range(1, 9))
    _, kept = run(2, train, shards, 3, None)[0]
    rest, resumed = run(2, train, shards, 8, kept)[0]
    assert rest == list(range(4, 9))
    one, other = (torch.load(io.BytesIO(each), weights_only=True) for each in (weights, resumed))
    assert all(tensor.equal(other["model"][name]) for name, tensor in one["model"].items())
    alone, _ = run(1, train, shards, 8, kept)[0]  # goes on at the same step
    assert alone == list(range(4, 9))


def test_a_shard_is_a_plain_tar(shards):
    with tarfile.open(shards / "000000.tar") as tar:
        names = tar.getnames()
    assert names[0] == "000000000.cls"
    assert len(names) == 3 * 3
