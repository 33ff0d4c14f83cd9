"""The noised mean: what an addition and a division one after the other give, in one pass where that is possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from clipgrad.noise import NoiseSource, SeededNoise, SystemNoise, accelerator, cpu, keys, system
from clipgrad.noise.step_noise import noised_mean
from tests.kernels import needs_cuda
from tests.noise_checks import check_gaussian

SIGMA, DIVISOR = 2.0, 48.0


def sums_of(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Large ones, small ones, an empty one, a turned one and a scalar."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(300_000,), (70, 80), (7,), (0,), (), (40, 3, 3, 3)]
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    made.append(torch.randn(50, 60, generator=generator, dtype=torch.float64).T)
    return [tensor.to(device, dtype) for tensor in made]


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def in_two_passes(source: NoiseSource, sums: list[Tensor]) -> list[Tensor]:
    totals = clones(sums)
    source.add_gaussian_(totals, SIGMA)
    # A tensor: on CUDA a division by a number is a product with its rounded reciprocal.
    return [total / torch.full_like(total, DIVISOR) for total in totals]


@pytest.fixture
def one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "new_master", lambda: bytes(range(32)))


@pytest.mark.parametrize("out_of_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"compile": False}, {"draws": 3}], ids=["loop", "uncompiled", "draws"]
)
@pytest.mark.usefixtures("one_key")
def test_one_pass_gives_what_two_give(
    options: Mapping[str, Any], dtype: torch.dtype, out_of_place: bool
) -> None:
    sums = sums_of(dtype=dtype)
    expected = in_two_passes(SystemNoise(**options), sums)
    given = clones(sums)
    means = noised_mean(SystemNoise(**options), given, SIGMA, DIVISOR, out_of_place=out_of_place)
    assert all(map(torch.equal, means, expected))
    assert all(
        (mean is not total) == out_of_place for mean, total in zip(means, given, strict=True)
    )
    assert [mean.stride() for mean in means] == [total.stride() for total in sums]


@pytest.mark.usefixtures("one_key")
def test_threads_divide_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_MANY", 100_000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    sums = sums_of()
    means = noised_mean(SystemNoise(), clones(sums), SIGMA, DIVISOR)
    assert all(map(torch.equal, means, in_two_passes(SystemNoise(), sums)))


@pytest.mark.parametrize("out_of_place", [False, True])
def test_tensors_of_several_kinds_and_gaps(out_of_place: bool) -> None:
    totals = [1000.0, 2000.0, 3000.0, 4000.0]
    sums = [
        torch.full((90_000,), totals[0]),
        torch.full((90_000,), totals[1]).double(),
        torch.full((300, 600), totals[2])[:, ::2],
        torch.full((90_000,), totals[3]).double(),
    ]
    shapes = [(total.shape, total.dtype) for total in sums]
    means = noised_mean(SystemNoise(), sums, SIGMA, DIVISOR, out_of_place=out_of_place)
    assert [(mean.shape, mean.dtype) for mean in means] == shapes
    for mean, total in zip(means, totals, strict=True):
        check_gaussian(mean.double() * DIVISOR - total, SIGMA)


class FewBlocks:
    """In the place of a device's cipher: the noise is sigma itself, and a key is good for 1000 values."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []

    def limit(self, draws: int) -> int:
        return 1000

    def add_gaussian_(
        self,
        tensors: list[Tensor],
        sigma: float,
        draws: int,
        key: bytes,
        divisor: float,
        into: list[Tensor],
    ) -> None:
        assert sum(map(Tensor.numel, tensors)) <= 1000
        self.keys.append(key)
        for source, target in zip(tensors, into, strict=True):
            assert source.is_contiguous()
            assert target.is_contiguous()
            target.view(-1).copy_((source.view(-1) + sigma) / divisor)


@pytest.fixture
def few_blocks(monkeypatch: pytest.MonkeyPatch) -> FewBlocks:
    """What lies on the CPU is taken for an accelerator's."""
    cipher, found = FewBlocks(), system.by_device_and_noise_dtype
    monkeypatch.setattr(accelerator, "verified_cipher", lambda device: cipher)
    elsewhere = torch.device("mps")
    monkeypatch.setattr(
        system,
        "by_device_and_noise_dtype",
        lambda tensors: {(elsewhere, dtype): at for (_, dtype), at in found(tensors).items()},
    )
    return cipher


@pytest.mark.parametrize("odd", ["nothing", "gaps", "sign"])
@pytest.mark.parametrize("large", [2**18, 0], ids=["division", "kernel"])
@pytest.mark.parametrize("out_of_place", [False, True])
def test_on_an_accelerator_in_pieces(
    few_blocks: FewBlocks, out_of_place: bool, large: int, odd: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system, "_LARGE", large)
    sums = [total[:3000] if total.dim() == 1 else total for total in sums_of()]
    sums += [torch.randn(2, 3, 40, 5).to(memory_format=torch.channels_last), torch.randn(30, 1).T]
    sums += [sums[0].double(), sums[1].bfloat16()]
    if odd != "nothing":
        sums.append(torch.randn(8, 9)[:, 1:] if odd == "gaps" else torch._neg_view(torch.ones(9)))
    wanted = [(total + SIGMA) / DIVISOR for total in sums]
    before = clones(sums)
    means = noised_mean(SystemNoise(), sums, SIGMA, DIVISOR, out_of_place=out_of_place)
    for mean, expected, total in zip(means, wanted, sums, strict=True):
        torch.testing.assert_close(mean, expected)
        assert odd == "gaps" or mean.stride() == total.stride()
        assert (mean is not total) == out_of_place
    at_once = out_of_place and not large and odd == "nothing"  # then nothing wrote to the sums
    assert all(map(torch.equal, before, sums)) == at_once
    assert len(few_blocks.keys) == len(set(few_blocks.keys)) > 10


class Doubled(SystemNoise):
    """Adds in a way of its own."""

    def add_gaussian_(self, tensors: Sequence[Tensor], sigma: float) -> None:
        super().add_gaussian_(tensors, sigma)
        super().add_gaussian_(tensors, sigma)


class Counting:
    """Wraps a source, as a user's would."""

    def __init__(self) -> None:
        self.inner, self.asked = SystemNoise(), 0

    def add_gaussian_(self, tensors: Sequence[Tensor], sigma: float) -> None:
        self.asked += 1
        self.inner.add_gaussian_(tensors, sigma)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@pytest.mark.parametrize("out_of_place", [False, True])
def test_a_source_that_adds_in_a_way_of_its_own_is_asked_to(out_of_place: bool) -> None:
    (mean,) = noised_mean(
        Doubled(), [torch.zeros(90_000)], SIGMA, DIVISOR, out_of_place=out_of_place
    )
    check_gaussian(mean * DIVISOR, SIGMA * 2**0.5)
    counting = Counting()
    (mean,) = noised_mean(
        counting, [torch.zeros(90_000)], SIGMA, DIVISOR, out_of_place=out_of_place
    )
    check_gaussian(mean * DIVISOR, SIGMA)
    assert counting.asked == 1


@pytest.mark.parametrize("out_of_place", [False, True])
def test_a_method_put_in_the_place_of_a_source_is_asked(
    out_of_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, seen = SystemNoise(), []
    monkeypatch.setattr(source, "add_gaussian_", lambda tensors, sigma: seen.append(sigma))
    (mean,) = noised_mean(source, [torch.ones(3)], SIGMA, DIVISOR, out_of_place=out_of_place)
    assert seen == [SIGMA]
    assert torch.equal(mean, torch.ones(3) / DIVISOR)


def test_a_seeded_source_is_repeatable() -> None:
    sums = sums_of()
    sources = [SeededNoise(torch.Generator().manual_seed(1)) for _ in range(2)]
    means = noised_mean(sources[0], clones(sums), SIGMA, DIVISOR)
    for mean, expected in zip(means, in_two_passes(sources[1], sums), strict=True):
        assert torch.equal(mean, expected)


@pytest.mark.parametrize("out_of_place", [False, True])
def test_without_noise_it_is_the_mean(out_of_place: bool) -> None:
    sums = sums_of()
    given = clones(sums)
    means = noised_mean(SystemNoise(), given, 0.0, DIVISOR, out_of_place=out_of_place)
    for mean, total, before in zip(means, given, sums, strict=True):
        assert torch.equal(mean, before / DIVISOR)
        assert (mean is not total) == out_of_place


def test_what_is_refused_is_not_written_to() -> None:
    for sigma, error in [(-1.0, ValueError), (float("nan"), ValueError), (1e-60, ValueError)]:
        total = torch.ones(5)
        with pytest.raises(error):
            noised_mean(SystemNoise(), [total], sigma, DIVISOR)
        assert torch.equal(total, torch.ones(5))
    total = torch.ones(5)
    with pytest.raises(ValueError, match="twice"):
        noised_mean(SystemNoise(), [total, total], 1.0, DIVISOR)
    assert torch.equal(total, torch.ones(5))


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("large", [2**18, 0], ids=["division", "kernel"])
@pytest.mark.parametrize("out_of_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.usefixtures("one_key")
def test_on_cuda(
    dtype: torch.dtype, out_of_place: bool, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the last place: CUDA divides by a number as it likes."""
    monkeypatch.setattr(system, "_LARGE", large)
    sums = sums_of("cuda", dtype)
    contiguous = [total.contiguous() for total in sums]
    for those in (sums, contiguous):
        expected, given = in_two_passes(SystemNoise(), those), clones(those)
        means = noised_mean(SystemNoise(), given, SIGMA, DIVISOR, out_of_place=out_of_place)
        for mean, wanted, total, before in zip(means, expected, given, those, strict=True):
            torch.testing.assert_close(mean, wanted, rtol=2 * torch.finfo(dtype).eps, atol=0)
            assert (mean is not total) == out_of_place
            assert mean.stride() == before.stride()
