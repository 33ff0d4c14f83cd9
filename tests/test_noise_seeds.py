"""Private noise is never the same twice; seeded noise is the same whenever it should be."""

import copy
import os
import pickle
import select
import signal
import traceback
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from clipgrad.noise import NoiseSource, SystemNoise, keys
from tests.dp_tools import through_a_file
from tests.noise_checks import PIECE, check_independent, draw, seeded


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def in_forked_child(source: NoiseSource, size: int) -> Tensor:
    """What the source adds to zeros in a forked child."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with os.fdopen(writer, "wb") as pipe:
                # Not torch.zeros: it would wait for OpenMP threads that only the parent has.
                total = torch.from_numpy(np.zeros(size))
                source.add_gaussian_([total], 1.0)
                pipe.write(total.numpy().tobytes())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        # Minutes, for what takes milliseconds: only a child that waits forever is cut short.
        if not select.select([pipe], [], [], 120)[0]:
            os.kill(pid, signal.SIGKILL)
        values = bytearray(pipe.read())
    os.waitpid(pid, 0)
    assert values, "the child failed or hung"
    return torch.frombuffer(values, dtype=torch.float64)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.usefixtures("four_threads")
def test_a_forked_child_does_not_repeat_its_parent() -> None:
    size = 16 * PIECE  # enough for the parent to have started threads, which the child lacks
    system = SystemNoise()
    draw(system, size)
    children = [in_forked_child(system, size), in_forked_child(system, size)]
    check_independent(torch.stack([*children, draw(system, size)]))
    repeated = [in_forked_child(seeded(), 1000), draw(seeded(), 1000)]
    assert torch.equal(*repeated)  # what the check must find does happen without it


def test_seeded_noise_continues_exactly() -> None:
    sizes = [(3,), (100, 7), (1,), (15,), (40_000,)]  # below 16 PyTorch keeps a spare value
    uninterrupted = seeded(5)
    [draw(uninterrupted, *size) for size in sizes]
    saved = through_a_file(uninterrupted.state_dict())
    expected = [draw(uninterrupted, *size) for size in sizes]
    restored = seeded(6)
    restored.load_state_dict(saved)
    for size, value in zip(sizes, expected, strict=True):
        assert torch.equal(draw(restored, *size), value)


@pytest.mark.usefixtures("four_threads")
def test_seeded_noise_does_not_depend_on_threads() -> None:
    many = draw(seeded(), 16 * PIECE)
    torch.set_num_threads(1)
    assert torch.equal(many, draw(seeded(), 16 * PIECE))


def test_system_noise_is_never_restored() -> None:
    original = SystemNoise()
    rows = [draw(original, 2000)]
    saved = through_a_file(original.state_dict())
    assert not any(isinstance(value, Tensor) for value in saved.values())
    others = [SystemNoise(), SystemNoise(), original]
    for other in others:
        other.load_state_dict(saved)
    others += [copy.copy(original), copy.deepcopy(original), pickle.loads(pickle.dumps(original))]
    rows += [draw(other, 2000) for other in others]
    check_independent(torch.stack(rows))


def test_a_load_makes_a_new_master_key(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter(range(1, 100))
    monkeypatch.setattr(keys, "new_master", lambda: bytes([next(numbers)]) * 32)
    system = SystemNoise()
    draw(system, 10)
    draw(system, 10)
    assert next(numbers) == 2
    system.load_state_dict(system.state_dict())
    found = draw(system, 10)
    monkeypatch.setattr(keys, "new_master", lambda: bytes([3]) * 32)
    assert torch.equal(found, draw(SystemNoise(), 10))


def test_a_copy_keeps_its_draws() -> None:
    original = SystemNoise(draws=3)
    for twin in (
        copy.copy(original),
        copy.deepcopy(original),
        pickle.loads(pickle.dumps(original)),
    ):
        assert twin._draws == 3


def test_states_of_others_are_refused() -> None:
    with pytest.raises(ValueError, match=r"SystemNoise.state_dict.*got.*SeededNoise"):
        SystemNoise().load_state_dict(seeded().state_dict())
    with pytest.raises(ValueError, match=r"SeededNoise.state_dict.*got.*None"):
        seeded().load_state_dict({})
    with pytest.raises(ValueError, match=r"'device'.*'cuda'.*'cpu'"):
        seeded().load_state_dict({**seeded().state_dict(), "device": "cuda"})
