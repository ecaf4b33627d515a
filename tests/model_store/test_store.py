"""The data directory: what lasts, what is swept, and what a process that imports the store does not carry."""

import subprocess
import sys
from pathlib import Path

import pytest

from model_store.atomic import Staging
from model_store.store import Store
from quantizers.errors import Conflict, CorruptData


def test_importing_the_store_and_importing_a_checkpoint_need_no_torch(tiny: Path, tmp_path: Path) -> None:
    """The HTTP process holds a store; torch there would cost it 3 s and hundreds of megabytes."""
    program = (
        "import sys; from pathlib import Path; from model_store.store import Store\n"
        f"with Store(Path({str(tmp_path)!r})) as store:\n"
        f"    store.checkpoints.import_folder('tiny', Path({str(tiny)!r})); store.variants.list()\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'torch or transformers was imported'"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_second_store_of_the_directory_leaves_living_work_alone(tmp_path: Path) -> None:
    first = Staging(tmp_path)
    with first.folder() as folder:
        (folder / "x").write_text("x")
        Staging(tmp_path)
        assert (folder / "x").exists()


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    program = (
        "import os, signal; from pathlib import Path; from model_store.atomic import Staging\n"
        f"staging = Staging(Path({str(tmp_path)!r}))\n"
        "with staging.folder() as folder:\n"
        "    (folder / 'half').write_text('x'); print(folder, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    left = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip()
    assert (Path(left) / "half").exists()
    Staging(tmp_path)
    assert not Path(left).exists()


def test_stray_entries_of_tmp_are_swept_and_links_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    tmp = tmp_path / "tmp"
    (tmp / "stray").mkdir(parents=True)
    (tmp / "file").write_text("x")
    (tmp / "link").symlink_to(outside)
    Staging(tmp)
    assert not {"stray", "file", "link"} & {path.name for path in tmp.iterdir()}
    assert (outside / "kept").exists()


def test_a_folder_that_fails_to_fill_never_appears(tmp_path: Path) -> None:
    staging = Staging(tmp_path / "tmp")
    with pytest.raises(ZeroDivisionError), staging.folder() as folder:
        (folder / "half").write_text("x")
        raise ZeroDivisionError
    assert not folder.exists()


def test_publishing_does_not_replace_a_folder(tmp_path: Path) -> None:
    staging = Staging(tmp_path / "tmp")
    for content in ("first", "second"):
        with staging.folder() as folder:
            (folder / "x").write_text(content)
            if content == "first":
                staging.publish(folder, tmp_path / "target")
            else:
                with pytest.raises(Conflict, match="target"):
                    staging.publish(folder, tmp_path / "target")
    assert (tmp_path / "target" / "x").read_text() == "first"


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "precis.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(CorruptData, match=r"precis\.sqlite"):
        Store(tmp_path)


def test_a_database_of_another_schema_is_refused(tmp_path: Path) -> None:
    import sqlite3

    Store(tmp_path).close()
    connection = sqlite3.connect(tmp_path / "precis.sqlite")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(CorruptData, match="schema 99"):
        Store(tmp_path)
