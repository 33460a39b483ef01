import os

from df11_jax._files.file_stats import file_stats


def test_files_links_and_pipes(tmp_path):
    folder = tmp_path / "x"
    (folder / "b" / "c").mkdir(parents=True)
    (folder / "b" / "c" / "two").write_bytes(b"22")
    (folder / "a").write_bytes(b"1")
    (folder / "empty").mkdir()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "three").write_bytes(b"333")
    (folder / "link").symlink_to(outside / "three")
    (folder / "folder").symlink_to(outside)
    (folder / "loop").symlink_to(folder)
    (folder / "nowhere").symlink_to(tmp_path / "nothing")
    os.mkfifo(folder / "pipe")
    stats = file_stats(folder)
    assert list(stats) == ["a", "b/c/two", "link"]
    assert stats["link"] == f"3 bytes, {(outside / 'three').stat().st_mtime_ns} ns"


def test_every_change_shows(tmp_path):
    file = tmp_path / "d" / "file"
    file.parent.mkdir()
    file.write_bytes(b"1")
    os.utime(file, ns=(0, 5))
    before = file_stats(tmp_path)
    assert file_stats(tmp_path) == before
    os.utime(file, ns=(0, 6))
    touched = file_stats(tmp_path)
    file.write_bytes(b"12")
    os.utime(file, ns=(0, 5))
    longer = file_stats(tmp_path)
    file.rename(tmp_path / "d" / "other")
    renamed = file_stats(tmp_path)
    states = [before, touched, longer, renamed]
    assert all(a != b for i, a in enumerate(states) for b in states[:i])
