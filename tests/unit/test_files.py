"""Files appear whole or not at all, and links out of a folder are not followed."""

from pathlib import Path

import pytest

from qs_jax.errors import CheckpointError
from qs_jax.files import read_json, refuse_link_out, refuse_what_is_no_file, remove_whole, write_whole


@pytest.mark.parametrize("content", ["naïve\n", b"\x00\xff"])
def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    write_whole(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_half_way_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fails(self: Path, target: Path) -> Path:
        assert self.read_text() == "new"
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_removed_with_what_a_killed_process_left(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    for name in ("file", ".file.partial", "other"):
        (tmp_path / name).touch()
    remove_whole(path)
    assert list(tmp_path.iterdir()) == [other]
    remove_whole(path)


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff", b'"x"', b"[" * 10**5])
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="holds no JSON object"):
        read_json(path)


def test_a_json_file_that_is_absent_is_empty(tmp_path: Path) -> None:
    assert read_json(tmp_path / "a.json") == {}
    (tmp_path / "a.json").write_text('{"é": [1]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"é": [1]}


def test_links_are_followed_inside_a_folder_and_into_the_hubs_store_only(tmp_path: Path) -> None:
    snapshot, store, outside = tmp_path / "snapshots" / "abc", tmp_path / "blobs", tmp_path / "secret"
    snapshot.mkdir(parents=True)
    store.mkdir()
    for file in (snapshot / "own", store / "blob", outside):
        file.touch()
    for name, target in (("inside", snapshot / "own"), ("stored", store / "blob"), ("out", outside)):
        (snapshot / name).symlink_to(target)
    refuse_what_is_no_file(snapshot, ["own", "inside", "stored", "absent"])
    with pytest.raises(CheckpointError, match="out: is a link out of its folder"):
        refuse_link_out(snapshot, snapshot / "out")
    # only where the hub's cache lays a folder out does the store belong to it
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "stored").symlink_to(store / "blob")
    with pytest.raises(CheckpointError, match="link out"):
        refuse_what_is_no_file(plain, ["stored"])
    (plain / "folder").mkdir()
    with pytest.raises(CheckpointError, match="is no file"):
        refuse_what_is_no_file(plain, ["folder"])
