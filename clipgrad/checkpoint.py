"""Save and load checkpoints that survive a kill at any moment: one file, replaced as a whole or not at all."""

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
    """A stateful object has these two methods: a model, an optimizer, a sampler or a scheduler."""

    def state_dict(self) -> Any:
        """Return the state, which ``torch.load`` must be able to read with ``weights_only=True``."""
        ...

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Load a state."""
        ...


def save_checkpoint(path: str | os.PathLike[str], parts: Mapping[str, Stateful]) -> None:
    """Write the state of all parts to one file.

    The data is written to a temporary file in the same folder, flushed to the disk, and renamed to ``path`` in one
    operation of the file system. So ``path`` always holds the complete old or new checkpoint, even if the process is
    killed. Only one process at a time may write to ``path``.
    Save between ``step()`` and the next ``backward()``: the checkpoint does not contain an unfinished logical batch.

    Args:
        path: The path of the file.
        parts: All objects that change during training, by name: model, ``DPOptimizer`` (its state includes noise,
            ledger and adaptive norm), the loader or its sampler, learning-rate schedulers.

    Raises:
        OSError: If the file cannot be written; an older checkpoint is not changed.

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
        _replace_file(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    _flush_folder(path.parent)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}.part"):
        leftover.unlink(missing_ok=True)  # a killed process left it behind


def load_checkpoint(
    path: str | os.PathLike[str],
    parts: Mapping[str, Stateful],
    *,
    map_location: torch.device | str | None = None,
) -> bool:
    """Restore all parts from a file that ``save_checkpoint`` wrote.

    A restored run samples new noise and new batches, so that no noise is used twice. Only random numbers from a
    ``torch.Generator`` that you passed are repeated.

    Args:
        path: The path of the file.
        parts: The same parts as for ``save_checkpoint``, with the same names.
        map_location: Device to load tensors to, as for ``torch.load``; the parts copy them to their own device.

    Returns:
        Whether the file exists. If it does not, no part is changed, and the training starts from the beginning.

    Raises:
        ValueError: If the file is no such checkpoint or holds other parts; no part is changed. Errors of a part's
            ``load_state_dict`` are raised unchanged. Optimizers are restored first, then the other parts in their
            order; after an error, do not continue training with parts that are restored already.
    """
    path = Path(path)
    if not path.exists():
        return False
    # weights_only: a checkpoint is data, and must not be able to run code.
    found = torch.load(path, map_location=map_location, weights_only=True)
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise ValueError(
            f"path={str(path)!r} is no checkpoint of save_checkpoint; load it in the way it was saved."
        )
    saved, wanted = set(found["parts"]), set(parts)
    if saved != wanted:
        raise ValueError(
            f"parts must be those that were saved, {sorted(saved)}, got {sorted(wanted)}: a missing part would start "
            "from its beginning, and noise, data or budget would be counted twice or not at all."
        )
    # Optimizers first: an optimizer with a plan may refuse a state that forgets steps, before other parts have changed.
    for name in sorted(parts, key=lambda name: not isinstance(parts[name], torch.optim.Optimizer)):
        parts[name].load_state_dict(found["parts"][name])
    return True


def _replace_file(beside: Path, path: Path) -> None:
    beside.replace(path)


def _flush_folder(folder: Path) -> None:
    """Flush the new name to the disk if the system can open a folder (Windows cannot)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
