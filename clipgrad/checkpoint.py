"""Save and load checkpoints that survive a kill at any moment: one file, replaced as a whole or not at all."""

from __future__ import annotations

import glob
import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

_FORMAT = "clipgrad.checkpoint/1"
_log = logging.getLogger("clipgrad")
_said: set[str] = set()


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

    **Secret checkpoints.** A part whose attribute ``secret_state`` is a text has a state that must stay secret, and the
    text says why. An optimizer whose plan has correlated noise is one: its state holds the noise that was added. Only
    the owner may then read and write the file (mode 600), and the logger ``clipgrad`` says so once for each path.

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
        with os.fdopen(_created(beside, path, parts), "wb") as file:
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
    ``torch.Generator`` that you passed are repeated. Correlated noise goes on: new noise is drawn, and a part of the
    saved noise is taken back. So continue each checkpoint of such a run once, and publish nothing that was trained
    after the checkpoint from which you continue.

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


def _created(beside: Path, path: Path, parts: Mapping[str, Stateful]) -> int:
    """Return a descriptor of a new file, which only its owner may read if the state of a part is secret."""
    secrets_of = {
        name: text for name, part in parts.items() if (text := getattr(part, "secret_state", ""))
    }
    if secrets_of and str(path) not in _said:
        _said.add(str(path))
        _log.warning(
            "save_checkpoint: %s is secret, and only its owner may read it. %s. Keep copies as secret, also after the "
            "training, and publish the model's weights from a file of their own.",
            path,
            ". ".join(f"The state of {name!r} holds {text}" for name, text in secrets_of.items()),
        )
    mode = 0o600 if secrets_of else 0o666  # less what the process's umask takes away
    return os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)


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
