"""Files that others have written: what may be read of a folder, and the hash by which it is known again."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

REFERENCE_KEYS = ("id", "revision", "subfolder")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def check_reference(who: str, reference: Mapping) -> None:
    """Of {"id", "revision", "subfolder"}: raises ValueError for another key, and for a path that leads out."""
    if set(reference) - set(REFERENCE_KEYS) or not isinstance(reference.get("id"), str | os.PathLike):
        raise ValueError(
            f"{who} is {dict(reference)!r}; a reference has the key 'id' and may have 'revision' and 'subfolder'."
        )
    for key in ("revision", "subfolder"):
        value = reference.get(key)
        if value not in (None, "") and not (isinstance(value, str) and is_below(value)):
            raise ValueError(f"{who} has the {key} {value!r}; give a name, or a path below it without '..'.")


def is_below(path: str) -> bool:
    """Whether a relative path stays in the folder that it starts in, by its parts alone, on any system."""
    parts = path.replace("\\", "/").split("/")
    return ".." not in parts and parts[0] != "" and ":" not in parts[0] and "\0" not in path


def check_inside(who: str, folder: str, paths: Iterable[str]) -> None:
    """Raises ValueError for a link to a place outside of the folder, as an archive of others' may have."""
    root = _root(Path(folder).resolve())
    for path in paths:
        place = Path(path).resolve()
        if not place.is_relative_to(root):
            raise ValueError(
                f"{who}: {path!r} is a link to {str(place)!r}, outside of {folder!r}. Put the file itself there, or "
                "give the folder that it is in."
            )


def _root(folder):
    """In the Hub's cache, whose snapshots are links to blobs beside them, that of the repository; else the folder."""
    for parent in folder.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return parent.parent
    return folder


def shard_names(who: str, index: str) -> list[str]:
    """The names of the files that an index names. Raises ValueError unless they are beside it."""
    folder, name = os.path.split(index)
    try:
        with open(index, encoding="utf-8") as file:
            files = sorted({str(name) for name in json.load(file)["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{who}: {name} in {folder!r} is broken ({error!r}). Save it again.") from error
    for file in files:
        if not is_below(file) or "/" in file.replace("\\", "/") or not file.endswith(".safetensors"):
            raise ValueError(f"{who}: the index in {folder!r} names {file!r}, which is no safetensors file beside it.")
    return files


def sha256_of(files: Iterable[str], more: bytes = b"") -> str:
    """Of the files' bytes one after another, as `cat FILES | sha256sum` gives it, and of `more` after them."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    digest.update(more)
    return digest.hexdigest()


def sync(path: str) -> None:
    """Returns when a file, or the names in a folder, are on disk."""
    opened = os.open(path, os.O_RDONLY)
    os.fsync(opened)
    os.close(opened)
