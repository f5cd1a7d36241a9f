"""Files of weights: refused in one sentence, written whole or not at all, fetched without loss."""

import argparse
import errno
import hashlib
import os
import sys
import threading
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from file_server import fetched, serving
from safetensors.torch import save_file

from conformer_src import files
from conformer_src.files import WeightsError, digest, fetch, read_file, sha256_of, written_whole

TENSORS = {
    "b": torch.arange(6.0).reshape(2, 3),
    "a": torch.tensor(7),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "none": torch.zeros(0, 4),
    "bytes": torch.arange(5, dtype=torch.uint8),
}


def refused(path, words, call=read_file):
    with pytest.raises(WeightsError, match=words) as error:
        call(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def as_torch(path, content=TENSORS):
    torch.save(content, path)
    return path


def as_safetensors(path, notes=None):
    save_file(TENSORS, path, notes)
    return path


def same(found, expected=TENSORS):
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, dict(expected), rtol=0, atol=0)


# Reading


@pytest.mark.parametrize("as_type", [str, Path])
@pytest.mark.parametrize("write", [as_torch, as_safetensors])
def test_both_kinds_are_read_whatever_they_are_called(write, as_type, tmp_path):
    for name in ("a.pth", "a.safetensors", "a"):
        content, notes = read_file(as_type(write(tmp_path / name)))
        same(content)
        assert notes == {}


def test_notes_are_returned_and_the_checksum_is_compared(tmp_path):
    notes = {"config": "{}", "package": "me", "sha256": digest(TENSORS, "{}")}
    content, found = read_file(as_safetensors(tmp_path / "a", notes))
    same(content)
    assert found == notes
    for change in ({"config": "{ }"}, {"sha256": "0" * 64}):
        refused(
            as_safetensors(tmp_path / "b", notes | change), "its values are not those that were"
        )
    del notes["sha256"]
    refused(as_safetensors(tmp_path / "c", notes), "is damaged: its values are not those")


def test_what_was_read_does_not_hang_on_the_file(tmp_path):
    for write in (as_torch, as_safetensors):
        path = write(tmp_path / "a")
        content, _ = read_file(path)
        with path.open("r+b") as stream:
            stream.truncate(10)
        same(content)
        content["b"].zero_()  # it can be written to


def test_nested_content_and_the_authors_options_are_read(tmp_path):
    options = argparse.Namespace(lr=0.001, data="images")
    content = {"model": OrderedDict(TENSORS), "epoch": 3, "args": options, "list": [1, (2.0, None)]}
    found, _ = read_file(as_torch(tmp_path / "a", content))
    same(found["model"])
    assert (found["args"], found["epoch"], found["list"]) == (options, 3, [1, (2.0, None)])


def test_nothing_stays_allowed_after_reading(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    read_file(as_torch(tmp_path / "a", {"args": argparse.Namespace()}))
    assert set(torch.serialization.get_safe_globals()) == before


class Trap:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (os.system, ("touch {}",)),
        (exec, ("open({!r}, 'w')",)),
        (eval, ("open({!r}, 'w')",)),
        (open, ("{}", "w")),
        (Path.touch, (Path("{}"),)),
    ],
)
@pytest.mark.parametrize("place", ["args", "model", "state_dict", None])
def test_a_pickle_that_would_run_something_is_refused(function, arguments, place, tmp_path):
    trace = tmp_path / "it_ran"
    fill = [type(a)(str(a).replace("{!r}", repr(str(trace))).replace("{}", str(trace)))
            for a in arguments]  # fmt: skip
    trap = Trap(function, *fill)
    path = as_torch(tmp_path / "a.pth", {"model": TENSORS, place: trap} if place else trap)
    refused(path, "holds more than weights and was not opened .*; if you trust its source, load it")
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the trap does work
    assert trace.exists()


def test_what_a_pickle_asks_for_is_named(tmp_path):
    refused(as_torch(tmp_path / "a", Trap(os.getcwd)), r"\(it asks for posix\.getcwd\)")


def halved(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def web_page(path):
    path.write_bytes(b"\xef\xbb\xbf\n  <!DOCTYPE html><html><body>Not found</body></html>")


def pointer(path):
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n")


def removed(path):
    path.unlink()


def folder(path):
    path.unlink()
    path.mkdir()


def other_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/notes.txt", "hello")


def compressed(path):
    with zipfile.ZipFile(path) as source:
        parts = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)


def flipped(path):
    raw = bytearray(path.read_bytes())
    raw[raw.find(TENSORS["b"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(raw)


def legacy(path):
    torch.save(TENSORS, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (emptied, "is empty; fetch it again"),
        (web_page, "is a web page, not weights: the server answered with an error or a form;"),
        (pointer, "is neither a safetensors file nor a zip archive as torch.save has written"),
        (removed, "^there is no file .*; give the path of a .pth or .safetensors file"),
        (folder, "^there is no file"),
        (other_zip, "holds more than weights and was not opened"),
        (legacy, "is neither a safetensors file nor a zip .*; if an older torch wrote it, load it"),
    ],
)
@pytest.mark.parametrize("write", [as_torch, as_safetensors])
def test_what_is_no_file_of_weights_is_said(write, spoil, words, tmp_path):
    path = write(tmp_path / "a.pth")
    spoil(path)
    refused(path, words)


@pytest.mark.parametrize(
    ("write", "spoil"),
    [(as_torch, halved), (as_torch, flipped), (as_torch, compressed), (as_safetensors, halved)],
)
def test_damage_is_said(write, spoil, tmp_path):
    path = write(tmp_path / "a.pth")
    spoil(path)
    refused(path, r"is damaged \(.*\); fetch it again\.$")


@pytest.fixture
def nobody():
    """Have no more rights than anybody, if the tests run as root."""
    if not hasattr(os, "geteuid"):
        pytest.skip("this system knows no rights of this kind")
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.fixture
def shared(tmp_path):
    """A folder that everybody can enter."""
    for part in (tmp_path, *tmp_path.parents):
        if "pytest-of-" not in str(part):  # pytest's own folders, and not what they lie in
            break
        part.chmod(0o755)
    return tmp_path


def test_a_file_that_must_not_be_read_is_said(shared, request):
    path = as_torch(shared / "a.pth")
    path.chmod(0)
    request.getfixturevalue("nobody")
    refused(path, r"cannot be opened \(Permission denied\); allow reading")


# Writing


def write(path, size=100_000):
    with written_whole(path) as temporary:
        temporary.write_bytes(b"1" * size)


def test_a_file_appears_in_one_step(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with written_whole(str(path)) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_others_may_read_what_is_written(tmp_path):
    (tmp_path / "usual").touch()
    write(tmp_path / "a")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("error", [KeyboardInterrupt, TypeError, MemoryError])
def test_other_errors_pass_and_leave_no_trace(error, tmp_path):
    def stopped():
        with written_whole(tmp_path / "a") as temporary:
            temporary.write_bytes(b"new")
            raise error

    with pytest.raises(error):
        stopped()
    assert not any(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_said(tmp_path):
    refused(tmp_path / "no/a", r"cannot be written \(No such file or directory\); make", call=write)


def test_a_folder_that_must_not_be_written_to_is_said(shared, nobody):
    refused(shared / "a", r"cannot be written \(Permission denied\)", call=write)


def with_torch(path):
    with written_whole(path) as temporary:
        torch.save(torch.zeros(100_000), temporary)


def with_safetensors(path):
    with written_whole(path) as temporary:
        save_file({"a": torch.zeros(100_000)}, temporary)


@pytest.fixture
def full_disk():
    """Let each write beyond 50,000 bytes of a file fail, as on a full disk."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("call", [write, with_torch, with_safetensors])
def test_a_full_disk_is_said_and_the_old_file_stays(call, tmp_path, full_disk):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    refused(path, r"cannot be written \(.+\); make room, allow writing, or choose", call=call)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# Fetching


@pytest.fixture(autouse=True)
def _direct(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server():
    with serving() as server:
        yield server


@pytest.fixture
def body(tmp_path):
    return as_torch(tmp_path / "made", {"a": torch.rand(300_000)}).read_bytes()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub/checkpoints"


def hashed(body, digits=8):
    return f"net-{hashlib.sha256(body).hexdigest()[:digits]}.pth"


@pytest.mark.parametrize("digits", [8, 64])
def test_a_file_is_fetched_once_into_the_folder_of_torch_hub(digits, server, body, cache):
    name = hashed(body, digits)
    server.files[name] = body
    path = fetch(server.url(name))
    assert path == cache / name
    assert path.read_bytes() == body
    assert fetch(server.url(name)) == path
    assert server.asked == [None]
    assert fetched(cache) == [name]


def test_a_folder_can_be_given(server, body, tmp_path, cache):
    name = hashed(body)
    server.files[name] = body
    assert fetch(server.url(name), str(tmp_path / "b")) == tmp_path / "b" / name
    assert not cache.exists()


def test_names_without_a_hash_belong_to_their_address(server, body, cache):
    server.files |= {"a/model.safetensors": body, "b/model.safetensors": body[::-1]}
    server.files["b/model.safetensors"] = b"PK" + body
    one, two = (fetch(server.url(f"{part}/model.safetensors?download=true")) for part in "ab")
    assert (one.read_bytes(), two.read_bytes()) == (body, b"PK" + body)
    assert all(path.name.endswith("_model.safetensors") for path in (one, two))
    assert fetch(server.url("a/model.safetensors?download=true")) == one
    assert len(server.asked) == 2


@pytest.mark.parametrize("told_length", [True, False])
def test_a_cut_download_goes_on_where_it_was_cut(told_length, server, body, cache):
    name = hashed(body)
    server.files[name], server.cuts = body, [400_000, 200_000, 1000]
    assert fetch(server.url(name)).read_bytes() == body
    assert server.asked == [None, "bytes=400000-", "bytes=600000-", "bytes=601000-"]
    assert fetched(cache) == [name]


def test_what_was_cut_for_good_is_continued_by_the_next_call(server, body, cache):
    name = hashed(body)
    server.files[name], server.cuts = body, [700_000, 0, 0, 0]
    words = rf"^{name} cannot be fetched \(.*after 700,000 of {len(body):,} bytes.*\); download "
    with pytest.raises(WeightsError, match=words):
        fetch(server.url(name))
    assert fetched(cache) == [f"{name}.part"]
    server.asked.clear()
    assert fetch(server.url(name)).read_bytes() == body
    assert server.asked == ["bytes=700000-"]
    assert fetched(cache) == [name]


def test_without_a_hash_nothing_is_joined(server, body, cache):
    server.files["net.pth"], server.cuts = body, [700_000]
    assert fetch(server.url("net.pth")).read_bytes() == body
    assert server.asked == [None, None]
    server.files["other.pth"], server.cuts = body, [700_000] * 3
    with pytest.raises(WeightsError, match="cut after 700,000"):
        fetch(server.url("other.pth"))
    assert len(fetched(cache)) == 1  # the first one


def test_a_server_that_knows_no_ranges_sends_all_again(server, body, cache):
    name = hashed(body)
    server.files[name], server.cuts, server.ranges = body, [700_000], False
    assert fetch(server.url(name)).read_bytes() == body
    assert server.asked == [None, "bytes=700000-"]


def whole(body):
    return body


def stale(body):
    return b"x" * 1000


def too_long(body):
    return body + b"more"


def page(body):
    return b"<html>"


def wrong_end(body):
    return body[:-5] + b"wrong"


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("left", [whole, stale, too_long, page, wrong_end])
def test_whatever_an_earlier_call_left_the_file_is_right(left, ranges, server, body, cache):
    name = hashed(body)
    server.files[name], server.ranges = body, ranges
    cache.mkdir(parents=True)
    (cache / f"{name}.part").write_bytes(left(body))
    assert fetch(server.url(name)).read_bytes() == body
    assert fetched(cache) == [name]
    assert len(server.asked) <= 2


@pytest.mark.parametrize("name", ["net-00000000.pth", "net.pth"])
@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html>please log in</html>", "^what came from .* is a web page, not weights: the serv"),
        (b"", "^what came from .* is empty"),
        (b"text", "^what came from .* is neither a safetensors file nor a zip archive"),
    ],
)
def test_what_is_no_file_of_weights_is_not_kept(name, body, words, server, cache):
    server.files[name] = body
    refused(server.url(name), words, call=fetch)
    assert fetched(cache) == []


def test_another_file_than_the_name_promises_is_not_kept(server, body, cache):
    server.files["net-00000000.pth"] = body
    words = r"is another file than its name promises: its SHA-256 does not start with 00000000; "
    refused(server.url("net-00000000.pth"), words, call=fetch)
    assert fetched(cache) == []


def test_another_file_in_the_cache_is_said_and_not_deleted(server, body, cache):
    cache.mkdir(parents=True)
    path = cache / "net-00000000.pth"
    path.write_bytes(body)
    with pytest.raises(WeightsError, match=rf"^{path} is another file than its name promises: "):
        fetch(server.url(path.name))
    assert path.read_bytes() == body
    assert server.asked == []


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (None, "HTTP Error 404: Not Found"),
        (500, "HTTP Error 500: Internal"),
        (503, "HTTP Error 503"),
    ],
)
@pytest.mark.parametrize("name", ["net-00000000.pth", "net.pth"])
def test_a_refusing_server_is_quoted(name, status, words, server, cache):
    server.status = status
    refused(server.url(name), rf"{name} cannot be fetched \({words}", call=fetch)
    assert fetched(cache) == []


def test_offline_the_file_the_address_and_its_place_are_named(server, cache):
    name, url = "net-00000000.pth", server.url("net-00000000.pth")
    server.server_close()
    server.shutdown()
    words = (
        rf"^{name} cannot be fetched \(Connection refused\); download {url} elsewhere and save it "
        rf"as {cache / name}, or give the path of your file\.$"
    )
    refused(url, words, call=fetch)
    assert fetched(cache) == []


def test_a_host_that_is_not_known_is_said(cache):
    words = r"^net\.pth|_net\.pth cannot be fetched \(.+\); download http://no-such-host\.invalid/n"
    refused("http://no-such-host.invalid/net.pth", words, call=fetch)


def test_a_server_that_falls_silent_is_given_up(monkeypatch, cache):
    monkeypatch.setattr(files, "TIMEOUT", 0.05)
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/net.pth"
        refused(url, r"cannot be fetched \(timed out\)", call=fetch)


@pytest.mark.parametrize(
    "url", ["file:///etc/hosts", "net.pth", "https://host", "https://host/", "ftp://host/a.pth", ""]
)
def test_what_is_no_address_is_said(url, cache):
    refused(url, "is no address of a file; it looks like https://host/name.pth", call=fetch)


def test_a_full_disk_leaves_nothing_in_the_cache(server, body, cache, full_disk):
    server.files[hashed(body)] = body
    refused(server.url(hashed(body)), r"cannot be fetched \(File too large\)", call=fetch)
    assert fetched(cache) == []
    assert errno.ENOSPC in files.DISK_FULL


def test_a_cache_that_must_not_be_written_to_is_said(server, body, shared, nobody):
    server.files[hashed(body)] = body
    with pytest.raises(WeightsError, match=r"cannot be fetched \(Permission denied\)"):
        fetch(server.url(hashed(body)), shared)


def test_of_processes_that_fetch_at_once_one_does_and_all_get_it(server, body, cache):
    name = hashed(body)
    server.files[name], server.cuts = body, [300_000, 500_000, 100]
    found, faults = [], []

    def get():
        try:
            found.append(fetch(server.url(name)).read_bytes() == body)
        except WeightsError as error:
            faults.append(error)

    threads = [threading.Thread(target=get) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 4, faults
    assert server.asked == [None, "bytes=300000-", "bytes=800000-", "bytes=800100-"]
    assert fetched(cache) == [name]


class Screen:
    """A terminal that keeps what is written to it."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


def test_a_bar_shows_the_progress_in_a_terminal(server, body, cache, monkeypatch):
    name = hashed(body)
    server.files[name], server.cuts = body, [600_000]
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    fetch(server.url(name))
    assert name in screen.text
    assert "100%" in screen.text
    assert "50%" in screen.text  # where the second connection begins


def test_there_is_no_bar_in_a_log(server, body, cache, capfd):
    server.files[hashed(body)] = body
    fetch(server.url(hashed(body)))
    assert capfd.readouterr() == ("", "")


def test_digests(tmp_path):
    path = as_torch(tmp_path / "a")
    assert sha256_of(path) == sha256_of(str(path)) == hashlib.sha256(path.read_bytes()).hexdigest()
    one = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[3]])}
    assert digest(one) == digest(dict(reversed(one.items())))
    others = [
        {"a": one["a"], "c": one["b"]},
        {"a": one["a"], "b": one["b"][0]},
        {"a": one["a"].view(torch.int32), "b": one["b"]},
        {"a": one["a"].flip(0), "b": one["b"]},
    ]
    digests = [digest(one), digest(one, "text"), *map(digest, others)]
    assert len(set(digests)) == len(digests)
    assert digest({"a": torch.arange(6).reshape(2, 3).T}) == digest(
        {"a": torch.arange(6).reshape(2, 3).T.contiguous()}
    )
