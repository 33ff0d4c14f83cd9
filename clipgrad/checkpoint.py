"""Checkpoints that survive a kill at any moment: one file, replaced as a whole or not at all."""

from __future__ import annotations

import glob
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

_FORMAT = "clipgrad.checkpoint/1"


class Stateful(Protocol):
    """A model, an optimizer, a sampler, a scheduler: anything with these two methods."""

    def state_dict(self) -> Any:
        """The state, of what ``torch.load`` reads with ``weights_only=True``."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take up a state."""
        ...


def save_checkpoint(path: str | os.PathLike[str], parts: Mapping[str, Stateful]) -> None:
    """Write the state of all parts to one file.

    The file is written beside its place, flushed to the disk and then put there in one operation of the file system:
    whoever reads ``path`` finds the old checkpoint or the new one, never half of one, wherever the process was killed.
    One process at a time may write to it.
    Save between ``step()`` and the next ``backward()``: a logical batch in progress is not part of it.

    Args:
        path: Where to.
        parts: By name, all that changes while training: model, ``DPOptimizer`` (its noise, its ledger and its adaptive
            norm included), the loader or its sampler, learning-rate schedulers.

    Raises:
        OSError: If the file cannot be written; an older checkpoint is still there.

    Examples:
        >>> import tempfile
        >>> model = torch.nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(f"{folder}/run.pt", {"model": model})
        ...     load_checkpoint(f"{folder}/run.pt", {"model": torch.nn.Linear(2, 1)})
        True
    """
    path = Path(path)
    state = {
        "format": _FORMAT,
        "parts": {name: part.state_dict() for name, part in parts.items()},
    }
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with beside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        _put(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    _flush_folder(path.parent)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.part"):
        leftover.unlink(missing_ok=True)  # of a process that was killed


def load_checkpoint(
    path: str | os.PathLike[str],
    parts: Mapping[str, Stateful],
    *,
    map_location: torch.device | str | None = None,
) -> bool:
    """Restore all parts from a file that ``save_checkpoint`` wrote.

    Noise and batches of a restored run are drawn afresh, so that no noise is used twice; only what was drawn from a
    ``torch.Generator`` of your own is repeated.

    Args:
        path: Where from.
        parts: As they were given to ``save_checkpoint``, under the same names.
        map_location: Device to load tensors to, as for ``torch.load``; the parts copy them to where they live.

    Returns:
        Whether there was a checkpoint; without one nothing changes, and the training starts at its beginning.

    Raises:
        ValueError: If the file is no such checkpoint or holds other parts; nothing was restored. What a part refuses by
            itself comes out as it is. Optimizers are restored first, then the others in their order: do not go on
            training with parts that were restored by then.
    """
    path = Path(path)
    if not path.exists():
        return False
    # weights_only: a checkpoint is data, and must not be able to run code.
    found = torch.load(path, map_location=map_location, weights_only=True)
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise ValueError(
            f"path={str(path)!r} is no checkpoint of save_checkpoint; load it as it was saved."
        )
    saved, wanted = set(found["parts"]), set(parts)
    if saved != wanted:
        raise ValueError(
            f"parts must be those that were saved, {sorted(saved)}, got {sorted(wanted)}: a part that is left out "
            "would start anew, and noise, data or budget would be counted twice or not at all."
        )
    # Optimizers first: one with a plan refuses to forget steps, and then nothing else should have changed.
    for name in sorted(parts, key=lambda name: not isinstance(parts[name], torch.optim.Optimizer)):
        parts[name].load_state_dict(found["parts"][name])
    return True


def _put(beside: Path, path: Path) -> None:
    beside.replace(path)


def _flush_folder(folder: Path) -> None:
    """Make the new name durable, where a folder can be opened (not on Windows)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
