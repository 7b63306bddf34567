"""The short form of tests/memory.py: what is held does not grow with the number of generated images."""

import memory
import pandas as pd
import pytest


@pytest.mark.long
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    table = memory.measured((60, 240), tmp_path)
    assert table.N.tolist() == [60] * 3 + [240] * 3
    assert (table.MB > 0).all()
    grown = memory.growth(table)
    assert grown.index.tolist() == ["generate", "extract", "score"]
    assert (grown < 1.3).all(), grown  # four times the images; the long form has 10% as its bound


def test_growth_is_the_largest_over_the_smallest_without_similarities():
    lines = [
        {"N": n, "stage": stage, "MB": mb + pairs, "of similarities": pairs, "without": mb}
        for n, pairs in ((10, 1.0), (20, 4.0))
        for stage, mb in zip(memory.STAGES, (n, 10.0, 30.0 - n), strict=True)
    ]
    assert memory.growth(pd.DataFrame(lines)).tolist() == [2.0, 1.0, 0.5]
