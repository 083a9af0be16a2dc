"""Errors as one line, and files written whole or not at all."""

import hashlib
from pathlib import Path
from unittest.mock import Mock

import pytest

from model.files import UserError, escape_control, file_sha256, read_json, run_script, write_json


def test_scripts_end_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for error, code, line in [
        (None, 0, ""),
        (UserError("a\n\x9bb\t: mend"), 2, "error: a\\n\\u009bb\\t: mend\n"),
        (OSError(28, "No space left", "x"), 2, "error: [Errno 28] No space left: 'x'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ]:
        with pytest.raises(SystemExit) as caught:
            run_script(Mock(side_effect=error, return_value=0))
        assert caught.value.code == code
        assert capsys.readouterr() == ("", line)


def test_control_characters_are_escaped() -> None:
    assert escape_control("a\x1bb\tc\nd\u202e") == "a\\u001bb\tc\nd\\u202e"
    assert escape_control("\ud83d\U000e0041 你好") == "\\ud83d\\udb40\\udc41 你好"


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
