"""Captions from weights: objectives against twins and planted changes, every family's embeddings, ranking."""

import copy

import numpy as np
import pytest
import tiny
import torch
from peft import LoraConfig
from torch.distributions import MultivariateNormal

from fx import captions, families
from fx.caption_search import GradientSearch, TokenSearch
from fx.captions import Change, change_of, rank
from fx.models import ModelPair, load_pipeline

LAYERS, ROWS, WIDTH, TOKENS, CANDIDATES, TRUE = 3, 40, 24, 5, 60, 17


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def candidates() -> torch.Tensor:
    """Embeddings of 60 captions of five tokens."""
    return drawn(CANDIDATES, TOKENS, WIDTH, seed=1)


def planted(embeddings: torch.Tensor, noise: float = 0.0) -> Change:
    """A change whose rows are mixtures of these embeddings [tokens, width], and noise."""
    before = [0.1 * drawn(ROWS, WIDTH, seed=10 + layer) for layer in range(LAYERS)]
    mixed = [drawn(ROWS, len(embeddings), seed=20 + layer) @ embeddings for layer in range(LAYERS)]
    unknown = [noise * drawn(ROWS, WIDTH, seed=30 + layer) for layer in range(LAYERS)]
    after = [b + m + u for b, m, u in zip(before, mixed, unknown, strict=True)]
    return Change(tuple(before), tuple(after))


# objectives


@pytest.mark.parametrize("objective", captions.OBJECTIVES)
def test_a_planted_change_of_rank_one_is_found(objective, candidates):
    single = torch.nn.functional.normalize(candidates[:, :1], dim=2)
    common = torch.nn.functional.normalize(drawn(1, WIDTH, seed=3), dim=1)  # what the weights before know best
    before = tuple(0.5 * drawn(ROWS, 1, seed=5 + layer) @ common for layer in range(LAYERS))
    change = Change(before, tuple(b + drawn(ROWS, 1, seed=9) @ single[TRUE] for b in before))
    assert captions.OBJECTIVES[objective](change, single).argmax() == TRUE


@pytest.mark.parametrize("objective", ["subspace", "coverage", "likelihood"])
def test_a_planted_change_of_rank_r_is_found_in_noise(objective, candidates):
    change = planted(candidates[TRUE], noise=0.5)
    found = captions.OBJECTIVES[objective](change, candidates)
    assert found.argmax() == TRUE
    if objective == "coverage":
        assert 0 < found.min() < found.max() < 1


def test_norm_is_the_length_of_the_moved_embeddings(candidates):
    change = planted(candidates[TRUE])
    delta = torch.cat(change.after).double() - torch.cat(change.before).double()
    expected = []
    for caption in candidates.double():
        moved = [torch.linalg.norm(delta @ (e / e.norm())) / torch.linalg.norm(delta) for e in caption]
        expected.append(sum(moved) / TOKENS)
    torch.testing.assert_close(captions.norm(change, candidates), torch.stack(expected), rtol=1e-5, atol=0)


def rank_one_by_numpy(matrix: torch.Tensor) -> np.ndarray:
    u, s, v = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    return s[0] * np.outer(u[:, 0], v[0])


def length_of_moved(matrix: np.ndarray, embeddings: torch.Tensor) -> np.ndarray:
    """Mean over positions of |M e| for unit e."""
    units = embeddings.double().numpy() / np.linalg.norm(embeddings.double().numpy(), axis=2, keepdims=True)
    return np.linalg.norm(units @ matrix.T, axis=2).mean(axis=1)


def test_the_objectives_of_rank_one_are_those_of_the_matrices_written_out(candidates):
    change = planted(candidates[TRUE], noise=0.3)
    delta = [after - before for before, after in zip(change.before, change.after, strict=True)]
    layers = np.concatenate([rank_one_by_numpy(part) for part in delta])
    whole = rank_one_by_numpy(torch.cat(delta))
    between = rank_one_by_numpy(torch.cat(change.after)) - rank_one_by_numpy(torch.cat(change.before))
    for objective, matrix in {"rank one": layers, "PCA of difference": whole, "difference of PCAs": between}.items():
        found = captions.OBJECTIVES[objective](change, candidates)
        np.testing.assert_allclose(found.numpy(), length_of_moved(matrix, candidates), rtol=1e-5)


def test_subspace_is_the_share_inside_the_top_singular_vectors(candidates):
    change = planted(candidates[TRUE], noise=0.3)
    vectors = np.linalg.svd(change.stacked.double().numpy(), full_matrices=False)[2][:4]
    for centre in (None, candidates.mean(dim=0)):
        centred = candidates.double().numpy() - (0 if centre is None else centre.double().numpy())
        centred /= np.linalg.norm(centred, axis=2, keepdims=True)
        expected = ((centred @ vectors.T) ** 2).sum(axis=2).mean(axis=1)
        np.testing.assert_allclose(captions.subspace(change, candidates, 4, centre).numpy(), expected, rtol=1e-5)


def test_subspace_does_not_count_positions_that_all_captions_share(candidates):
    change = planted(candidates[TRUE], noise=0.3)
    candidates[:, 0] = candidates[0, 0]
    own = captions.subspace(change, candidates[:, 1:], 4, candidates.mean(dim=0)[1:])
    shared = captions.subspace(change, candidates, 4, candidates.mean(dim=0))
    np.testing.assert_allclose(shared.numpy() * TOKENS, own.numpy() * (TOKENS - 1), rtol=1e-6)


def test_coverage_is_one_less_what_a_ridge_regression_leaves(candidates):
    change, penalty = planted(candidates[TRUE], noise=0.3), 0.1
    delta = change.stacked.double().numpy()
    for number in (0, TRUE):
        rows = candidates[number].double().numpy()
        rows = rows / np.sqrt((rows**2).sum() / WIDTH)
        augmented = np.concatenate([rows.T, np.sqrt(penalty) * np.eye(TOKENS)])
        wanted = np.concatenate([delta.T, np.zeros((TOKENS, len(delta)))])
        left = np.linalg.lstsq(augmented, wanted, rcond=None)[0]
        unexplained = ((wanted - augmented @ left) ** 2).sum() / (delta**2).sum()
        found = captions.coverage(change, candidates[number : number + 1], penalty)
        assert float(found[0]) == pytest.approx(1 - unexplained, rel=1e-5)


def test_likelihood_is_that_of_gaussian_rows_of_the_best_scale(candidates):
    change, noise = planted(candidates[TRUE], noise=0.3), 0.05
    delta = change.stacked.double()

    def by_torch(embeddings: torch.Tensor) -> float:
        rows = embeddings.double()
        covariance = rows.T @ rows / ((rows**2).sum() / WIDTH) + noise * torch.eye(WIDTH, dtype=torch.float64)
        scale = torch.einsum("rw,wv,rv->", delta, torch.linalg.inv(covariance), delta) / delta.numel()
        return float(MultivariateNormal(torch.zeros(WIDTH).double(), scale * covariance).log_prob(delta).mean())

    found = captions.likelihood(change, candidates[:4], noise).numpy()
    expected = np.array([by_torch(caption) for caption in candidates[:4]])
    np.testing.assert_allclose(found - found[0], expected - expected[0], atol=1e-6)


def test_likelihood_prefers_the_true_caption_to_a_longer_one_that_holds_it(candidates):
    """Coverage cannot: more embeddings explain more."""
    change = planted(candidates[TRUE], noise=0.3)
    true = candidates[TRUE : TRUE + 1]
    longer = torch.cat([true, candidates[:1]], dim=1)
    assert captions.coverage(change, longer, 1e-5)[0] > captions.coverage(change, true, 1e-5)[0]
    assert captions.likelihood(change, longer)[0] < captions.likelihood(change, true)[0]


def test_every_objective_of_every_change_is_scored_as_alone(reader):
    """In chunks, and the noise reaches the likelihood: it is the one of the function itself."""
    changes = [tiny.explained_by(reader, caption, noise=0.3) for caption in ("a dog", "in a dog")]
    numbers = captions.token_numbers(reader, ["a dog", "a b dog", "dog", "in", "a"])
    objectives = [captions.coverage, captions.objective_of(reader, "likelihood", noise=0.7)]
    found = captions.score_each(changes, reader, numbers, objectives, chunk=2)
    assert found.shape == (2, 2, 5)
    with torch.no_grad():
        embeddings = captions.states(reader, numbers).cpu()
        for change, rows in zip(changes, found, strict=True):
            expected = [captions.coverage(change, embeddings), captions.likelihood(change, embeddings, 0.7)]
            np.testing.assert_allclose(rows, torch.stack(expected), rtol=1e-6)
            alone = captions.score(change, reader, numbers, price=2.0, noise=0.7)
            np.testing.assert_allclose(alone, rows[1] - 2.0 * np.array([len(one) for one in numbers]), rtol=1e-6)
            assert abs(captions.score(change, reader, numbers) - rows[1]).min() > 1e-3, (
                "another noise, another likelihood"
            )


def test_a_change_orthogonal_to_all_captions_says_nothing_about_them(candidates):
    inside = candidates.clone()
    inside[..., WIDTH // 2 :] = 0
    outside = torch.cat([torch.zeros(TOKENS, WIDTH // 2), drawn(TOKENS, WIDTH // 2, seed=5)], dim=1)
    change = planted(outside)
    for objective in ("norm", "coverage"):
        assert captions.OBJECTIVES[objective](change, inside).abs().max() < 1e-3


# changes


@pytest.fixture(params=["sd1", "sd2", "sdxl", "alt"])
def folder(request, tmp_path):
    return tiny.save(request.param, tmp_path / request.param)


def tuned_by(folder, change) -> ModelPair:
    """A pair whose theta' is the base after `change(pipeline)`."""
    base, tuned = load_pipeline(str(folder)), load_pipeline(str(folder))
    change(tuned)
    return ModelPair(base, tuned)


def move(pipeline, names=("to_k", "to_v")):
    for number, module in enumerate(tiny.projections(pipeline.unet, names)):
        module.weight.data += 0.01 * drawn(*module.weight.shape, seed=number)


def test_the_change_of_every_family_is_that_of_its_cross_attention(folder):
    pair = tuned_by(folder, move)
    change = change_of(pair)
    assert len(change.before) == len(tiny.projections(pair.base.unet)) >= 4
    width = pair.base.unet.config.cross_attention_dim
    for number, (before, after) in enumerate(zip(change.before, change.after, strict=True)):
        assert before.shape[1] == width
        torch.testing.assert_close(after - before, 0.01 * drawn(*before.shape, seed=number), atol=1e-6, rtol=0)
    assert change.note == ""
    assert len(change_of(pair, ["to_v"]).before) == len(change.before) // 2


def test_the_change_by_a_lora_is_its_scaled_product(folder):
    def adapt(pipeline):
        pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_k"], init_lora_weights=False))

    pair = tuned_by(folder, adapt)
    change = change_of(pair)
    adapted = tiny.projections(pair.tuned.unet, ("to_k",))
    moved = [after - before for before, after in zip(change.before, change.after, strict=True)]
    keys = [part for part in moved if part.abs().max() > 0]
    assert len(moved) == 2 * len(keys) == 2 * len(adapted)
    for part, module in zip(keys, adapted, strict=True):
        product = 3.0 * module.lora_B["default"].weight @ module.lora_A["default"].weight
        torch.testing.assert_close(part, product.detach(), atol=1e-6, rtol=0)


def test_an_adapter_on_the_network_that_both_models_share_counts_for_theta_prime_only(folder):
    """As `fx.models.load_pair` has it; DoRA too, whose change is no product."""
    for settings in ({}, {"use_dora": True}):
        base = load_pipeline(str(folder))
        before = [module.weight.detach().clone() for module in tiny.projections(base.unet)]
        base.unet.add_adapter(
            LoraConfig(r=2, lora_alpha=6, target_modules=["to_k"], init_lora_weights=False, **settings)
        )
        change = change_of(ModelPair(base, copy.copy(base)))
        merged = copy.deepcopy(base.unet)
        for module in merged.modules():
            if hasattr(module, "merge"):
                module.merge()
        after = [getattr(module, "base_layer", module).weight for module in tiny.projections(merged)]
        assert len(change.before) == len(before)
        for found, expected in [*zip(change.before, before, strict=True), *zip(change.after, after, strict=True)]:
            torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=0)


def test_a_change_without_a_caption_is_refused_with_the_reason(folder):
    other = "only other weights of the network were trained"
    adapter = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    refused = {
        "nothing": (lambda pipeline: None, "theta' is theta"),
        "half precision": (lambda pipeline: pipeline.unet.half().float(), "theta' is theta"),
        "a convolution": (lambda pipeline: pipeline.unet.conv_in.weight.data.add_(0.1), other),
        "queries": (lambda pipeline: pipeline.unet.add_adapter(adapter), other),
        "text": (lambda pipeline: next(pipeline.text_encoder.parameters()).data.add_(0.1), "only its text encoder"),
    }
    for change, reason in refused.values():
        with pytest.raises(ValueError, match=reason):
            change_of(tuned_by(folder, change))


def test_a_transformer_and_unknown_projections_are_refused(tmp_path, pair):
    flow = load_pipeline(str(tiny.save("sd3", tmp_path / "sd3")))
    with pytest.raises(ValueError, match="not from StableDiffusion3Pipeline's transformer"):
        change_of(ModelPair(flow, flow))
    for wrong in (["to_q"], []):
        with pytest.raises(ValueError, match="choose from to_k, to_v"):
            change_of(pair, wrong)


def test_a_trained_text_encoder_is_noted(folder):
    def both(pipeline):
        move(pipeline)
        next(pipeline.text_encoder.parameters()).data.add_(0.01)

    def with_adapter(pipeline):
        move(pipeline)
        where = "query" if hasattr(pipeline.text_encoder, "roberta") else "q_proj"
        pipeline.text_encoder.add_adapter(LoraConfig(r=2, target_modules=[where]))

    def rounded(pipeline):
        move(pipeline)
        pipeline.text_encoder.half().float()

    for trained in (both, with_adapter):
        assert "text encoder was trained too" in change_of(tuned_by(folder, trained)).note
    assert change_of(tuned_by(folder, rounded)).note == ""


def test_one_step_of_gradient_descent_changes_projections_within_the_span_of_the_caption(tmp_path):
    """Eq. 14 and 15, exactly; a step of Adam does not stay there."""
    base = load_pipeline(str(tiny.save("sd1", tmp_path / "sd1")))
    base.unet.double()
    condition = families.encode(base, "a dog").text
    explained = {}
    for name, optimiser in {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}.items():
        tuned = copy.copy(base)
        tuned.unet = copy.deepcopy(base.unet).requires_grad_(True)
        x, t = drawn(2, 4, 4, 4).double(), torch.tensor([300, 700])
        predicted = tuned.unet(x, t, encoder_hidden_states=condition.double().expand(2, -1, -1)).sample
        predicted.square().mean().backward()
        optimiser(tuned.unet.parameters(), lr=1e-2 if name == "adam" else 1e2).step()
        change = change_of(ModelPair(base, tuned))
        others = captions.states(base, captions.token_numbers(base, ["the sun", "cat and bird"]))
        explained[name] = captions.coverage(change, torch.cat([condition, others]), 1e-9)
    true, *others = explained["sgd"].tolist()
    assert true > 1 - 1e-4
    assert max(others) < true - 1e-3
    assert explained["adam"][0] < 0.95


# how captions enter


def test_the_states_of_token_numbers_are_what_the_family_encodes(folder):
    pipeline = load_pipeline(str(folder))
    texts = ["a dog", "cat"]
    found = captions.states(pipeline, captions.token_numbers(pipeline, texts))
    for text, one in zip(texts, found, strict=True):
        torch.testing.assert_close(one, families.encode(pipeline, text).text[0], atol=1e-6, rtol=0)


def test_fewer_tokens_leave_the_states_of_a_left_to_right_encoder_as_they_are(tiny_pipeline):
    numbers = captions.token_numbers(tiny_pipeline, ["a dog"])
    whole, short = captions.states(tiny_pipeline, numbers), captions.states(tiny_pipeline, numbers, 6)
    torch.testing.assert_close(short, whole[:, :6], atol=1e-6, rtol=0)


def test_too_many_tokens_are_refused(tiny_pipeline):
    with pytest.raises(ValueError, match="has 30 tokens, at most 14 fit"):
        captions.states(tiny_pipeline, [[5] * 30])


# ranking


def test_rank_puts_the_planted_caption_first_and_leaves_out_what_reads_the_same(reader):
    change = tiny.explained_by(reader, "a dog")
    texts = ["a cat", "a  dog", "dogs", "the sun", "a"]
    for objective in ("subspace", "coverage", "likelihood"):
        ranked = rank(change, reader, texts, objective)
        assert ranked.caption[0] == "a  dog"
        assert ranked.score.is_monotonic_decreasing
    again = rank(change, reader, [*texts, "a dog", "a cat"])
    assert sorted(again.caption) == sorted(texts)


def test_rank_refuses_what_it_cannot_do(reader):
    change = tiny.explained_by(reader, "a dog")
    with pytest.raises(ValueError, match="unknown objective 'magic'"):
        rank(change, reader, ["a dog"], "magic")
    with pytest.raises(ValueError, match="no candidate"):
        rank(change, reader, [])
    with pytest.raises(ValueError, match="at most 14 fit"):
        rank(change, reader, ["z" * 30])


def test_tokenizers_of_different_vocabularies_are_refused(tmp_path):
    pipeline = load_pipeline(str(tiny.save("sdxl", tmp_path / "sdxl")))
    captions.check_tokenizers(pipeline)
    change = tiny.explained_by(pipeline, "a dog")
    pipeline.tokenizer_2.add_tokens(["cat"])
    for attempt in (rank, TokenSearch, GradientSearch):
        with pytest.raises(ValueError, match="the tokenizers of this model differ"):
            attempt(change, pipeline, ["a dog"])


def test_the_vocabulary_has_no_special_token_and_no_broken_character(reader):
    words = captions.vocabulary(reader)
    written = [reader.tokenizer.decode([number]) for number in words]
    assert "dog" in {text.strip() for text in written}
    assert not set(words) & set(reader.tokenizer.all_special_ids)
    assert all(text.strip() and "\ufffd" not in text for text in written)
