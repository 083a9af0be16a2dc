"""Files written whole or not at all."""

import hashlib
from pathlib import Path

import pytest

from model.cli import UserError
from model.files import file_sha256, read_json, write_json


def test_files_are_whole_or_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [1]})
    assert read_json(path) == {"a": [1]}
    assert file_sha256(path) == hashlib.sha256(b'{\n  "a": [\n    1\n  ]\n}\n').hexdigest()

    def fill_disk(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_disk)
    with pytest.raises(UserError, match="a.json: not written .* No space left"):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": [1]}
    monkeypatch.undo()
    write_json(path, {"a": 2})
    assert list(tmp_path.iterdir()) == [path]


def test_json_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for content, message in ((b"{", "broken"), (b"\xff", "broken"), (b"[1]", "expected a JSON")):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(UserError, match=f"x.json: {message}"):
            read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match="y.json: missing"):
        read_json(tmp_path / "y.json")
