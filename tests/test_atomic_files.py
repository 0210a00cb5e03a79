from __future__ import annotations

import pytest

from qsm_rl.atomic_files import sweep_temporaries, write_atomically


class Killed(BaseException):
    """Stands for the process ending at this point."""


def test_a_write_that_ends_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def half(temporary):
        temporary.write_text("ne")
        raise Killed

    with pytest.raises(Killed):
        write_atomically(path, half)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_sweeping_goes_below_the_folder_and_keeps_the_rest(tmp_path):
    (tmp_path / "replay").mkdir()
    (tmp_path / "replay" / "rows.incomplete").write_text("x")
    (tmp_path / "rows").write_text("x")
    sweep_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["replay", "rows"]
