"""Record the work of a CUDA device as a graph, in memory that all recordings of one loss share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch._inductor.cudagraph_trees import clear_cublas_manager


class Pool:
    """This class holds the memory that several recordings share; the first of them makes it.

    Recordings run one after the other, and each may overwrite the results of the others.

    Args:
        device: The device of all tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory: Any = None  # a torch.cuda.MemPool
        # PyTorch divides the memory of a stream among tensors of that stream only.
        self.stream: torch.cuda.Stream | None = None
        self.recorders: WeakSet[CudaRecorder] = WeakSet()
        self._last: torch.cuda.Stream | None = None

    def wait(self) -> None:
        """Make later work on the current stream wait for the last replay, which may still use the same memory."""
        now = torch.cuda.current_stream(self.device)
        if self._last is not None and self._last != now:
            now.wait_stream(self._last)
        self._last = now


class _Memory:
    """This class describes a tensor's memory to PyTorch, which then does not count as a user of it.

    Args:
        tensor: The tensor.
        owner: An object that keeps the memory from being given back.
    """

    def __init__(self, tensor: Tensor, owner: CudaRecorder) -> None:
        storage, size = tensor.untyped_storage(), tensor.element_size()
        self.__cuda_array_interface__ = {
            "shape": (storage.nbytes() // size * size,),
            "typestr": "|u1",
            "data": (storage.data_ptr(), False),
            "version": 2,
        }
        self._owner = owner


class CudaRecorder:
    """This class records the work of a device while a function runs, as a CUDA graph.

    Args:
        pool: The memory.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph()

    def record(self, function: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """Run the function and record its work, after ``wait``.

        Replays of all recordings in this memory may overwrite the results, and so may the making of another one.
        """
        device = self._pool.device
        with torch.cuda.device(device):
            is_first = not self._pool.recorders
            if is_first:
                self._pool.memory = torch.cuda.MemPool()
                self._pool.stream = torch.cuda.Stream()
            stream, now = self._pool.stream, torch.cuda.current_stream()
            assert stream is not None
            stream.wait_stream(now)
            most = 0
            with torch.cuda.stream(stream):
                # Libraries create their handles at the first use, and some kernels are compiled for each size.
                if is_first:
                    most = most_allocated(function, device)
                else:
                    with torch.cuda.use_mem_pool(self._pool.memory, device):
                        function()
            now.wait_stream(stream)
            # PyTorch keeps a workspace of cuBLAS for each stream, and frees all of them when ``torch.compile`` records
            # a step. Workspaces that are made during the recording lie in its own memory, which stays.
            with (
                clear_cublas_manager(),
                torch.cuda.graph(
                    self._graph, self._pool.memory.id, stream, capture_error_mode="thread_local"
                ),
            ):
                if is_first:
                    take_at_once(most, device)
                results = function()
            self._pool.recorders.add(self)
            return [self._shared(result) for result in results]

    def _shared(self, result: Tensor) -> Tensor:
        """Return a result whose memory other recordings may use, as PyTorch's own recordings do."""
        if not result.numel():
            return result
        memory = torch.as_tensor(_Memory(result, self), device=result.device)
        typed = memory.view(result.dtype)
        return typed.as_strided(result.shape, result.stride(), result.storage_offset())

    def wait(self) -> None:
        """Make later work on the current stream wait for the last replay of any recording in this memory."""
        self._pool.wait()

    def replay(self) -> None:
        """Repeat the recorded work on the same memory."""
        self._graph.replay()


def most_allocated(function: Callable[[], object], device: torch.device) -> int:
    """Run the function, and return the most bytes that it had allocated at a time.

    PyTorch's peak of allocated memory starts anew, because it cannot be read without that.
    """
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return torch.cuda.max_memory_allocated(device) - before


def take_at_once(size: int, device: torch.device) -> None:
    """Let the memory of a recording begin as one piece, which PyTorch divides among its tensors.

    Otherwise PyTorch takes a new piece from the device for each tensor that fits into no free one. A free piece rarely
    fits the next tensor, and a recording gives nothing back: GPT-2's took 7.4 GiB for 4.6 GiB of tensors.
    """
    torch.empty(size, dtype=torch.uint8, device=device)
