"""Files of a model repository on the Hugging Face hub, by the hub's own client (the `hub` extra)."""

from __future__ import annotations

from pathlib import Path

from lorax.errors import LoraxError

_MODEL = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja")


def from_hub(repo: str, file: str | None = None) -> Path:
    """A repository's model files as a directory in the client's cache, or one file of it.

    Args:
        repo: `org/name`.
        file: this file alone.

    Raises:
        LoraxError: no name of a repository, the client is not installed, or what was asked for cannot be fetched.
    """
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise LoraxError(f"hf:{repo}: a hub name has the form hf:org/name")
    try:
        import huggingface_hub as hub
    except ImportError:
        raise LoraxError(f"hf:{repo}: the hub needs an extra package; pip install 'lorax-flax[hub]'") from None
    try:
        if file is not None:
            return Path(hub.hf_hub_download(repo, file))
        return Path(hub.snapshot_download(repo, allow_patterns=list(_MODEL)))
    except Exception as error:
        # The hub's client raises many kinds, network errors of its HTTP library among them.
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LoraxError(f"hf:{repo}: cannot be fetched ({first}); check the name and the connection") from error
