"""Put other tensors in the place of a module's parameters while a loss runs, and look after its buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from clipgrad.errors import NotPerSampleError


class ParameterSlots:
    """Every place in a module tree that holds one of the given parameters, tied places included.

    Made once and used at every step; ``torch.func.functional_call`` would walk the tree each time, and it leaves
    the flat weight list of a recurrent layer pointing at the originals.

    Args:
        model: The module tree.
        parameters: Parameters to swap.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor]) -> None:
        positions = {id(parameter): index for index, parameter in enumerate(parameters)}
        self._parameters = list(parameters)
        self._slots: list[tuple[nn.Module, str, int]] = []
        self._flat: list[tuple[nn.RNNBase, list[int | None]]] = []
        self._frozen: list[tuple[nn.Module, str, Tensor]] = []
        for module in model.modules():
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
        self._buffers = [
            (module, name)
            for module in model.modules()
            for name in module._buffers
            if module._buffers[name] is not None
        ]

    @contextmanager
    def holding(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Run the body with ``tensors[i]`` in every place of parameter ``i``.

        Parameters of the model that are trainable but not among the given ones are constants meanwhile.

        Raises:
            NotPerSampleError: If the body wrote to a buffer.
        """
        before = [
            (buffer, buffer._version)
            for module, name in self._buffers
            if (buffer := module._buffers[name]) is not None
        ]
        flat = [list(module._flat_weights) for module, _ in self._flat]
        try:
            self._place(tensors)
            yield
            self._check_buffers(before)
        finally:
            self._restore(flat, [buffer for buffer, _ in before])

    def _place(self, tensors: Sequence[Tensor]) -> None:
        for module, name, index in self._slots:
            module._parameters[name] = tensors[index]  # type: ignore[assignment]
        for module, name, parameter in self._frozen:
            module._parameters[name] = parameter.detach()  # type: ignore[assignment]
        for recurrent, indices in self._flat:
            recurrent._flat_weights = [
                weight if index is None else tensors[index]
                for weight, index in zip(recurrent._flat_weights, indices, strict=True)
            ]

    def _restore(self, flat: list[list[Tensor | None]], buffers: list[Tensor]) -> None:
        for module, name, index in self._slots:
            module._parameters[name] = self._parameters[index]  # type: ignore[assignment]
        for module, name, parameter in self._frozen:
            module._parameters[name] = parameter  # type: ignore[assignment]
        for (recurrent, _), weights in zip(self._flat, flat, strict=True):
            recurrent._flat_weights = weights
        for (module, name), buffer in zip(self._buffers, buffers, strict=True):
            module._buffers[name] = buffer

    def _check_buffers(self, before: Sequence[tuple[Tensor, int]]) -> None:
        for (module, name), (buffer, version) in zip(self._buffers, before, strict=True):
            if module._buffers[name] is not buffer or buffer._version != version:
                raise NotPerSampleError(
                    f"{type(module).__name__} wrote to its buffer {name!r} in forward. A buffer is shared by all "
                    "samples and would carry their data past clipping and noise. Put the layer in eval mode, or "
                    "return the value from the loss instead of storing it."
                )
