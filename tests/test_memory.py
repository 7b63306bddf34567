"""The short form of tests/memory.py: no step holds what it has generated."""

import memory
import pandas as pd
import pytest


@pytest.mark.long
def test_no_step_holds_all_images(tmp_path):
    table = memory.measured((100, 1500), tmp_path)
    assert table.N.tolist() == [100] * 3 + [1500] * 3
    assert (table.MB > 0).all()
    grown = memory.growth(table)
    assert grown.index.tolist() == ["generate", "extract", "score"]
    assert (grown["kB an image"] < 10).all(), grown  # 12 is an image as bytes, 49 as the networks take it


def test_growth_is_told_without_similarities():
    lines = [
        {"N": n, "stage": stage, "MB": mb + pairs, "of similarities": pairs, "without": mb}
        for n, pairs in ((10, 1.0), (20, 4.0))
        for stage, mb in zip(memory.STAGES, (n, 10.0, 30.0 - n), strict=True)
    ]
    grown = memory.growth(pd.DataFrame(lines))
    assert grown["largest over smallest"].tolist() == [2.0, 1.0, 0.5]
    assert grown["kB an image"].tolist() == [1000.0, 0.0, -1000.0]
