"""The envelope: the best run of each budget, or the edge of a cloud."""

from __future__ import annotations

import numpy as np

from llada_lightning.scaling.fits import fit_table
from llada_lightning.scaling.fits.envelope import envelope_rows
from llada_lightning.scaling.fits.runs import in_canonical_order
from llada_lightning.scaling.results import table_of_records
from studies import VALLEYS, record, simulated_study


def test_a_run_that_a_cheaper_one_beats_is_not_on_the_envelope() -> None:
    records = [record("arm", "107k", budget, loss) for budget, loss in [(3e11, 4.4), (1e12, 4.5), (3e12, 4.0)]]
    (envelope,) = fit_table(table_of_records(records)).envelopes("6nd").values()
    assert [point.loss for point in envelope.points] == [4.4, 4.0]
    assert envelope.law is None
    assert "at least 3 are needed" in envelope.as_dict()["note"]
    assert not {"a", "b", "interval_b"} & set(envelope.as_dict())


def test_by_the_other_convention_the_envelope_is_the_edge_of_the_cloud() -> None:
    table, _ = simulated_study(VALLEYS)
    arm = in_canonical_order(table[table["objective"] == "arm"])
    rows = envelope_rows(arm, "total", "nats_per_token")
    flops, loss = (arm[name].to_numpy(float) for name in ("flops_total", "val_nats_per_token"))
    assert np.all(np.diff(flops[rows]) > 0)
    assert np.all(np.diff(loss[rows]) < 0)
    for run in range(len(arm)):  # no run is beaten by none and yet left out
        cheaper = [loss[row] for row in rows if flops[row] <= flops[run]]
        assert run in rows or min(cheaper) <= loss[run]
