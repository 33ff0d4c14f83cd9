"""No block of a cipher is asked for twice with the same key, whatever becomes of the noise source."""

import copy
import hashlib
import hmac
import itertools
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers.modes import CTR, GCM
from torch import Tensor

from clipgrad.noise import SystemNoise, accelerator, keys, keystream
from clipgrad.noise import cpu as cpu_module
from clipgrad.noise.keys import KeyDeriver
from tests.noise_checks import PIECE

Use = tuple[bytes, int, int]  # key, first byte, end


@dataclass
class Recorder:
    """Stands where the ``cryptography`` package's cipher is made, and notes what it is asked for."""

    real: Callable[..., Any]
    uses: list[Use] = field(default_factory=list)

    def __call__(self, algorithm: Any, mode: Any) -> Any:
        recorder, encryptor = self, self.real(algorithm, mode).encryptor()
        if isinstance(mode, GCM):
            # SP 800-38D, 7.1: block 0 makes the checksum's key, block 1 ends it; bytes are encrypted from block 2 on.
            assert len(mode.initialization_vector) == 12
            start = 16 * (int.from_bytes(mode.initialization_vector, "big") * 2**32 + 2)
        else:
            assert isinstance(mode, CTR)
            start = 16 * int.from_bytes(mode.nonce, "big")

        class Encryptor:
            def __init__(self) -> None:
                self.at = start

            def update_into(self, data: memoryview, buffer: memoryview) -> None:
                recorder.uses.append((algorithm.key, self.at, self.at + len(data)))
                self.at += len(data)
                encryptor.update_into(data, buffer)

        class Made:
            def encryptor(self) -> Encryptor:
                return Encryptor()

        return Made()


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    keystream.fastest_mode()  # tries both ciphers, once a process, with a key that makes no noise
    made = Recorder(keystream.Cipher)
    monkeypatch.setattr(keystream, "Cipher", made)
    return made


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def check_no_overlap(uses: list[Use]) -> None:
    by_key: dict[bytes, list[tuple[int, int]]] = {}
    for key, start, end in uses:
        assert len(key) == 16
        by_key.setdefault(key, []).append((start, end))
    for ranges in by_key.values():
        ranges.sort()
        for (_, end), (start, _) in itertools.pairwise(ranges):
            assert end <= start, "a key was used twice for the same blocks"


def some_calls(source: SystemNoise) -> None:
    """Pieces that threads share and others, small tensors, both dtypes, gaps, an odd number of values."""
    totals = [torch.zeros(17 * PIECE), torch.zeros(9), torch.zeros(3, 5, dtype=torch.float64)]
    totals += [torch.zeros(40, 60)[:, ::2], torch.zeros(11, dtype=torch.bfloat16)]
    for _ in range(3):
        source.add_gaussian_(totals, 1.0)
        source.add_gaussian_([torch.zeros(4)], 2.0)


def from_numpy(source: SystemNoise) -> None:
    # Not torch.zeros: in a forked child it would wait for OpenMP threads that only the parent has.
    source.add_gaussian_([torch.from_numpy(np.zeros(3 * PIECE, dtype=np.float32))], 1.0)


def in_forked_child(source: SystemNoise, recorder: Recorder) -> list[Use]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            del recorder.uses[:]
            from_numpy(source)
            with os.fdopen(writer, "wb") as pipe:
                pickle.dump(recorder.uses, pipe)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        uses: list[Use] = pickle.load(pipe)
    os.waitpid(pid, 0)
    assert uses
    return uses


def in_spawned_child(source: SystemNoise, queue: Any) -> None:
    keystream.fastest_mode()
    recorder = Recorder(keystream.Cipher)
    keystream.Cipher = recorder  # type: ignore[assignment, misc]
    from_numpy(source)
    queue.put(recorder.uses)


def everything(recorder: Recorder, *, compile: bool = True) -> list[Use]:
    """All that may happen to a source, in one list of uses."""
    source = SystemNoise(compile=compile)
    some_calls(source)
    relatives = [copy.copy(source), copy.deepcopy(source), pickle.loads(pickle.dumps(source))]
    restored = SystemNoise(compile=compile)
    restored.load_state_dict(source.state_dict())
    relatives += [restored, SystemNoise(), SystemNoise(draws=3, compile=compile)]
    for relative in relatives:
        some_calls(relative)
    source.load_state_dict(source.state_dict())
    some_calls(source)
    barrier = threading.Barrier(4)

    def call(_: int) -> None:
        barrier.wait()
        some_calls(source)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(4)))
    if hasattr(os, "fork"):
        recorder.uses += in_forked_child(source, recorder) + in_forked_child(source, recorder)
    some_calls(source)
    return recorder.uses


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("mode", [CTR, GCM])
@pytest.mark.parametrize("compile", [False, True])
def test_no_key_and_counter_twice(
    recorder: Recorder, compile: bool, mode: type[CTR | GCM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keystream, "fastest_mode", lambda: mode)
    monkeypatch.setattr(cpu_module, "_MANY", 16 * PIECE)  # threads of Python's take part
    uses = everything(recorder, compile=compile)
    assert len({key for key, _, _ in uses}) > 50
    assert len(uses) > 300
    check_no_overlap(uses)


@pytest.mark.nightly
def test_a_spawned_process_has_keys_of_its_own(recorder: Recorder) -> None:
    source = SystemNoise()
    from_numpy(source)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    children = [context.Process(target=in_spawned_child, args=(source, queue)) for _ in range(2)]
    for child in children:
        child.start()
    uses = [use for _ in children for use in queue.get(timeout=120)]
    for child in children:
        child.join()
    from_numpy(source)
    assert len({key for key, _, _ in uses}) == 2
    check_no_overlap(recorder.uses + uses)


class StandingStill(KeyDeriver):
    """The number in a key's derivation is not counted on."""

    def key(self, device: torch.device, size: int) -> bytes:
        self._handed_out = 0
        return super().key(device, size)


class Limping(KeyDeriver):
    """Every second number is handed out twice."""

    def key(self, device: torch.device, size: int) -> bytes:
        self._handed_out -= self._handed_out % 3 == 2
        return super().key(device, size)


@pytest.mark.parametrize("broken", [StandingStill, Limping])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.usefixtures("four_threads")
def test_a_broken_derivation_is_found(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, broken: type[KeyDeriver]
) -> None:
    monkeypatch.setattr("clipgrad.noise.system.KeyDeriver", broken)
    with pytest.raises(AssertionError, match="used twice"):
        check_no_overlap(everything(recorder))


@pytest.mark.parametrize("place", ["process", "master"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_an_inherited_key_is_found(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    if place == "process":  # forked children go on with their parent's key
        monkeypatch.setattr("clipgrad.noise.system.process", lambda: (1, 0))
        monkeypatch.setattr(keys, "process", lambda: (1, 0))
    else:  # all sources have the same
        monkeypatch.setattr(keys, "new_master", lambda: bytes(32))
    with pytest.raises(AssertionError, match="used twice"):
        check_no_overlap(everything(recorder))


def test_what_a_key_is_made_of() -> None:
    infos = {
        keys._info(number, device)
        for number in (0, 1, 256, 2**40)
        for device in ("cpu", "cuda:0", "cuda:1", "cuda:10")
    }
    assert len(infos) == 4 * 4
    masters = {keys.new_master() for _ in range(100)}
    assert len(masters) == 100
    assert {len(master) for master in masters} == {32}


def test_the_derivation_is_that_of_rfc_5869(monkeypatch: pytest.MonkeyPatch) -> None:
    master = bytes(range(32))
    monkeypatch.setattr(keys, "new_master", lambda: master)
    key_deriver = KeyDeriver()
    for number, device in enumerate(["cpu", "cuda:1", "cpu"]):
        info = b"clipgrad.noise/1" + number.to_bytes(8, "big")
        expected = hmac.digest(master, info + device.encode() + b"\x01", hashlib.sha256)
        assert key_deriver.key(torch.device(device), 32) == expected


def test_noise_copied_to_a_device_has_keys_of_its_own(recorder: Recorder) -> None:
    """The CPU stands in for a device without a cipher."""
    makers = SystemNoise()
    makers.add_gaussian_([torch.zeros(5)], 1.0)
    assert makers._process_noise is not None
    key_deriver, cpu = makers._process_noise._key_deriver, makers._process_noise._cpu
    device = torch.device("cpu")
    copied = accelerator.AcceleratorNoise(device, key_deriver, cpu, 1)
    total: Tensor = torch.zeros(100_000)
    for _ in range(2):
        copied.add([total], 1.0)
        makers.add_gaussian_([total], 1.0)
    assert len({key for key, _, _ in recorder.uses}) == 5  # a key for each call
    check_no_overlap(recorder.uses)
    assert abs(float(total.std()) - 2.0) < 0.04
