"""Uploading an export, with the Hub's own client, to a server on this machine that speaks the Hub's protocol."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, ElectraForMaskedLM

import electra_ds
from electra_ds.cli import main
from electra_ds.core.errors import ConfigError, DataError
from electra_ds.core.ranks import Ranks
from electra_ds.data.token_store import TokenStore
from tests.helpers import SMALL


class Hub:
    """Keeps what is uploaded."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.status = 200


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            kind, _, rest = self.path.removeprefix("/api/").partition("/")
            if hub.status != 200:
                return self._answer({"error": "You may not do this."})
            if kind == "validate-yaml":
                return self._answer({"errors": [], "warnings": []})
            if kind == "repos":
                given = json.loads(body)
                name = f"{given.get('organization') or 'someone'}/{given['name']}"
                hub.repositories[name] = given
                return self._answer({"url": f"http://{self.headers['Host']}/{name}", "name": name, "id": name})
            name, action = rest.rsplit("/", 2)[0], rest.rsplit("/", 2)[1]
            if action == "preupload":
                paths = [file["path"] for file in json.loads(body)["files"]]
                files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for path in paths]
                return self._answer({"files": files})
            lines = [json.loads(line) for line in body.splitlines()]
            hub.files[name] = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            return self._answer({"commitUrl": f"http://{self.headers['Host']}/{name}/commit/1", "commitOid": "1"})

        def _answer(self, values: dict[str, Any]) -> None:
            text = json.dumps(values).encode()
            self.send_response(hub.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *given: Any) -> None:
            pass

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    found = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(found))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def run(store: TokenStore, tmp_path_factory: pytest.TempPathFactory, process_group: Ranks) -> Path:
    folder = tmp_path_factory.mktemp("published") / "run"
    steps = ["schedule.total_steps=2", "schedule.warmup_steps=1"]
    electra_ds.pretrain(
        "tiny", data=store.path, ds_config="cpu", run_dir=folder, overrides=[*SMALL, *steps], threads=1,
        eval_windows=16, quiet=True,
    )  # fmt: skip
    return folder


def test_each_network_is_uploaded_with_a_card_whose_code_opens_it(
    run: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(
        [
            "export", str(run), "--out", str(tmp_path / "out"), "--push-to-hub", "me/mine", "--private",
            "--license", "apache-2.0", "--language", "en", "uk", "--dataset", "wikimedia/wikipedia=cc-by-sa-4.0",
        ]
    )  # fmt: skip
    said = capsys.readouterr().out
    assert hub.repositories.keys() == hub.files.keys() == {"me/mine-discriminator", "me/mine-generator"}
    assert all(given.get("private") or given.get("visibility") == "private" for given in hub.repositories.values())
    for name, files in hub.files.items():
        assert f"/{name}\n" in said
        written = {
            path.name: path.read_bytes() for path in (tmp_path / "out" / name.removeprefix("me/mine-")).iterdir()
        }
        assert files == written
    card = ModelCard(hub.files["me/mine-generator"]["README.md"].decode())
    assert card.data.to_dict() == {
        "license": "apache-2.0", "language": ["en", "uk"], "datasets": ["wikimedia/wikipedia"],
        "library_name": "transformers", "pipeline_tag": "fill-mask", "tags": ["electra", "electra_ds"],
    }  # fmt: skip
    assert "- wikimedia/wikipedia: cc-by-sa-4.0" in card.text
    (tmp_path / "me").mkdir()
    (tmp_path / "out" / "generator").rename(tmp_path / "me" / "mine-generator")
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(card.text.partition("```python\n")[2].partition("```")[0], found)
    assert isinstance(found["model"], ElectraForMaskedLM)
    assert found["tokenizer"].get_vocab() == AutoTokenizer.from_pretrained("me/mine-generator").get_vocab()


def test_a_dry_run_uploads_nothing_and_says_what_it_would(
    run: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", str(run), "--out", str(tmp_path / "out"), "--push-to-hub", "me/mine", "--dry-run"])
    said = capsys.readouterr().out
    assert "Would upload" in said
    assert "to me/mine-discriminator." in said
    assert "names no licence: give one with --license" in said
    assert not hub.repositories


def test_what_the_hub_refuses_is_told_and_the_folder_remains(run: Path, hub: Hub, tmp_path: Path) -> None:
    hub.status = 403
    with pytest.raises(DataError, match=r"Cannot upload .*/discriminator to me/mine-discriminator: .*hf auth whoami"):
        electra_ds.export(run, tmp_path / "out", push_to_hub="me/mine")
    assert (tmp_path / "out" / "discriminator" / "config.json").is_file()
    with pytest.raises(ConfigError, match="takes NAME or OWNER/NAME, not 'me/mine/too'"):
        electra_ds.export(run, tmp_path / "other", push_to_hub="me/mine/too")
    with pytest.raises(ConfigError, match="belong to --push-to-hub"):
        electra_ds.export(run, tmp_path / "other", private=True)
    assert not (tmp_path / "other").exists()
