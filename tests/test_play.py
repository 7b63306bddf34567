"""The interactive page's tables and pictures: which scales, where pictures stand, cliques over phi."""

import numpy as np

from fx import play, settings

BLOCKS = np.full((7, 7), 0.1) + 0.7 * np.kron(np.diag([1, 1, 0]), np.ones((3, 3)))[:7, :7]
np.fill_diagonal(BLOCKS, 1.0)  # two groups of three alike images, and one alone


def test_every_scale_is_the_demos_attack_at_that_scale_and_one_is_no_guidance():
    asked, chosen = play.specs("object/elephant"), settings.load()["dreambooth"]
    assert tuple(asked) == play.SCALES
    arms = {w: (spec.extract.generate.arm, spec.extract.generate.guidance_scale) for w, spec in asked.items()}
    assert arms == {w: ("direct", 1.0) if w == 1 else ("finextract", w) for w in play.SCALES}
    usual = chosen.three_arms(chosen.fine_tune("object/elephant"))
    assert [asked[1.0], asked[chosen.finextract_scale]] == [usual[0], usual[2]]


def test_a_sheet_has_a_row_for_each_row_and_white_where_one_is_shorter():
    long, short = (np.full((n, 2, 2, 3), n * 10, np.uint8) for n in (3, 1))
    found = np.asarray(play.sheet([long, short]))
    assert found.shape == (4, 6, 3)
    assert (found[:2] == 30).all()
    assert (found[2:, :2] == 10).all()
    assert (found[2:, 2:] == 255).all()


def test_cliques_over_phi_are_one_then_the_groups_then_single_images():
    found = play.over_phi(BLOCKS)
    labels = {phi: rows.sort_values("image").clique.tolist() for phi, rows in found.groupby("phi")}
    assert min(labels) <= 0.1
    assert max(labels) == 1.0
    assert labels[min(labels)] == [1] * 7
    for phi, row in labels.items():
        if 0.12 < phi <= 0.8:
            assert sorted(row[:3] + row[3:6]) == [1] * 3 + [2] * 3
            assert len(set(row[:3])) == len(set(row[3:6])) == 1
            assert row[6] == 0
        if phi > 0.82:
            assert row == [0] * 7


def test_alike_images_stand_near_one_another_and_all_within_the_drawing():
    found = play.places(BLOCKS)
    assert found.shape == (7, 2)
    assert (found >= 0).all()
    assert (found <= 1).all()
    apart = np.linalg.norm(found[:, None] - found[None], axis=2)
    same = [apart[i, j] for group in (range(3), range(3, 6)) for i in group for j in group if i < j]
    other = [apart[i, j] for i in range(3) for j in range(3, 6)]
    assert np.mean(same) < np.mean(other)
