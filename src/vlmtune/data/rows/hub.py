"""A dataset repository of the hub, fetched once into the hub's own cache and then read as the folder that it is."""

from __future__ import annotations

import os

from vlmtune.config.hub import HUB_ID
from vlmtune.config.schema import HubSource, Mixed, SourceConfig
from vlmtune.data.rows.archives import is_archive
from vlmtune.data.rows.folders import settled
from vlmtune.data.rows.patterns import PICKLED, files_of
from vlmtune.errors import DataError

# Code, and what runs code when it is opened; nothing of these is ever read.
_NOT_FETCHED = ("*.py", *(f"*{ending}" for ending in PICKLED))


def fetched(source: HubSource) -> SourceConfig:
    """The repository's files as a source; the network is asked unless it is switched off.

    Raises:
        DataError: no such repository, or no network and nothing of it in the cache; no rows in it.
    """
    folder = _snapshot(source)
    how = {name: value for name, value in source if name in Mixed.model_fields}
    whole = SourceConfig(path=folder, split=source.split, **how)
    try:
        local = settled(whole, _asked_for(folder, source.data_files))
    except DataError as error:
        error.where = f"data.sources: {source.hub}"
        raise
    blobs = os.path.join(os.path.dirname(os.path.dirname(folder)), "blobs")
    if local.root is None and os.path.isdir(blobs) and not is_archive(files_of(local.path)[0]):
        # The cache keeps the contents there, and the files of the snapshot are links to them.
        local = local.model_copy(update={"root": (_folder_of(local.path), blobs)})
    return local


def _snapshot(source: HubSource) -> str:
    import huggingface_hub

    where = f"data.sources: {source.hub}"
    if not HUB_ID.fullmatch(source.hub):
        raise DataError("this is no name of a dataset on the hub", where=where, expected="owner/name")
    try:
        return huggingface_hub.snapshot_download(
            source.hub,
            repo_type="dataset",
            allow_patterns=list(source.data_files) or None,
            ignore_patterns=list(_NOT_FETCHED),
        )
    except (OSError, huggingface_hub.errors.HfHubHTTPError) as error:
        why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            why = "the network is switched off, and the hub's cache does not hold it"
        raise DataError(
            f"the dataset cannot be fetched ({why})",
            where=where,
            remedy="Correct the name, or download it on a machine with network and give the folder as `path`.",
        ) from error


def _asked_for(folder: str, patterns: tuple[str, ...]) -> list[str]:
    """The files that the patterns mean; a cache may hold others of the repository, from earlier calls."""
    from huggingface_hub.utils import filter_repo_objects

    found = [os.path.relpath(os.path.join(here, name), folder) for here, _, names in os.walk(folder) for name in names]
    kept = filter_repo_objects(sorted(found), allow_patterns=list(patterns) or None, ignore_patterns=list(_NOT_FETCHED))
    return list(kept)


def _folder_of(path: str) -> str:
    """The folder that a path or pattern starts from."""
    return path if os.path.isdir(path) else os.path.dirname(path.partition("{")[0])
