"""Gather the parameters of an FSDP2 module only while the module computes.

In the forward pass a module of ``fully_shard`` gathers its parameters before it runs, and frees them afterwards. In
the backward pass autograd reads a saved weight, or a recipe runs. The weight's module is then gathered again, and a
module that was gathered earlier is freed. The root's own parameters stay gathered for the whole batch. Freeing and
gathering change the memory of tensors but keep the tensor objects, so references in autograd and the tape stay valid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from clipgrad.distributed.fsdp import fsdp_modules
from clipgrad.distributed.saved_tensors import saved_by

# Number of modules beside the root that are whole in the backward pass, since an operation may need weights of two.
_KEPT = 2


class _Slot(NamedTuple):
    """This tuple holds a place in the model with its parameter, both whole and as FSDP's DTensor."""

    module: nn.Module
    name: str
    whole: Tensor
    sharded: DTensor


class Streaming:
    """This class gathers and frees the parameters of one model.

    Args:
        model: A model of ``fully_shard``. Its parameters are gathered once, module by module, to record them.
        reached: A context manager that names the step in errors of the collectives inside it.

    Attributes:
        root: Number of the module whose parameters stay whole; None if the model itself is no such module.
        streams: Whether modules are gathered one by one.
    """

    def __init__(
        self, model: nn.Module, reached: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._model = model
        self._reached = reached
        self._modules = fsdp_modules(model)
        self._slots = [self._slots_of(module) for module in self._modules]
        self._parameters = list(model.parameters())
        self._sharded = {
            _storage(slot.whole): slot.sharded for slots in self._slots for slot in slots
        }
        self._group_of_storage: dict[int, int] = {}
        for group, slots in enumerate(self._slots):
            for slot in slots:
                self._group_of_storage[_storage(slot.whole)] = group
        self.root = next(
            (i for i, m in enumerate(self._modules) if cast(nn.Module, m) is model), None
        )
        self._handles: list[RemovableHandle] = []
        self._here: list[int] = []
        self._coming: set[int] = set()
        # For each pass (backward or not) and module: the module that was gathered next the last time.
        self._followers: dict[tuple[bool, int], int] = {}
        self._last: int | None = None
        self._is_backward = False
        self._tensors: dict[int, Tensor] = {}
        self.streams = False
        self._places = False
        for group, module in enumerate(self._modules):
            self._watch(cast(nn.Module, module), group)

    def fits(self, model: nn.Module) -> bool:
        """Return whether ``model`` is this model and still holds the same sharded parameters."""
        return model is self._model and list(map(id, model.parameters())) == list(
            map(id, self._parameters)
        )

    def close(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()

    def group(self, whole: Tensor) -> int:
        """Return the number of the module with which a whole parameter is gathered."""
        return self._group_of_storage[_storage(whole)]

    def sharded(self, whole: Tensor) -> DTensor:
        """Return the sharded parameter of a whole parameter."""
        return self._sharded[_storage(whole)]

    def everything(self) -> list[Tensor]:
        """Return all whole parameters, each once."""
        return list(
            {id(slot.whole): slot.whole for slots in self._slots for slot in slots}.values()
        )

    def whole_parameters(self, names: Sequence[str]) -> list[Tensor]:
        """Return the whole parameters with these names; most of them have no memory at present."""
        prefixes = {id(module): name for name, module in self._model.named_modules()}
        found: dict[str, Tensor] = {}
        for slots in self._slots:
            for module, name, whole, _ in slots:
                prefix = prefixes[id(module)]
                found[f"{prefix}.{name}" if prefix else name] = whole
        return [found[name] for name in names]

    @contextmanager
    def running(self, *, whole: bool) -> Iterator[None]:
        """Gather and free modules while the body runs, and shard all modules afterwards.

        Args:
            whole: Gather all modules at the start, and free none before the end.
        """
        # A recurrent layer has a second list of its weights, which gathering a module does not update.
        self.streams = not (whole or any(isinstance(m, nn.RNNBase) for m in self._model.modules()))
        try:
            if not self.streams:
                self.gather_all()
            elif self.root is not None:
                self._gather(self.root)
            yield
        finally:
            self.streams = False
            self._free_all_but(None)

    def gather_all(self) -> None:
        """Gather all modules until ``running`` ends, since a captured graph calls no modules."""
        self.streams = False
        for group in range(len(self._modules)):
            if group not in self._here:
                self._gather(group)

    def free(self) -> None:
        """Free all modules but the root, until one is needed again."""
        if self.streams:
            self._free_all_but(self.root)
            self._last = None  # A module that is needed later does not follow the last one.

    @contextmanager
    def holding(self, parameters: Sequence[Tensor], tensors: Sequence[Tensor]) -> Iterator[None]:
        """Put ``tensors[i]`` in every place of whole parameter ``i`` while the parameter's module is gathered."""
        if all(a is b for a, b in zip(parameters, tensors, strict=True)):
            self.gather_all()
        self._tensors = {id(p): t for p, t in zip(parameters, tensors, strict=True)}
        self._places = True
        self._is_backward, self._last = False, None
        try:
            for group in self._here:
                self._place(group)
            yield
        finally:
            self._places = False
            for group in self._here:
                self._put_back(group)

    def before_recipe(self, parameters: Sequence[Tensor]) -> None:
        """Gather the modules of parameters whose values a recipe may read."""
        for parameter in parameters:
            self._need(parameter)

    def before_backward(self, roots: Sequence[Node | None]) -> None:
        """Hook the weights that the graph saved, so that reading one in the backward pass gathers its module."""
        if not self.streams:
            return
        self._is_backward, self._last = True, None
        seen: set[Node] = set()
        stack = list(roots)
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            for saved, tensor in saved_by(node):
                if _storage(tensor) in self._group_of_storage:
                    saved.register_hooks(_packed, self._unpacked)
            stack.extend(following for following, _ in node.next_functions)

    def _unpacked(self, packed: tuple[Tensor, int]) -> Tensor:
        tensor, version = packed
        if tensor._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"parameter of shape {tuple(tensor.shape)}"
            )
        self._need(tensor)
        return tensor

    def _need(self, tensor: Tensor) -> None:
        """Gather the module in whose memory the tensor is, and free modules that were needed earlier."""
        group = self._group_of_storage.get(_storage(tensor))
        if group is None or not self.streams:
            return
        if group in self._here:
            if group != self.root:
                self._here.remove(group)
                self._here.append(group)
            return
        while len([g for g in self._here if g != self.root]) >= _KEPT:
            self._free(next(g for g in self._here if g != self.root))
        self._gather(group)

    def _watch(self, module: nn.Module, group: int) -> None:
        def before(_: nn.Module, args: Any) -> None:
            if self.streams:
                self._gather(group)

        def after(_: nn.Module, args: Any, output: Any) -> None:
            if self.streams and group != self.root:
                self._free(group)

        self._handles.append(module.register_forward_pre_hook(before))
        self._handles.append(module.register_forward_hook(after))

    def _gather(self, group: int) -> None:
        self._unshard(self._modules[group])
        self._coming.discard(group)
        if group not in self._here:
            self._here.append(group)
        if self._places:
            self._place(group)
        if self.streams:
            self._start_next(group)

    def _start_next(self, group: int) -> None:
        """Start to gather the module that followed this one the last time, while this module computes."""
        if self._last is not None and self._last != group:
            self._followers[self._is_backward, self._last] = group
        self._last = group
        following = self._followers.get((self._is_backward, group))
        if following is not None and following not in self._here and following not in self._coming:
            with self._reached(), torch._C.DisableTorchFunction():
                self._modules[following].unshard(async_op=True)
            self._coming.add(following)

    def _unshard(self, module: FSDPModule) -> None:
        # The mode that captures the loss must not see FSDP's operations.
        with self._reached(), torch._C.DisableTorchFunction():
            module.unshard()

    def _free(self, group: int) -> None:
        with torch._C.DisableTorchFunction():
            self._modules[group].reshard()
        if group in self._here:
            self._here.remove(group)

    def _free_all_but(self, kept: int | None) -> None:
        for group in self._coming:
            self._unshard(self._modules[group])  # A gathering that was started cannot be cancelled.
        self._coming.clear()
        for group in range(len(self._modules)):
            if group != kept:
                self._free(group)

    def _place(self, group: int) -> None:
        for module, name, whole, _ in self._slots[group]:
            tensor = self._tensors.get(id(whole))
            if tensor is None:
                tensor = whole.detach() if whole.requires_grad else whole
            module._parameters[name] = tensor  # type: ignore[assignment]

    def _put_back(self, group: int) -> None:
        for module, name, whole, _ in self._slots[group]:
            module._parameters[name] = whole  # type: ignore[assignment]

    def _slots_of(self, gathered: FSDPModule) -> list[_Slot]:
        """Gather one module's parameters, and return their places in the model."""
        places: list[tuple[nn.Module, str, Any]] = [
            (module, name, parameter)
            for module in self._model.modules()
            for name, parameter in cast(dict[str, Any], module._parameters).items()
            if isinstance(parameter, DTensor)
        ]
        self._unshard(gathered)
        try:
            now = [module._parameters[name] for module, name, _ in places]
            return [
                _Slot(module, name, whole, before)
                for (module, name, before), whole in zip(places, now, strict=True)
                if whole is not None and not isinstance(whole, DTensor)
            ]
        finally:
            gathered.reshard()


def _storage(tensor: Tensor) -> int:
    """Return a number for a tensor's storage, which stays the same when its memory is freed and allocated again."""
    return int(tensor.untyped_storage()._cdata)


def _packed(tensor: Tensor) -> tuple[Tensor, int]:
    # A detached tensor shares the version counter. A tensor with its graph would keep itself alive.
    detached = tensor.detach()
    return detached, detached._version
