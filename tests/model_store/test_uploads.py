"""Uploads in parts: streamed, resumable, whole or absent."""

import asyncio
import hashlib
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from model_store.store import Store
from model_store.uploads import Upload
from quantizers.errors import Conflict, InvalidInput, NotFound, TooLarge

CONTENT = bytes(range(256)) * 40


def created(store: Store, size: int = len(CONTENT)) -> Upload:
    return store.uploads.create("model.gguf", size, "application/octet-stream", "user_data")


def leftovers(store: Store) -> list[Path]:
    """Files under tmp/ that are neither locks nor folders: what an interrupted write would leave."""
    return [path for path in (store.data_dir / "tmp").rglob("*") if path.is_file() and path.name != ".lock"]


async def stream(*chunks: bytes, then: BaseException | None = None) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk
    if then is not None:
        raise then


def test_parts_in_any_order_become_one_file_in_the_order_named(store: Store) -> None:
    upload = created(store)
    assert upload.status == "pending" and upload.id.startswith("upload_") and upload.expires_at > upload.created_at and upload.file is None
    second = store.uploads.add_part_from(upload.id, [CONTENT[5000:]])
    first = asyncio.run(store.uploads.add_part(upload.id, stream(CONTENT[:3000], CONTENT[3000:5000])))
    assert [(part.id, part.bytes) for part in store.uploads.parts(upload.id)] == [(second.id, len(CONTENT) - 5000), (first.id, 5000)]
    done = store.uploads.complete(upload.id, [first.id, second.id], md5=hashlib.md5(CONTENT).hexdigest().upper())
    assert done.status == "completed" and done.file is not None
    assert done.file.id.startswith("file-") and (done.file.bytes, done.file.filename) == (len(CONTENT), "model.gguf")
    assert done.file.sha256 == hashlib.sha256(CONTENT).hexdigest()
    assert store.files.path(done.file.id).read_bytes() == CONTENT
    assert not (store.data_dir / "uploads" / upload.id).exists() and leftovers(store) == []
    assert store.files.list() == [done.file] == [store.files.get(done.file.id)]


def test_completing_again_in_the_same_words_gives_the_same_file(store: Store) -> None:
    """A client whose answer was lost asks again."""
    upload = created(store)
    part = store.uploads.add_part_from(upload.id, [CONTENT])
    done = store.uploads.complete(upload.id, [part.id])
    assert store.uploads.complete(upload.id, [part.id]) == done
    with pytest.raises(Conflict, match="is completed"):
        store.uploads.complete(upload.id, [part.id, part.id])
    with pytest.raises(Conflict, match="is completed"):
        store.uploads.add_part_from(upload.id, [b"x"])


def test_an_upload_is_resumed_in_another_process(store: Store) -> None:
    upload = created(store)
    first = store.uploads.add_part_from(upload.id, [CONTENT[:5000]])
    with Store(store.data_dir) as other:
        assert other.uploads.parts(upload.id) == [first]
        second = other.uploads.add_part_from(upload.id, [CONTENT[5000:]])
        done = other.uploads.complete(upload.id, [first.id, second.id])
    assert done.file is not None and store.files.path(done.file.id).read_bytes() == CONTENT


def test_an_interrupted_part_leaves_nothing(store: Store) -> None:
    upload = created(store)
    with pytest.raises(ConnectionResetError):
        asyncio.run(store.uploads.add_part(upload.id, stream(CONTENT[:100], then=ConnectionResetError())))
    assert store.uploads.parts(upload.id) == [] and leftovers(store) == []
    assert list((store.data_dir / "uploads" / upload.id).iterdir()) == []


def test_parts_that_arrive_at_once(store: Store) -> None:
    upload = created(store)

    async def send() -> list[str]:
        pieces = [CONTENT[begin : begin + 1024] for begin in range(0, len(CONTENT), 1024)]
        return [part.id for part in await asyncio.gather(*(store.uploads.add_part(upload.id, stream(piece)) for piece in pieces))]

    done = store.uploads.complete(upload.id, asyncio.run(send()))
    assert done.file is not None and store.files.path(done.file.id).read_bytes() == CONTENT


@pytest.mark.parametrize("wrong", ["unknown", "twice", "too few", "none"])
def test_part_ids_that_do_not_make_the_file(wrong: str, store: Store) -> None:
    upload = created(store)
    ids = [store.uploads.add_part_from(upload.id, [CONTENT[:5000]]).id, store.uploads.add_part_from(upload.id, [CONTENT[5000:]]).id]
    given = {"unknown": [ids[0], "part_of-another"], "twice": [*ids, ids[0]], "too few": ids[:1], "none": []}[wrong]
    with pytest.raises(InvalidInput) as caught:
        store.uploads.complete(upload.id, given)
    assert caught.value.param == "part_ids"
    assert store.uploads.complete(upload.id, ids).status == "completed"  # the upload survives the mistake


def test_a_wrong_md5_keeps_the_upload(store: Store) -> None:
    upload = created(store)
    part = store.uploads.add_part_from(upload.id, [CONTENT])
    with pytest.raises(InvalidInput, match="MD5") as caught:
        store.uploads.complete(upload.id, [part.id], md5="0" * 32)
    assert caught.value.param == "md5"
    assert store.files.list() == [] and leftovers(store) == [] and list((store.data_dir / "files").iterdir()) == []
    assert store.uploads.get(upload.id).status == "pending"


def test_limits(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TooLarge, match="allowed are 1048576"):
        created(store, (1 << 20) + 1)
    for size in (0, -1):
        with pytest.raises(InvalidInput, match="bytes"):
            created(store, size)
    upload = created(store, 10)
    with pytest.raises(TooLarge, match="more bytes than the 10"):
        store.uploads.add_part_from(upload.id, [b"x" * 11])
    with pytest.raises(InvalidInput, match="empty"):
        store.uploads.add_part_from(upload.id, [b""])
    for _ in range(2):
        store.uploads.add_part_from(upload.id, [b"x" * 10])
    with pytest.raises(TooLarge, match="2 parts of 20 bytes"):
        store.uploads.add_part_from(upload.id, [b"x"])
    assert leftovers(store) == []
    free = type("Usage", (), {"free": 19})()
    monkeypatch.setattr("shutil.disk_usage", lambda path: free)
    with pytest.raises(TooLarge, match="the disk has 19 left"):
        created(store, 10)


@pytest.mark.parametrize("filename", ["", "..", "../x", "a/b", "a\\b", "a\n", ".x", "x" * 256, "ä" * 128])
def test_names_that_are_no_file_names(filename: str, store: Store) -> None:
    with pytest.raises(InvalidInput) as caught:
        store.uploads.create(filename, 1, "application/octet-stream", "user_data")
    assert caught.value.param == "filename"


def test_cancelling_drops_the_parts(store: Store) -> None:
    upload = created(store)
    store.uploads.add_part_from(upload.id, [CONTENT])
    for _ in range(2):
        assert store.uploads.cancel(upload.id).status == "cancelled"
    assert store.uploads.parts(upload.id) == [] and not (store.data_dir / "uploads" / upload.id).exists()
    for use in (lambda: store.uploads.add_part_from(upload.id, [b"x"]), lambda: store.uploads.complete(upload.id, [])):
        with pytest.raises(Conflict, match="is cancelled"):
            use()


def test_stale_uploads_expire(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = created(store)
    store.uploads.add_part_from(upload.id, [CONTENT])
    assert store.uploads.expire(upload.expires_at - 1) == []
    monkeypatch.setattr(time, "time", lambda: upload.expires_at + 1.0)
    with pytest.raises(Conflict, match="is expired"):  # also before anyone swept
        store.uploads.add_part_from(upload.id, [b"x"])
    assert store.uploads.expire(time.time()) == [upload.id]
    assert store.uploads.get(upload.id).status == "expired"
    assert not (store.data_dir / "uploads" / upload.id).exists()
    assert store.uploads.counts() == {"pending": 0, "completed": 0, "cancelled": 0, "expired": 1}


def test_cancelling_while_a_part_streams_refuses_the_part(store: Store) -> None:
    upload = created(store)

    async def chunks() -> AsyncIterator[bytes]:
        yield CONTENT[:10]
        await asyncio.to_thread(store.uploads.cancel, upload.id)
        yield CONTENT[10:20]

    with pytest.raises(Conflict, match="is cancelled"):
        asyncio.run(store.uploads.add_part(upload.id, chunks()))
    assert leftovers(store) == []


def test_two_completions_at_once_make_one_file(store: Store) -> None:
    upload = created(store)
    part = store.uploads.add_part_from(upload.id, [CONTENT])
    outcomes: list[object] = []

    def complete() -> None:
        try:
            outcomes.append(store.uploads.complete(upload.id, [part.id]))
        except Conflict as error:
            outcomes.append(error)

    threads = [threading.Thread(target=complete) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 4 and any(isinstance(each, Upload) for each in outcomes)
    assert len(store.files.list()) == 1 == len(list((store.data_dir / "files").iterdir()))


def test_deleted_files_and_unknown_ids(store: Store) -> None:
    upload = created(store)
    done = store.uploads.complete(upload.id, [store.uploads.add_part_from(upload.id, [CONTENT]).id])
    assert done.file is not None
    store.files.delete(done.file.id)
    assert list((store.data_dir / "files").iterdir()) == []
    assert store.uploads.get(upload.id).file is None
    for use in (store.files.get, store.files.path, store.files.delete, store.uploads.get, store.uploads.parts, store.uploads.cancel):
        with pytest.raises(NotFound):
            use("../../etc")


def test_what_no_row_knows_is_swept_at_start(store: Store) -> None:
    """A crash between the rename and the commit."""
    upload = created(store)
    (store.data_dir / "files" / "file-orphan").write_bytes(b"x")
    (store.data_dir / "uploads" / "upload_orphan").mkdir()
    with Store(store.data_dir):
        pass
    assert list((store.data_dir / "files").iterdir()) == []
    assert [path.name for path in (store.data_dir / "uploads").iterdir()] == [upload.id]
