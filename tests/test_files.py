"""Files that a crash cannot spoil."""

from pathlib import Path

from pfedsam.files import append_line, read_lines


def test_a_line_that_was_cut_off_costs_only_itself(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "lines.jsonl"
    assert read_lines(file) == []
    append_line(file, {"key": "a"})
    with file.open("a") as out:
        out.write('{"key": "b", "cas')
    append_line(file, {"key": "c"})
    assert [one["key"] for one in read_lines(file)] == ["a", "c"]
    with file.open("ab") as out:
        out.write(b'{"key": "\xc3')  # in the middle of a letter
    assert [one["key"] for one in read_lines(file)] == ["a", "c"]
    append_line(file, {"key": "d"})
    assert [one["key"] for one in read_lines(file)] == ["a", "c", "d"]


def test_what_is_no_object_is_no_record(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text('1\n[]\n\n{"key": "a"}\n')
    assert read_lines(file) == [{"key": "a"}]
