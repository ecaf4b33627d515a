"""A model of a Hugging Face hub as local files: only safetensors and text, into huggingface_hub's own cache, offline mode honoured."""

import re
from pathlib import Path

from httpx2 import HTTPError  # huggingface_hub's client, whose errors pass through it
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    FileMetadataError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from model_store.inspection import KEPT
from quantizers.errors import InvalidInput, NotFound

_REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/-]{0,254}")  # huggingface_hub makes a path of it


def download(repo_id: str, revision: str | None = None) -> dict[str, Path]:
    """The files of `repo_id` at `revision` (a branch, tag or commit; the default branch where None) by name, as paths without links.

    Blocks for the download; huggingface_hub draws its bars where a terminal is. Folders of the repository are left out, and so is all
    that is neither safetensors, JSON, a tokenizer nor a template. Raises NotFound and InvalidInput.
    """
    if revision is not None and not _REVISION.fullmatch(revision):
        raise InvalidInput(f"{revision[:80]!r} is no revision: use a branch, a tag or a commit", param="revision")
    try:
        snapshot = Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=[f"*{suffix}" for suffix in KEPT], ignore_patterns=["*/*"])
        )
    except HFValidationError as error:
        raise InvalidInput(f"{repo_id[:120]!r} is no Hugging Face id: it reads owner/name", param="repo_id") from error
    except RevisionNotFoundError as error:
        raise NotFound(f"{repo_id} has no revision {revision!r} on {constants.ENDPOINT}", param="revision") from error
    except GatedRepoError as error:
        raise NotFound(f"{repo_id} is gated: accept its terms on {constants.ENDPOINT} and set HF_TOKEN", param="repo_id") from error
    except RepositoryNotFoundError as error:
        raise NotFound(f"no model {repo_id} on {constants.ENDPOINT}; a private one needs HF_TOKEN", param="repo_id") from error
    except LocalEntryNotFoundError as error:  # offline by setting, or by the state of the network
        raise NotFound(
            f"{repo_id} is not whole in the cache {constants.HF_HUB_CACHE} and {constants.ENDPOINT} could not be asked "
            f"(HF_HUB_OFFLINE is {'on' if constants.is_offline_mode() else 'off'})",
            param="repo_id",
        ) from error
    except (HTTPError, FileMetadataError) as error:
        raise NotFound(
            f"{constants.ENDPOINT} did not give {repo_id} whole: {error}. Try again, what came is kept", param="repo_id"
        ) from error
    files = {path.name: path.resolve() for path in snapshot.iterdir() if path.name.endswith(KEPT)}
    home = snapshot.parent.parent.resolve()  # <cache>/models--owner--name; the snapshot's links lead to its blobs
    for filename, path in files.items():
        if not path.is_relative_to(home):
            raise InvalidInput(f"{filename} of {repo_id} leads out of the cache of that model", param="repo_id")
    return files
