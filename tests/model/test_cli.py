"""Errors as one line, flags that are refused, and text that is safe to print."""

from pathlib import Path
from unittest.mock import Mock

import pytest

from model.cli import SHARE, Finished, UserError, escape_control, make_parser, run_script


def test_scripts_end_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for error, code, line in [
        (None, 0, ""),
        (Finished(), 0, ""),
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


def test_a_wrong_command_line_is_an_error_like_others(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = make_parser("Do nothing.")
    parser.add_argument("--share", type=SHARE, default=0.5)
    assert parser.parse_args(["--share", "0.25"]).share == 0.25
    for words, message in [
        (["--share", "2"], "argument --share: 2: must lie between 0 and 1; --help lists the flags"),
        (["--share", "x"], "argument --share: invalid float value: 'x'; --help"),
        (["--sha", "0"], "unrecognized arguments: --sha 0; --help"),
    ]:
        with pytest.raises(UserError, match=message):
            parser.parse_args(words)
    assert capsys.readouterr() == ("", "")


def test_flags_are_read_from_a_file(tmp_path: Path) -> None:
    parser = make_parser("Do nothing.")
    parser.add_argument("--share", type=SHARE, default=0.5)
    parser.add_argument("--names", nargs="+")
    path = tmp_path / "flags"
    path.write_text('--names "two words" é  # of two\n\n--share 0.25\n', encoding="utf-8")
    args = parser.parse_args([f"@{path}"])
    assert vars(args) == {"names": ["two words", "é"], "share": 0.25}
    assert parser.parse_args([f"@{path}", "--share", "1"]).share == 1  # the last one counts
    assert parser.parse_args(["--names=@b"]).names == ["@b"]
    path.write_text('--share 0.25\n--names "two words\n', encoding="utf-8")
    with pytest.raises(UserError, match="'--names \"two words' in a file of flags: No closing"):
        parser.parse_args([f"@{path}"])
    with pytest.raises(UserError, match=f"No such file or directory: '{tmp_path}/none'; --help"):
        parser.parse_args([f"@{tmp_path}/none"])
