"""What timm fetches from a URL: the hash in the file's name is checked, and nothing else is taken for one."""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from timm.models import _registry

from queryvision.errors import CheckpointError
from queryvision.weights import sources

NAME = "test_resnet.r160_in1k"


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        (lambda digest: f"weights-{digest}.pth", False),
        (lambda digest: "weights-00000000.pth", True),
        (lambda digest: "vit.g.16-600e.pth.tar", False),  # of the I-JEPA models: epochs
        (lambda digest: "weights-20240115.pth", False),
    ],
)
def test_the_hash_in_a_name_is_checked(
    name: Callable[[str], str], wrong: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = timm.create_model(NAME).state_dict()
    torch.save(state, tmp_path / "plain")
    file = name(hashlib.sha256((tmp_path / "plain").read_bytes()).hexdigest()[:8])
    (tmp_path / "web").mkdir()
    (tmp_path / "plain").rename(tmp_path / "web" / file)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "web"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{file}"
        config = dataclasses.replace(timm.get_pretrained_cfg(NAME), url=url, hf_hub_id=None)
        monkeypatch.setitem(_registry._model_pretrained_cfgs, NAME, config)
        if wrong:
            with pytest.raises(CheckpointError, match=f"weights = 'timm:{NAME}': cannot be fetched .*invalid hash value"):
                sources._state(NAME, f"timm:{NAME}")
        else:
            found = sources._state(NAME, f"timm:{NAME}")
            assert all(torch.equal(found[key], value) for key, value in state.items())
        server.shutdown()
    assert not timm.models._builder._CHECK_HASH, "a switch of the process is back where it was"
