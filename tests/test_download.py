"""preprocess_raw_data/download.sh against a server on this machine."""

import hashlib
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "preprocess_raw_data" / "download.sh"
TAR = bytes(range(256)) * 1_000
needs_aria2c = pytest.mark.skipif(shutil.which("aria2c") is None, reason="aria2c is not installed (package aria2)")


class Server(ThreadingHTTPServer):
    """Serves files from memory, in ranges; `cut` is after how many bytes of a file it hangs up once."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cut: dict[str, int] = {}
        self.asked: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name, wanted = self.path.lstrip("/"), self.headers.get("Range", "")
        self.server.asked.append((name, wanted))
        if name not in self.server.files:
            self.send_error(404)
            return
        content = self.server.files[name]
        start = int(match[1]) if (match := re.fullmatch(r"bytes=(\d+)-.*", wanted)) else 0
        self.send_response(206 if match else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Disposition", 'attachment; filename="../other.tar"')
        if match:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[start : self.server.cut.pop(name, None)])
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def download(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60,
        env=os.environ | {"ARIA2C_OPTIONS": "--max-tries=1 --no-conf"} | environment,
    )  # fmt: skip


@needs_aria2c
def test_a_list_at_an_address_is_fetched_and_a_rerun_asks_for_nothing(server: Server, tmp_path: Path) -> None:
    digest = hashlib.sha256(TAR).hexdigest()
    lines = ["# a note", "", f"{server.url}/a/0001.tar", f"{server.url}/0002.tar sha-256={digest}"]
    server.files = {"list": "\r\n".join(lines).encode(), "a/0001.tar": TAR, "0002.tar": TAR}
    raw = tmp_path / "raw tars"
    run = download(raw, TAR_LIST=f"{server.url}/list")
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [f"{raw}/0001.tar", f"{raw}/0002.tar"]
    assert sorted(path.name for path in raw.iterdir()) == [".downloading", "0001.tar", "0002.tar"]
    assert {(raw / f"000{number}.tar").read_bytes() for number in (1, 2)} == {TAR}
    server.asked.clear()
    run = download(raw, f"{server.url}/list")
    assert (run.returncode, run.stdout, {name for name, _ in server.asked}) == (0, "", {"list"})


@needs_aria2c
def test_a_download_that_broke_off_goes_on_where_it_was_and_the_others_are_fetched(
    server: Server, tmp_path: Path
) -> None:
    server.files, server.cut = {"0001.tar": TAR, "0002.tar": TAR}, {"0001.tar": 100_000}
    listed = tmp_path / "urls.txt"
    listed.write_text(f"{server.url}/0001.tar\n{server.url}/0002.tar")
    run = download(tmp_path / "raw", listed)
    assert (run.returncode, run.stdout) == (1, f"{tmp_path}/raw/0002.tar\n")
    assert run.stderr.splitlines()[-1] == "error: 1 of 2 tars are not here yet: run this again"
    assert not (tmp_path / "raw" / "0001.tar").exists()
    server.asked.clear()
    assert download(tmp_path / "raw", listed).returncode == 0
    assert (tmp_path / "raw" / "0001.tar").read_bytes() == TAR
    assert {name for name, _ in server.asked} == {"0001.tar"}
    starts = [int(match[1]) for _, wanted in server.asked if (match := re.match(r"bytes=(\d+)-", wanted))]
    assert 0 < max(starts) <= 100_000


@needs_aria2c
def test_a_tar_of_another_sum_never_gets_its_name(server: Server, tmp_path: Path) -> None:
    server.files = {"0001.tar": TAR[:-1] + b"x"}
    listed = tmp_path / "urls.txt"
    listed.write_text(f"{server.url}/0001.tar sha-256={hashlib.sha256(TAR).hexdigest()}\n")
    assert download(tmp_path / "raw", listed).returncode == 1
    assert [path.name for path in (tmp_path / "raw").iterdir()] == [".downloading"]
    server.files = {"0001.tar": TAR}
    assert download(tmp_path / "raw", listed).returncode == 0
    assert (tmp_path / "raw" / "0001.tar").read_bytes() == TAR


@needs_aria2c
@pytest.mark.parametrize(
    "line",
    ["http://x/0001.zip", "http://x/evil", "file:///etc/0001.tar", "  out=/etc/passwd", "http://x/0001.tar md5=1", ""],
)
def test_a_line_that_names_no_tar_is_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "urls.txt").write_text(f"{line}\n")
    run = download(tmp_path / "raw", tmp_path / "urls.txt")
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith(f"error: {tmp_path}/urls.txt: ")
    assert run.stderr.endswith("correct it\n")


def test_without_aria2c_the_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("bash", "env", "sed"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or "")
    run = download(tmp_path / "raw", "urls.txt", PATH=str(tmp_path / "bin"))
    assert run.returncode == 1
    assert run.stderr.startswith("error: aria2c: no such program: install the package aria2 ")
    assert not (tmp_path / "raw").exists()


@pytest.mark.parametrize("arguments", [[], ["raw"], ["raw", "list", "more"]])
def test_a_wrong_command_line_is_refused(arguments: list[str]) -> None:
    run = download(*arguments, TAR_LIST="")
    assert (run.returncode, run.stdout) == (2, "")
    assert "RAW_DIR and LIST: both are needed" in run.stderr


@needs_aria2c
@pytest.mark.parametrize(
    "address", ["ftp://alice:s3cr3t@127.0.0.1/0001.zip", "http://alice:s3cr3t@127.0.0.1:9/0001.tar"]
)
def test_no_message_shows_the_password_of_an_address(tmp_path: Path, address: str) -> None:
    (tmp_path / "urls.txt").write_text(f"{address}\n")
    run = download(tmp_path / "raw", tmp_path / "urls.txt", ARIA2C_OPTIONS="--max-tries=1 --connect-timeout=1")
    assert run.returncode == 1
    assert "s3cr3t" not in run.stdout + run.stderr
