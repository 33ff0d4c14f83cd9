"""The noise has the size it is asked for, wherever the values lie, and its parts are independent."""

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from clipgrad.noise import NoiseSource, SystemNoise, keys
from clipgrad.noise.accelerator import AcceleratorNoise
from clipgrad.noise.cpu import CpuNoise
from clipgrad.noise.keys import KeyDeriver
from clipgrad.sampling._words import seeded_words
from tests.noise_checks import PIECE, check_gaussian, check_independent, draw, seeded


@pytest.fixture(params=[SystemNoise, seeded], ids=["system", "seeded"])
def source(request: pytest.FixtureRequest) -> NoiseSource:
    made: NoiseSource = request.param()
    return made


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


# --------------------------------------------------------------------------------------- size


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((300_000,), torch.float32),  # more pieces than one thread works on
        ((300, 200), torch.float64),
        ((300, 201), torch.float16),
        ((60_000,), torch.bfloat16),
    ],
)
@pytest.mark.parametrize("sigma", [0.03, 700.0])
def test_noise_has_its_sigma_and_no_other(
    source: NoiseSource, shape: tuple[int, ...], dtype: torch.dtype, sigma: float
) -> None:
    total = torch.zeros(shape, dtype=dtype)
    source.add_gaussian_([total], sigma)
    check_gaussian(total, sigma)
    for wrong in (sigma * 2 / 3, sigma * 3 / 2, -sigma + 0.1 * sigma):
        with pytest.raises(AssertionError):
            check_gaussian(total, wrong)


def test_many_small_tensors_all_get_their_noise(source: NoiseSource) -> None:
    totals = [torch.zeros(size) for size in (1, 0, 3, 17, 1, 40_000, 5, 64) * 8] + [torch.zeros(())]
    source.add_gaussian_(totals, 2.0)
    assert all((total != 0).all() for total in totals)
    check_gaussian(torch.cat([total.flatten() for total in totals]), 2.0)
    small = torch.stack(
        [total for total in totals if total.numel() == 17 or total.numel() == 5][::2]
    )
    check_independent(small.double())


def layouts() -> dict[str, Tensor]:
    base = torch.zeros(40, 30, 20, 5)
    return {
        "transposed": torch.zeros(400, 300).T,
        "channels_last": torch.zeros(40, 30, 20, 5).to(memory_format=torch.channels_last),
        "permuted": base.permute(2, 0, 3, 1),
        "with gaps": torch.zeros(400, 600)[:, ::2],
        "narrowed": torch.zeros(400, 300)[:, 7:290],
        "offset": torch.zeros(100_001)[1:],
    }


@pytest.mark.parametrize("layout", layouts())
def test_any_memory_layout(source: NoiseSource, layout: str) -> None:
    total = layouts()[layout]
    size, strides, pointer = total.shape, total.stride(), total.data_ptr()
    total += 5.0
    source.add_gaussian_([total], 1.5)
    assert (total.shape, total.stride(), total.data_ptr()) == (size, strides, pointer)
    check_gaussian(total - 5.0, 1.5)
    half = total.flatten().double()[: total.numel() // 2 * 2] - 5.0
    check_independent(half.view(2, -1))


def test_noise_stays_within_its_tensor(source: NoiseSource) -> None:
    memory = torch.zeros(400, 600)
    source.add_gaussian_([memory[:, ::2], memory[100:200, 1::2]], 1.0)
    assert (memory[:100, 1::2] == 0).all()
    assert (memory[200:, 1::2] == 0).all()
    assert (memory[100:200] != 0).all()


def test_parameters_and_modes(source: NoiseSource) -> None:
    parameter = torch.nn.Parameter(torch.zeros(200_000))
    source.add_gaussian_([parameter], 1.0)
    check_gaussian(parameter.detach(), 1.0)
    assert parameter.is_leaf
    with torch.inference_mode():
        inside = torch.zeros(200_000)
        source.add_gaussian_([inside, parameter], 1.0)
        check_gaussian(inside, 1.0)
    source.add_gaussian_([parameter], 1.0)  # and out of the mode again
    check_gaussian(parameter.detach(), math.sqrt(3))


# ------------------------------------------------------------------------------- independence


@pytest.mark.usefixtures("four_threads")
def test_pieces_parameters_steps_and_sources_are_independent() -> None:
    """Pieces are drawn one after the other into the same memory; a step here has several of either size."""
    rows = []
    for system in (SystemNoise(), SystemNoise()):
        for _ in range(2):
            one, other = torch.zeros(12 * PIECE), torch.zeros(2, 2 * PIECE)
            system.add_gaussian_([one, other], 1.0)
            rows += [one.view(-1, PIECE), other.view(-1, PIECE)]
    check_independent(torch.cat(rows))


def test_a_repeated_stream_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "new_master", lambda: bytes(32))
    with pytest.raises(AssertionError):
        check_independent(torch.stack([draw(SystemNoise(), 1000), draw(SystemNoise(), 1000)]))


def test_calls_from_several_threads() -> None:
    system, totals = SystemNoise(), torch.zeros(6, 3 * PIECE)
    start = threading.Barrier(6)

    def call(total: Tensor) -> None:
        start.wait()
        system.add_gaussian_([total], 1.0)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(call, totals))
    check_gaussian(totals, 1.0)
    check_independent(totals)


@pytest.mark.parametrize("compiled", [True, False])
def test_the_default_device_does_not_matter(compiled: bool) -> None:
    """Noise for the CPU is made there, and so is what is copied to others."""
    total, copied = torch.zeros(90_000), torch.zeros(90_000)
    torch.set_default_device("meta")
    try:
        source = SystemNoise(compile=compiled)
        source.add_gaussian_([total], 2.0)
        key_deriver = KeyDeriver()
        cpu = CpuNoise(key_deriver, 1, compiled=compiled)
        AcceleratorNoise(torch.device("cpu"), key_deriver, cpu, 1).add([copied], 2.0)
        SystemNoise(draws=3).add_gaussian_([small := torch.zeros(5, device="cpu")], 1.0)
        words = seeded_words(torch.Generator("cpu"), 3)
    finally:
        torch.set_default_device(None)
    check_gaussian(total, 2.0)
    check_gaussian(copied, 2.0)
    assert bool((small != 0).all())
    assert len(words) == 3
