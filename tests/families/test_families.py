"""Every family is exact through the captured loss, or refused for a known reason."""

from __future__ import annotations

import re

import pytest

from tests.families import FAMILIES
from tests.families._measure import measured
from tests.nightly import chosen

pytest.importorskip("transformers", "5.20")  # older models ask other questions

SHORT = {"u-net-checkpointed", "gru-language-model"}
REFUSED = {
    "dora-llama": "method `startswith`",
    "deberta": "wrote in place",
    "deberta-v2-as-it-comes": "data-dependent",
    "nn-transformer-as-it-comes": "data-dependent",
    "wav2vec2-ctc": "_ctc_loss",
    "hubert-ctc": "_ctc_loss",
    "wav2vec2-ctc-as-it-comes": "Data-dependent",
    "hubert-ctc-as-it-comes": "Data-dependent",
    "wav2vec2-classifier-as-it-comes": "requires_grad",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", chosen(FAMILIES, SHORT))
def test_exact_or_refused_for_a_known_reason(name: str) -> None:
    row = measured(name, FAMILIES[name])
    if not row.captured:
        pytest.skip(row.reason)
    assert row.eager != "WRONG"
    if name in REFUSED:
        assert row.captured == "refused"
        assert re.search(REFUSED[name], row.reason)
    else:
        assert row.captured == "exact", row.reason
