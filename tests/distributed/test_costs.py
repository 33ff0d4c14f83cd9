"""``explain`` says what several ranks cost, and the sockets agree."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from torch import nn

from tests.distributed import cases, cost_cases
from tests.distributed.conftest import Pool

LAYER = (cost_cases.WIDTH + 1) * cost_cases.WIDTH * 4  # bytes
ALL, TRAINED = cost_cases.LAYERS * LAYER, (cost_cases.LAYERS - 1) * LAYER


@pytest.mark.skipif(sys.platform != "linux", reason="counts bytes as the Linux kernel tells them")
@pytest.mark.parametrize(
    ("shard", "compile", "expected"),
    [
        pytest.param(
            None,
            False,
            {
                "sums of its own samples, until the step": ("held", TRAINED),
                "its part of the sums of all ranks, during the step": ("held", TRAINED // 2),
                "buckets on their way, at most": ("held", 3 * TRAINED),
                "sums, for each step": ("sent", TRAINED // 2),
                "noised means, for each step": ("sent", TRAINED // 2),
            },
            id="replicated",
        ),
        pytest.param(
            cases.shard_layers,
            False,
            {
                "its shards of the sums": ("held", TRAINED // 2),
                "whole parameters at once, at most": ("held", 3 * LAYER),
                "sums on their way, at most": ("held", 3 * LAYER),
                "parameters of the root, for each backward": ("sent", 0),
                "other parameters, for each microbatch": ("sent", ALL),
                "sums, for each microbatch": ("sent", TRAINED // 2),
            },
            id="fsdp2",
        ),
        pytest.param(
            cases.shard_root,
            False,
            {
                "its shards of the sums": ("held", TRAINED // 2),
                "whole parameters at once, at most": ("held", ALL),
                "sums on their way, at most": ("held", 3 * TRAINED),
                "parameters of the root, for each backward": ("sent", ALL // 2),
                "other parameters, for each microbatch": ("sent", 0),
                "sums, for each microbatch": ("sent", TRAINED // 2),
            },
            id="fsdp2 root",
        ),
        pytest.param(
            cases.shard_layers,
            True,
            {
                "its shards of the sums": ("held", TRAINED // 2),
                "sums of its own samples, until the batch ends": ("held", TRAINED),
                "whole parameters at once, at most": ("held", ALL),
                "sums on their way, at most": ("held", 3 * LAYER),
                "parameters of the root, for each backward": ("sent", 0),
                "other parameters, for each backward": ("sent", ALL // 2),
                "sums, for each backward": ("sent", TRAINED // 2),
            },
            id="fsdp2 compiled",
        ),
    ],
)
def test_costs(
    pool: Pool,
    shard: Callable[[nn.Module], None] | None,
    compile: bool,
    expected: dict[str, tuple[str, int]],
) -> None:
    for explanation, sent in pool(2).run(cost_cases.explained, shard, compile):
        found = {cost.what: (cost.kind, cost.size) for cost in explanation.costs}
        assert found == expected
        counted = sum(
            size * (2 if what.endswith("microbatch") else 1)
            for what, (kind, size) in found.items()
            if kind == "sent"
        )
        # Beside them, messages of a few hundred bytes.
        assert counted <= sent <= 1.03 * counted + 5000, (counted, sent)
        text = str(explanation).split("\n")
        assert "each of 2 processes, besides:" in text
        assert len(text) - text.index("each of 2 processes, besides:") == len(expected) + 1
