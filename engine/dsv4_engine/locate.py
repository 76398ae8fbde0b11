"""From the name a user gives to a checkpoint folder: a folder, an alias, or a hub id that was downloaded before.

Owns the names of a checkpoint's files and the mark of a download, so that an unfinished one is not taken for a model.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from shlex import quote
from typing import Any

from .errors import InputError
from .strict_json import parse_json

BUNDLED = "tiny"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DOWNLOAD_MARK = ".dsv4-download"  # in a folder of one's own, the folder of what is a download's and not the model's
DOWNLOAD_STATE = "state.json"
HUB_ALIASES = {"v4-flash": "deepseek-ai/DeepSeek-V4-Flash", "v4-pro": "deepseek-ai/DeepSeek-V4-Pro"}


def resolve_model(name: str | Path) -> Path:
    """The checkpoint folder that ``name`` means.  Raises InputError when it means none.

    name: a folder with a config.json; "tiny" (the bundled model); "v4-flash", "v4-pro" or a hub id "owner/name",
    looked up in the local hub cache and never downloaded here.
    """
    text = str(name)
    if text == BUNDLED:
        return Path(str(resources.files("dsv4_engine"))) / "bundled" / "dsv4-tiny"
    path = Path(text).expanduser()
    if path.is_dir():
        if (state := download_state(path)) and not state["finished"]:
            raise InputError(
                f"{text}: the download of {state['repo']} into it is unfinished",
                f"Finish it: dsv4 download {state['repo']} --revision {state['revision']} --dir {quote(text)}",
            )
        if not (path / "config.json").is_file():
            raise InputError(
                f"{text}: the folder has no config.json",
                "Name the folder that holds config.json and the .safetensors files.",
            )
        return path
    if path.is_file():
        raise InputError(
            f"{text} is a file, not a model", "Name the folder that holds config.json and the .safetensors files."
        )
    return _in_hub_cache(hub_id(text), text)


def download_state(folder: Path) -> dict[str, Any] | None:
    """What `dsv4 download --dir` noted in its folder: repo, revision, commit and finished; None where it did not."""
    path = folder / DOWNLOAD_MARK / DOWNLOAD_STATE
    try:
        state = parse_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        state = None
    if not isinstance(state, dict) or not {"repo", "revision", "finished"} <= state.keys():
        raise InputError(f"{path} is damaged", f"Remove {path.parent} and run dsv4 download again.")
    return state


def hub_id(name: str) -> str:
    """The hub's name, owner/name, of an alias or of itself.  Raises InputError for what cannot be one."""
    repo = HUB_ALIASES.get(name, name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or repo.startswith("."):
        raise InputError(
            f"unknown model {name!r}",
            f"Name a checkpoint folder, a hub id (owner/name), or one of: {BUNDLED}, {', '.join(HUB_ALIASES)}.",
        )
    return repo


def _in_hub_cache(repo: str, name: str) -> Path:
    """The default revision's snapshot.  Its config.json is linked last, so that one without it is unfinished."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(repo, "config.json")
    except HFValidationError as error:
        raise InputError(f"{name}: no such folder, and no name of a model on the hub", "Write owner/name.") from error
    if isinstance(config, str):
        return Path(config).parent
    storage = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    if others := sorted(storage.glob("snapshots/*/config.json")):
        raise InputError(
            f"{name}: the main revision of {repo} is not downloaded, but another is",
            f"Name its folder, {others[0].parent}, or: dsv4 download {name}",
        )
    if any(storage.glob("blobs/*")):
        raise InputError(f"{name}: the download of {repo} is unfinished", f"Finish it: dsv4 download {name}")
    raise InputError(
        f"{name}: no such folder, and {repo} is not in the local hub cache", f"Download it first: dsv4 download {name}"
    )
