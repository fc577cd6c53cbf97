"""Publishing to the hub: the real client against a stand-in of the hub's HTTP interface."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from published_models import publish

TOKEN = "hf_" + "standintoken"


class StandIn(BaseHTTPRequestHandler):
    """Answers what `create_repo` and `upload_folder` ask, and keeps what they send."""

    def do_POST(self):  # noqa: N802 (the library's name)
        """Take one request."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append((self.path, self.headers.get("Authorization"), body))
        if self.server.refuses:
            return self._answer({"error": f"no write access for {self.headers.get('Authorization')}"}, 403)
        address = f"http://{self.headers['Host']}/group/model"
        if self.path == "/api/repos/create":
            return self._answer({"url": address, "name": "group/model"})
        if "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]
            return self._answer({"files": answer})
        if "/commit/" in self.path:
            return self._answer({"commitUrl": f"{address}/commit/1", "commitOid": "1", "success": True})
        return self._answer({"valid": True})  # the check of the card's metadata

    def do_GET(self):  # noqa: N802
        """Say that the repository is there and empty."""
        self.server.requests.append((self.path, self.headers.get("Authorization"), b""))
        self._answer({"id": "group/model", "sha": "0" * 40, "siblings": [], "private": True})

    def _answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        """Keep quiet."""


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.requests, server.refuses = [], False
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def push(hub, toy_backbone, write_config, run_script, tmp_path):
    """Run stage 7 with --push-to-hub in a process that takes the stand-in for the hub."""
    publish(tmp_path, toy_backbone)
    config = write_config(
        tmp_path,
        paths={"published_model_dir": "published"},
        embedding_model={"model_name": str(toy_backbone), "pooling_type": "pooler_output"},
    )
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
    }  # fmt: skip

    def run(*arguments):
        script = "publish_model/convert_to_hf.py"
        return run_script(script, "--config", config, "--push-to-hub", "group/model", *arguments, **environment)

    return run


def test_every_file_arrives_in_a_private_repository(push, hub, tmp_path):
    outcome = push()
    assert outcome.code == 0, outcome.stderr
    paths = [path for path, _, _ in hub.requests]
    created = json.loads(hub.requests[paths.index("/api/repos/create")][2])
    assert created["name"] == "model"
    assert created.get("private") is True or created.get("visibility") == "private"  # by the library's version
    commit = next(body for path, _, body in hub.requests if "/commit/" in path)
    entries = [json.loads(line) for line in commit.splitlines()]
    sent = {one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in entries if one["key"] == "file"}
    assert sent == {path.name: path.read_bytes() for path in (tmp_path / "published").iterdir()}
    sent_with = {path: token for path, token, _ in hub.requests if "/model" in path or "create" in path}
    assert set(sent_with.values()) == {f"Bearer {TOKEN}"}, sent_with
    check_secret(outcome, tmp_path)


def test_other_files_in_the_folder_and_links_out_of_it_stay_here(push, hub, tmp_path):
    (tmp_path / "private").write_text("secret")
    (tmp_path / "published" / "notes.txt").write_text("mine")
    (tmp_path / "published" / "LICENSE").symlink_to(tmp_path / "private")
    outcome = push()
    assert (outcome.code, "LICENSE, notes.txt: not uploaded" in outcome.stderr) == (0, True)
    commit = next(body for path, _, body in hub.requests if "/commit/" in path)
    sent = {one["value"]["path"] for one in map(json.loads, commit.splitlines()) if one["key"] == "file"}
    assert "model.safetensors" in sent
    assert not sent & {"notes.txt", "LICENSE"}


def test_a_refusal_that_repeats_the_token_is_one_line_without_it(push, hub, tmp_path):
    hub.refuses = True
    outcome = push()
    assert outcome.code == 1
    last = outcome.stderr.splitlines()[-1]
    assert last.startswith("error: group/model: cannot publish to the hub (")
    assert "Traceback" not in outcome.stderr
    check_secret(outcome, tmp_path)


def check_secret(outcome, folder):
    assert TOKEN not in outcome.stdout + outcome.stderr
    assert [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()] == []
