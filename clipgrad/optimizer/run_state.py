"""Define ``RunState``, which saves and loads a run of several ranks with ``torch.distributed.checkpoint``."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from clipgrad.optimizer.dp_optimizer import DPOptimizer

_FORMAT = "clipgrad.run_state/1"
_NAME = re.compile(r"step-(\d+)")


class Loader(Protocol):
    """This protocol describes a loader or sampler with a position."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position."""
        ...


class RunState:
    """This class saves model, optimizer, budget and position of a run, which may continue on another number of ranks.

    It is a ``Stateful`` of ``torch.distributed.checkpoint``, so ``dcp.save({"run": state}, ...)`` works. ``save`` and
    ``load`` also keep the checkpoint whole if a process is killed. All ranks must call them, between ``step()`` and the
    next ``backward()``. A restored run draws new noise and new batches.

    Args:
        model: The model.
        optimizer: The model's ``DPOptimizer``.
        loader: A loader of ``clipgrad.sampling`` without a generator; None if the run needs no position.

    Raises:
        ValueError: If a part cannot be saved for another number of ranks.

    Examples:
        >>> import tempfile, torch, clipgrad
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = clipgrad.DPOptimizer(
        ...     torch.optim.SGD(model.parameters(), lr=0.1),
        ...     model,
        ...     lambda model, x: model(x).sum(),
        ...     max_grad_norm=1.0,
        ...     noise_multiplier=1.0,
        ...     expected_batch_size=2,
        ... )
        >>> state = RunState(model, optimizer)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     state.load(folder), state.save(folder), state.load(folder)
        (False, None, True)
    """

    def __init__(
        self, model: nn.Module, optimizer: DPOptimizer, loader: Loader | None = None
    ) -> None:
        if hasattr(optimizer.inner, "consolidate_state_dict"):
            raise ValueError(
                "RunState cannot read the parts of a ZeroRedundancyOptimizer. Call optimizer.inner."
                "consolidate_state_dict(), then clipgrad.save_checkpoint on the first rank and load_checkpoint on all."
            )
        if optimizer.secret_state:
            raise ValueError(
                "RunState writes files that others can read, but the optimizer's state holds "
                f"{optimizer.secret_state}. Use clipgrad.save_checkpoint, on each rank "
                "with a file of its own."
            )
        self._model, self._optimizer, self._loader = model, optimizer, loader
        self._own()  # This refuses a state that cannot be saved here, not at the first checkpoint.

    def state_dict(self) -> dict[str, Any]:
        """Return the state; every rank must call this at the same step.

        Raises:
            RanksError: If the ranks are not at the same step of the same run.
        """
        from torch.distributed.checkpoint.state_dict import get_state_dict

        own = self._own()
        optimizer = self._optimizer
        ranks, parameters = optimizer._clipper.ranks, optimizer._trained.parameters
        ranks.compare_soon()
        ranks.meet(
            "checkpoint",
            optimizer._step_state.step,
            lambda: {"the state of the run": own},
            parameters,
        )
        model, inner = get_state_dict(self._model, optimizer.inner)
        return {"model": model, "optimizer": inner, "clipgrad": own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises:
            ValueError: If the state does not fit. Do not continue training then: the model may be restored already.
        """
        from torch.distributed.checkpoint.state_dict import set_state_dict

        own = json.loads(state["clipgrad"])
        if own.get("format") != _FORMAT:
            raise ValueError(
                f"state_dict has format {own.get('format')!r}, but {_FORMAT!r} is needed; load what RunState saved."
            )
        if (own["loader"] is None) != (self._loader is None):
            raise ValueError(
                "RunState: the checkpoint has the position of a loader, or lacks one. Make the RunState as it was "
                "saved, with a loader or without."
            )

        def load_inner() -> None:
            set_state_dict(
                self._model,
                self._optimizer.inner,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )

        self._optimizer._load(own["optimizer"], load_inner)
        if self._loader is not None:
            self._loader.load_state_dict(own["loader"])

    def save(self, folder: str | Path) -> None:
        """Write a checkpoint into a folder that all ranks can reach, and remove older ones.

        Args:
            folder: Folder of the checkpoints of one run. An unfinished checkpoint in it is ignored.
        """
        from torch.distributed.checkpoint.state_dict_saver import save

        folder = Path(folder)
        name = f"step-{self._optimizer._step_state.step}"
        beside = folder / f".{name}.part"
        with _alone_or_together():
            save({"run": self}, checkpoint_id=beside)
        # Every rank has written its part when save returns on the first rank, which writes the metadata last.
        if self._optimizer._clipper.ranks.rank == 0:
            shutil.rmtree(folder / name, ignore_errors=True)
            beside.rename(folder / name)
            for older in _finished(folder):
                if older.name != name:
                    shutil.rmtree(older)
        # All ranks wait here until the folder has its new name.
        self._optimizer._clipper.ranks.value_of_first(name)

    def load(self, folder: str | Path) -> bool:
        """Continue from the last finished checkpoint of a folder.

        Returns:
            Whether the folder holds a finished checkpoint. If not, nothing changes.
        """
        from torch.distributed.checkpoint.state_dict_loader import load

        found = _finished(Path(folder))
        name = self._optimizer._clipper.ranks.value_of_first(found[-1].name if found else "")
        if not name:
            return False
        with _alone_or_together():
            load({"run": self}, checkpoint_id=Path(folder) / name)
        return True

    def _own(self) -> str:
        """Return the state beside model and wrapped optimizer as JSON text, which is equal on all ranks."""
        loader = None if self._loader is None else self._loader.state_dict()
        own = {"format": _FORMAT, "optimizer": self._optimizer._own_state(), "loader": loader}
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(own)):
            raise ValueError(
                "RunState cannot save a generator, of which each rank has its own: a restart would draw the same "
                "numbers on several ranks. Use the default noise, and a loader without generator."
            )
        return json.dumps(own)


def _finished(folder: Path) -> list[Path]:
    """Return the finished checkpoints of a folder in order of their steps."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


@contextmanager
def _alone_or_together() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable", UserWarning)
        yield
