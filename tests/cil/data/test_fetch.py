import gzip
import hashlib
import io
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from cil.data import MissingData
from cil.data.fetch import fetch, open_or_fetch

ONE = gzip.compress(b"one file")


def tar(**files: bytes) -> bytes:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return whole.getvalue()


SERVED = {"/one.gz": ONE, "/set.tar.gz": tar(**{"set/train": b"pictures", "../../outside": b"names"})}


@pytest.fixture
def server() -> Iterator[str]:
    """The address of a server on this machine."""

    class Serving(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = SERVED.get(self.path)
            self.send_response(200 if content else 404)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Serving) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}"
        serving.shutdown()
        thread.join()


def published(server: str) -> dict[str, str]:
    return {server + path: hashlib.sha256(content).hexdigest() for path, content in SERVED.items()}


def test_what_was_published_is_unpacked_and_nothing_leaves_the_folder(tmp_path: Path, server: str) -> None:
    fetch(published(server), tmp_path / "data", "set/raw")
    found = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {
        "data/set/raw/one": b"one file",
        "data/set/raw/train": b"pictures",
        "data/set/raw/outside": b"names",
    }


def test_something_else_than_was_published_is_refused_and_leaves_nothing(tmp_path: Path, server: str) -> None:
    wrong = published(server) | {f"{server}/set.tar.gz": "0" * 64}
    with pytest.raises(ValueError, match=r"set\.tar\.gz is not what was published and was not kept: .* 0{64} is right"):
        fetch(wrong, tmp_path, "set")
    assert not list(tmp_path.iterdir())


def test_an_address_without_an_answer_leaves_nothing(tmp_path: Path, server: str) -> None:
    with pytest.raises(OSError, match="404"):
        fetch({f"{server}/gone.gz": "0" * 64}, tmp_path, "set")
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_fetched_anew_and_then_opened(tmp_path: Path, server: str) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "one").write_bytes(b"half")

    def open_part(train: bool) -> bytes:
        content = (tmp_path / "set" / "one").read_bytes()
        if content != b"one file":
            raise RuntimeError("damaged")
        return content

    address = f"{server}/one.gz"
    sums = {address: published(server)[address]}
    with pytest.raises(MissingData, match=r"of mine in .*set cannot be used; add data\.download=true .*: damaged"):
        open_or_fetch("mine", open_part, sums, tmp_path, "set", download=False)
    assert open_or_fetch("mine", open_part, sums, tmp_path, "set", download=True) == [b"one file"] * 2
