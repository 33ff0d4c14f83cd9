"""This module replaces the parameters of a model while a loss runs, and protects the model's buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clipgrad._functorch import is_wrapped
from clipgrad.errors import NotPerSampleError


class _Buffers(NamedTuple):
    """This tuple holds the buffers of one module from before the loss ran."""

    module: nn.Module
    tensors: dict[str, Tensor | None]
    versions: dict[str, int]


class ParameterSlots:
    """This class finds every place in a model that holds one of the given parameters, including tied weights.

    ``torch.func.functional_call`` would walk the model for every microbatch, and would leave the original weights in
    the flat weight list of a recurrent layer.

    Args:
        model: The model.
        parameters: Parameters to replace.

    Raises:
        ValueError: If a parameter belongs to a TorchScript module, where it cannot be replaced.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor]) -> None:
        positions = {id(parameter): index for index, parameter in enumerate(parameters)}
        self._parameters = list(parameters)
        self._slots: list[tuple[nn.Module, str, int]] = []
        self._flat: list[tuple[nn.RNNBase, list[int | None]]] = []
        self._frozen: list[tuple[nn.Module, str, Tensor]] = []
        self._modules: list[nn.Module] = []
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):
                _refuse_script(module, positions)
                continue
            self._modules.append(module)
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                index = positions.get(id(parameter))
                if index is not None:
                    self._slots.append((module, name, index))
                elif parameter.requires_grad:
                    self._frozen.append((module, name, parameter))
            if isinstance(module, nn.RNNBase):
                weights = [getattr(module, name, None) for name in module._flat_weights_names]
                self._flat.append((module, [positions.get(id(weight)) for weight in weights]))

    @contextmanager
    def holding(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Run the body with ``tensors[i]`` in every place of parameter ``i``.

        All other trainable parameters of the model are constants while the body runs.

        Raises:
            NotPerSampleError: If the body wrote to a buffer.
        """
        with self.guarded_buffers():
            flat = [list(module._flat_weights) for module, _ in self._flat]
            try:
                self._place(tensors)
                yield
            finally:
                self._restore(flat)

    @contextmanager
    def guarded_buffers(self) -> Iterator[None]:
        """Restore buffers after the body.

        Raises:
            NotPerSampleError: If the body wrote to one.
        """
        before = [_save_buffers(module) for module in self._modules if module._buffers]
        without = [module for module in self._modules if not module._buffers]
        try:
            yield
            for buffers in (*before, *_new_buffers(without)):
                _check_buffers(buffers)
        finally:
            for buffers in (*before, *_new_buffers(without)):
                _restore_buffers(buffers)

    def _place(self, tensors: Sequence[Tensor]) -> None:
        for module, name, index in self._slots:
            module._parameters[name] = tensors[index]  # type: ignore[assignment]
        for module, name, parameter in self._frozen:
            module._parameters[name] = parameter.detach()  # type: ignore[assignment]
        for recurrent, indices in self._flat:
            recurrent._flat_weights = [
                _constant(weight) if index is None else tensors[index]
                for weight, index in zip(recurrent._flat_weights, indices, strict=True)
            ]

    def _restore(self, flat: list[list[Tensor | None]]) -> None:
        for module, name, index in self._slots:
            module._parameters[name] = self._parameters[index]  # type: ignore[assignment]
        for module, name, parameter in self._frozen:
            module._parameters[name] = parameter  # type: ignore[assignment]
        for (recurrent, _), weights in zip(self._flat, flat, strict=True):
            recurrent._flat_weights = weights


def _constant(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.detach()


def _save_buffers(module: nn.Module) -> _Buffers:
    tensors = dict(module._buffers)
    versions = {
        name: buffer._version
        for name, buffer in tensors.items()
        if buffer is not None and not buffer.is_inference()
    }
    return _Buffers(module, tensors, versions)


def _new_buffers(modules: Iterable[nn.Module]) -> list[_Buffers]:
    """Return empty entries for modules that have buffers now and had none before."""
    return [_Buffers(module, {}, {}) for module in modules if module._buffers]


def _check_buffers(before: _Buffers) -> None:
    """Refuse a buffer that was written, replaced, or filled with per-sample values."""
    now = before.module._buffers
    for name in before.tensors.keys() | now.keys():
        was, buffer = before.tensors.get(name), now.get(name)
        if (
            was is None
        ):  # made in forward: a constant will be made again, and a per-sample value is refused
            changed = buffer is not None and is_wrapped(buffer)
        else:
            changed = buffer is not was or was._version != before.versions.get(name, was._version)
        if changed:
            raise NotPerSampleError(
                f"{type(before.module).__name__} wrote to its buffer {name!r} in forward. A buffer is shared by all "
                "samples and would carry their data past clipping and noise. Put the layer in eval mode, or "
                "return the value from the loss instead of storing it."
            )


def _restore_buffers(before: _Buffers) -> None:
    now = before.module._buffers
    if now.keys() != before.tensors.keys() or any(
        now[name] is not buffer for name, buffer in before.tensors.items()
    ):
        now.clear()
        now.update(before.tensors)


def _refuse_script(module: torch.jit.ScriptModule, positions: dict[int, int]) -> None:
    if any(id(parameter) in positions for parameter in module.parameters(recurse=False)):
        raise ValueError(
            f"{module.original_name} is a TorchScript module (torch.jit.script or trace), and uses of its parameters "
            "cannot be found in its code. Pass the Python module instead, or freeze its parameters: "
            "parameter.requires_grad_(False) for each."
        )
