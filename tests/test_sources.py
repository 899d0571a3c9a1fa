"""Reading shards from local disks, a web server and a real S3 server (moto), on the loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lingen.cli.bench import yardstick
from lingen.data import manifest, remote, sources
from lingen.data.datamodule import ClipData
from lingen.data.ledger import Ledger
from lingen.data.locations import Location, expand
from lingen.data.remote import SourceError
from lingen.data.shards import scan_shard, write_shards
from lingen.data.sources import PieceCache, Reader
from lingen.media import encode_picture
from lingen.recipe.errors import RecipeError
from lingen.recipe.sections import DataConfig, PerKind, Recipe, Remote, Shards
from tests.helpers.commands import wait_for

PieceHandler, serve = yardstick("loopback").PieceHandler, yardstick("loopback").serve
FAST = Remote(timeout=5.0, attempts=3)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sources, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("LINGEN_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 pictures in 3 shards with a manifest."""
    folder = tmp_path_factory.mktemp("pictures")
    samples = [
        {"__key__": f"p{i:02d}", "png": encode_picture(np.full((16, 16, 3), 10 * i, np.uint8)), "txt": f"picture {i}"}
        for i in range(12)
    ]
    paths = write_shards(samples, str(folder / "image-%03d.tar"), per_shard=4)
    rows = [
        manifest.Row(one.key, path.name, one.start, one.end - one.start, "image", 16, 16, 1, captions=1, media="png")
        for path in paths
        for one in scan_shard(path)
    ]
    manifest.write(folder / manifest.NAME, rows, manifest.About())
    return folder


def data_of(shards: str, *, workers: int = 0, **settings: Any) -> ClipData:
    data = DataConfig(
        shards=Shards(image=shards), mix=PerKind(image=1, video=0), batch=PerKind(image=4), size=(16, 16),
        workers=workers, remote=Remote(timeout=5.0, attempts=3, **settings),
    )  # fmt: skip
    return ClipData(Recipe(data=data))


def keys(data: ClipData, batches: int = 6) -> list[list[str]]:
    return [[key.rpartition(":")[2] for key in batch.keys] for batch in islice(data.train_dataloader(), batches)]


# web servers


class Flaky(PieceHandler):
    """Every answer about a piece but each third one goes wrong in another way."""

    asked: Counter[str] = Counter()

    def do_GET(self) -> None:
        piece = f"{self.path} {self.headers['Range']}"
        Flaky.asked[piece] += 1
        turn = Flaky.asked[piece] % 6
        if turn in (0, 3):
            super().do_GET()
        elif turn == 1:
            self.answer(503)
        elif turn == 2:
            self.close_connection = True  # no answer at all
        elif turn == 4:  # half of it
            self.send_response(206)
            self.send_header("Content-Length", "1000")
            self.send_header("Content-Range", "bytes 0-999/5000")
            self.end_headers()
            self.wfile.write(b"x" * 10)
            self.close_connection = True
        else:
            self.answer(429)


def test_pieces_of_a_file_on_a_web_server(folder: Path) -> None:
    content = (folder / "image-000.tar").read_bytes()
    with serve(folder) as address:
        reader, url = Reader(FAST), f"{address}/image-000.tar"
        assert reader.read(url, 512, 700) == (content[512:1212], 0)
        assert reader.read(url, len(content) - 5, 100).data == content[-5:]
        assert reader.read(url, len(content) + 5, 100).data == b""
        assert reader.stat(url)[0] == len(content)
        with ThreadPoolExecutor(8) as pool:
            pieces = pool.map(lambda start: reader.read(url, start, 512).data, range(0, 8192, 512))
            assert b"".join(pieces) == content[:8192]


def test_what_fails_in_passing_is_tried_again_and_counted(folder: Path) -> None:
    content = (folder / "image-000.tar").read_bytes()
    Flaky.asked.clear()
    with serve(folder, handler=Flaky) as address:
        pieces = [Reader(FAST).read(f"{address}/image-000.tar", start, 64) for start in range(0, 512, 64)]
    assert b"".join(piece.data for piece in pieces) == content[:512]
    assert [piece.retries for piece in pieces] == [2] * 8
    with serve(folder, handler=Flaky) as address:  # the other three ways
        again = [Reader(FAST).read(f"{address}/image-000.tar", start, 64) for start in range(0, 512, 64)]
    assert again == pieces


def test_failures_that_last(folder: Path) -> None:
    class Refusing(PieceHandler):
        def do_GET(self) -> None:
            status = int(self.path[1:4])
            self.answer(status, b"everything" if status == 200 else b"")

    with serve(folder, handler=Refusing) as address:
        for status, message, retries in (
            (404, "unreadable shard: .*404; is the address right", 0),
            (403, "no permission .403.; sign the address", 0),
            (200, "ignores byte ranges", 0),
            (500, "unreachable: .* in 3 attempts .the server answers 500", 2),
        ):
            with pytest.raises(SourceError, match=message) as caught:
                Reader(FAST).read(f"{address}/{status}.tar", 0, 10)
            assert caught.value.retries == retries
    with pytest.raises(SourceError, match="unreachable: .* in 3 attempts"):
        Reader(FAST).read(f"{address}/gone.tar", 0, 10)
    with pytest.raises(SourceError, match="too large: 3000000000 bytes"):
        Reader(FAST).read(f"{address}/a.tar", 0, 3_000_000_000)


def test_a_silent_server_is_not_waited_for(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        begin = time.monotonic()
        with pytest.raises(SourceError, match=r"unreachable: .* in 2 attempts \(.*timed out"):
            Reader(Remote(timeout=0.2, attempts=2)).read(f"http://127.0.0.1:{silent.getsockname()[1]}/a.tar", 0, 10)
        assert time.monotonic() - begin < 3


@pytest.mark.parametrize("workers", [0, 2])
def test_remote_shards_give_the_batches_of_local_ones(folder: Path, workers: int) -> None:
    with serve(folder) as address:
        far = data_of(f"{address}/image-{{000..002}}.tar", workers=workers)
        assert keys(far) == keys(data_of(str(folder / "image-*.tar")))
        whole = data_of(f"{address}/manifest.parquet", workers=workers)
        assert keys(whole) == keys(far)


def test_a_shaky_server_costs_retries_and_no_sample(folder: Path) -> None:
    Flaky.asked.clear()
    with serve(folder, handler=Flaky) as address:
        data, ledger = data_of(f"{address}/manifest.parquet"), Ledger()
        for batch in islice(data.train_dataloader(), 6):
            ledger.record(batch)
    assert ledger.used == 24 and not ledger.dropped and ledger.retried == 2 * 24
    assert ledger.sources[address]["retried"] == ledger.retried == sum(s["retried"] for s in ledger.shards.values())


def test_a_shard_that_is_gone_is_dropped_by_name(folder: Path) -> None:
    class Without(PieceHandler):
        def do_GET(self) -> None:
            self.answer(404) if "001" in self.path else super().do_GET()

    with serve(folder, handler=Without) as address:
        data, ledger = data_of(f"{address}/manifest.parquet"), Ledger()
        for batch in islice(data.train_dataloader(), 6):
            ledger.record(batch)
    assert ledger.dropped["unreadable shard"] == ledger.shards["image-001.tar"]["dropped"] >= 8
    assert ledger.shards["image-001.tar"]["used"] == 0


def test_remote_shards_need_a_manifest(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "image-000.tar").write_bytes((folder / "image-000.tar").read_bytes())
    with serve(tmp_path / "bare") as address, pytest.raises(RecipeError, match="image-000.tar needs a manifest"):
        data_of(f"{address}/image-000.tar").setup()
    with pytest.raises(RecipeError, match="data.shards.image: unreachable"):
        data_of("http://127.0.0.1:9/manifest.parquet").setup()


# the cache


def test_what_was_read_from_afar_is_kept(folder: Path) -> None:
    class Counting(PieceHandler):
        asked = 0

        def do_GET(self) -> None:
            Counting.asked += 1
            super().do_GET()

    with serve(folder, handler=Counting) as address:
        first = keys(data_of(f"{address}/manifest.parquet", cache_gb=0.1))
        asked = Counting.asked
        assert keys(data_of(f"{address}/manifest.parquet", cache_gb=0.1)) == first
    assert Counting.asked == asked + 1  # whether the manifest is the same


def test_the_cache_stays_within_its_bound_and_forgets_the_oldest(tmp_path: Path) -> None:
    cache = PieceCache(tmp_path, 100_000)
    for number in range(300):
        cache.put(f"{number:064x}", bytes([number % 256]) * 1000)
        os.utime(tmp_path / "00" / f"{number:064x}", ns=(number * 10**9,) * 2) if number < 250 else None
        assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= 102_000
    assert cache.get(f"{299:064x}") == bytes([43]) * 1000 and cache.get(f"{100:064x}") is None
    cache.put("f" * 64, bytes(60_000))  # too large to be kept at all
    assert cache.get("f" * 64) is None
    nothing = PieceCache(tmp_path / "none", 0)
    nothing.put("a", b"b")
    assert nothing.get("a") is None and not (tmp_path / "none").exists()


# S3


@pytest.fixture(scope="module")
def s3(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A client of a real S3 server in a process of its own, with the pictures in a bucket."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    log = (tmp_path_factory.mktemp("moto") / "log").open("wb")
    server = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }  # fmt: skip
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(name, value)
            wait_for(lambda: answers(settings["AWS_ENDPOINT_URL"]), server, 60)
            import boto3

            client = boto3.client("s3")
            client.create_bucket(Bucket="pictures")
            for path in folder.iterdir():
                client.upload_file(str(path), "pictures", f"set/{path.name}")
            yield client
    finally:
        os.kill(server.pid, signal.SIGTERM)
        server.wait(10)
        log.close()


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/moto-api/", timeout=1)
    except OSError:
        return False
    return True


def test_pieces_of_an_object(s3: Any, folder: Path) -> None:
    content = (folder / "image-001.tar").read_bytes()
    reader = Reader(FAST)
    assert reader.read("s3://pictures/set/image-001.tar", 100, 50) == (content[100:150], 0)
    assert reader.read("s3://pictures/set/image-001.tar", len(content) - 5, 50).data == content[-5:]
    assert reader.read("s3://pictures/set/image-001.tar", len(content) + 5, 50).data == b""
    stat = reader.stat("s3://pictures/set/image-001.tar")
    assert stat[0] == len(content) and stat[1]


def test_patterns_of_objects(s3: Any) -> None:
    names = [f"s3://pictures/set/image-{i:03d}.tar" for i in range(3)]
    assert expand("s3://pictures/set/image-*.tar", "x") == names
    assert expand("s3://pictures/set/image-00[12].tar", "x") == names[1:]
    assert expand("s3://pictures/set/image-{000..002}.tar", "x") == names
    with pytest.raises(RecipeError, match="x: no file matches 's3://pictures/other/.*tar'"):
        expand("s3://pictures/other/*.tar", "x")
    with pytest.raises(RecipeError, match="x: unreadable shard: .*NoSuchBucket; check the bucket"):
        expand("s3://absent-bucket/*.tar", "x")


def test_a_list_that_fails_in_passing_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    def ask(address: str, timeout: float, call: str, **arguments: Any) -> Any:
        asked.append((address, arguments))
        if len(asked) != 2:
            raise remote.Passing("S3 answers SlowDown")
        return {"Contents": [{"Key": "a#b/1.tar"}, {"Key": "a#b/2.zip"}]}

    monkeypatch.setattr(remote, "_ask", ask)
    assert expand("s3://pictures/a#b/*.tar", "x") == ["s3://pictures/a#b/1.tar"]
    assert asked == [("s3://pictures/a#b/*.tar", {"Prefix": "a#b/"})] * 2
    with pytest.raises(RecipeError, match="x: unreachable: s3://pictures/.* could not be read in .*SlowDown"):
        expand("s3://pictures/*.tar", "x")


def test_keys_may_hold_the_signs_of_an_address(s3: Any) -> None:
    for name in ("a#1.tar", "b?x=1/2.tar"):
        s3.put_object(Bucket="pictures", Key=name, Body=b"0123456789")
        assert Reader(FAST).read(f"s3://pictures/{name}", 2, 3).data == b"234"
        assert Reader(FAST).stat(f"s3://pictures/{name}")[0] == 10
        assert Location.of(f"s3://pictures/{name}").name == name.rpartition("/")[2]


def test_a_manifest_that_cannot_be_read_to_its_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise SourceError("unreachable: the manifest")

    monkeypatch.setattr(Reader, "stat", lambda *args: (1000, "v"))
    monkeypatch.setattr(Reader, "read", fails)
    with pytest.raises(RecipeError, match="data.shards.image: unreachable: the manifest"):
        data_of("https://example.org/set/manifest.parquet").setup()


def test_many_objects_are_listed_page_by_page(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = remote._ask
    monkeypatch.setattr(remote, "_ask", lambda *words, **more: ask(*words, **more, MaxKeys=1))
    assert len(expand("s3://pictures/set/*.tar", "x")) == 3


def test_a_bucket_gives_the_batches_of_a_folder(s3: Any, folder: Path) -> None:
    assert keys(data_of("s3://pictures/set/*.tar", workers=2)) == keys(data_of(str(folder / "*.tar")))
    far = data_of("s3://pictures/set/manifest.parquet")
    assert keys(far) == keys(data_of(str(folder)))
    assert next(iter(far.train_dataloader())).sources == ["s3://pictures/set"] * 4


def test_what_s3_refuses(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SourceError, match="S3 answers NoSuchKey; check the bucket and the key") as caught:
        Reader(FAST).read("s3://pictures/set/absent.tar", 0, 10)
    assert caught.value.missing and caught.value.retries == 0
    remote._client.cache_clear()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(SourceError, match="unreachable: s3://pictures/a.tar could not be read in 2 attempts"):
            Reader(Remote(timeout=0.2, attempts=2)).read("s3://pictures/a.tar", 0, 10)
    remote._client.cache_clear()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(SourceError, match="Unable to locate credentials; set AWS_PROFILE"):
        Reader(FAST).read("s3://pictures/a.tar", 0, 10)
    remote._client.cache_clear()


def test_s3_without_boto3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    remote._client.cache_clear()
    with pytest.raises(RecipeError, match=r"s3:// needs boto3; install it with: pip install boto3"):
        expand("s3://pictures/*.tar", "x")


# local disks


def test_what_a_network_disk_says_in_passing_is_tried_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    path = str(folder / "image-000.tar")
    failures = [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "Input/output error")]
    real = sources._read_file

    def shaky(*where: Any) -> bytes:
        if failures:
            raise failures.pop()
        return real(*where)

    monkeypatch.setattr(sources, "_read_file", shaky)
    assert Reader(FAST).read(path, 0, 10).retries == 2
    with pytest.raises(SourceError, match="unreadable shard: .*absent.tar: No such file") as caught:
        Reader(FAST).read(str(folder / "absent.tar"), 0, 10)
    assert caught.value.retries == 0


def test_locations() -> None:
    assert Location.of("a.tar") == (".", "a.tar") and str(Location.of("a.tar")) == "a.tar"
    assert Location.of("/a.tar") == ("/", "a.tar") and str(Location.of("/a.tar")) == "/a.tar"
    assert Location.of("s3://bucket/x/a.tar") == ("s3://bucket/x", "a.tar")
    signed = Location.of("https://host/x/manifest.parquet?key=a/b")
    assert signed == ("https://host/x", "manifest.parquet?key=a/b") and signed.is_manifest
    assert str(signed) == "https://host/x/manifest.parquet?key=a/b"
