"""Checkpoints by their id on the Hugging Face hub, through its own cache."""

from __future__ import annotations

import re
from pathlib import Path

from outgrow.errors import OutgrowError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*", "README.md"]
# The same weights once more, in their makers' own form or for other programs; a "*" of the hub's patterns goes over "/" too.
_COPIES = ["consolidated*", "*/*.safetensors"]


def local(source: str) -> Path:
    """The place of a source on this machine: a path that exists, or a hub id, `owner/name` or `owner/name@revision`.

    What the cache lacks is downloaded; pickled weights are not.
    """
    if not source:  # which a Path would take for the current directory
        raise OutgrowError("the source is an empty text; give a directory, a file or a hub id")
    if Path(source).exists() or not _ID.fullmatch(source):
        return Path(source)
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ModuleNotFoundError:
        raise OutgrowError(f"there is no '{source}' here; to look for it on the hub, pip install 'outgrow[train]'") from None
    name, _, revision = source.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=_FILES, ignore_patterns=_COPIES))
    except LocalEntryNotFoundError:
        raise OutgrowError(
            f"there is no '{source}' here or in the hub's cache, and the hub cannot be reached; give a local directory"
        ) from None
    except HFValidationError:
        raise OutgrowError(f"there is no '{source}' here, and it is no id of the hub; give a directory or owner/name") from None
    except HfHubHTTPError as error:
        raise OutgrowError(f"the hub does not give '{source}': {str(error).splitlines()[0]}") from None
    except OSError as error:
        raise OutgrowError(f"there is no '{source}' here, and the hub cannot be reached ({error}); give a local directory") from None
