"""Distribution tests that can fail: each was tried against a wrong implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.nn import functional

from electra_ds.config.recipe import load_recipe
from electra_ds.config.sections import MaskingSection
from electra_ds.core.keyed_random import (
    generator,
    hash64,
    permutation_at,
    random_bits,
)
from electra_ds.model import heads
from electra_ds.model.heads import column_keys, exponential_noise, predict_tokens, sample_tokens
from electra_ds.pretraining.electra import discriminator_loss_sum
from electra_ds.pretraining.masking import Masks, choose_masks
from electra_ds.training.optimizer import learning_rate_at

LOWEST_P = 1e-4  # seeds are fixed, so a test that passes once passes always


def row_keys(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(hash64(seed, np.arange(rows)).astype(np.uint32).view(np.int32))


def chi_square_p(observed: np.ndarray, expected: np.ndarray) -> float:
    return float(stats.chisquare(observed, expected).pvalue)


# --- noise


def test_noise_is_exponential() -> None:
    noise = exponential_noise(row_keys(300), column_keys(1000)).numpy().ravel()
    assert stats.kstest(noise, "expon").pvalue > LOWEST_P
    # The smallest values win races: the minimum of 1,000 of them is exponential with mean 1/1000.
    minima = exponential_noise(row_keys(4000, 1), column_keys(1000)).min(dim=1).values.numpy()
    assert stats.kstest(minima * 1000, "expon").pvalue > LOWEST_P


@pytest.mark.parametrize("columns", [4096, 30_522, 250_000])
def test_no_two_columns_share_their_noise(columns: int) -> None:
    """With a shared key the less likely of two tokens could never be drawn."""
    assert len(torch.unique(column_keys(columns))) == columns


def test_equal_tokens_of_a_real_vocabulary_are_drawn_equally_often() -> None:
    draws, classes = 6_000, 30_522
    chosen = torch.tensor([7, 2614, 12_254, 22_325, 28_199, 30_521])
    weights = torch.zeros(classes)
    weights[chosen] = 1.0
    samples = sample_tokens(weights.expand(draws, classes), row_keys(draws, 2), column_keys(classes))
    counts = np.bincount(samples.numpy(), minlength=classes)[chosen.numpy()]
    assert chi_square_p(counts, np.full(6, draws / 6)) > LOWEST_P


def test_noise_of_neighbouring_rows_and_columns_is_uncorrelated() -> None:
    noise = exponential_noise(row_keys(2000), column_keys(500)).numpy()
    for first, second in ((noise[:-1], noise[1:]), (noise[:, :-1], noise[:, 1:])):
        correlation = np.corrcoef(first.ravel(), second.ravel())[0, 1]
        assert abs(correlation) < 4 / math.sqrt(first.size)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**63 - 1))
def test_noise_of_a_row_does_not_depend_on_the_rows_beside_it(rows: int, cut: int, seed: int) -> None:
    keys, columns = row_keys(rows, seed), column_keys(37)
    whole = exponential_noise(keys, columns)
    pieces = torch.cat([exponential_noise(piece, columns) for piece in keys.split(cut)])
    assert torch.equal(whole, pieces)


def test_hashes_of_different_parts_differ() -> None:
    grid = hash64(np.arange(200)[:, None], np.arange(200)[None, :])
    assert len(np.unique(grid)) == grid.size


@given(st.lists(st.integers(-(2**63), 2**64 - 1), min_size=1, max_size=4))
def test_a_hash_of_numbers_is_that_of_arrays(parts: list[int]) -> None:
    arrays = [np.array([part]) for part in parts]
    assert int(hash64(*parts)) == int(hash64(*arrays)[0]) == int(hash64(parts[0], *arrays[1:]).ravel()[0])


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 2**63 - 1))
def test_random_bits_are_a_function_of_the_key(rows: int, columns: int, seed: int) -> None:
    first, again = (random_bits(generator(seed, 7), rows, columns) for _ in range(2))
    assert first.shape == (rows, columns)
    np.testing.assert_equal(first, again)
    longer = random_bits(generator(seed, 7), rows + 1, columns).ravel()
    np.testing.assert_equal(first.ravel(), longer[: first.size])


def test_random_bits_are_uniform_and_unrelated_to_their_neighbours() -> None:
    bits = random_bits(generator(3), 100_001)
    for shift in (0, 8, 16, 24):
        counts = np.bincount((bits >> np.uint32(shift)) & np.uint32(255), minlength=256)
        assert chi_square_p(counts, np.full(256, len(bits) / 256)) > LOWEST_P
    assert abs(np.corrcoef(bits[:-1], bits[1:])[0, 1]) < 4 / math.sqrt(len(bits))


# --- sampling


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sampling_frequencies_are_the_tempered_softmax(temperature: float, dtype: torch.dtype) -> None:
    draws, classes = 100_000, 50
    logits = torch.randn(classes, generator=torch.Generator().manual_seed(3)).mul(1.5).to(dtype)
    hidden, weight = torch.ones(draws, 1, dtype=dtype), logits[:, None]
    samples = predict_tokens(
        hidden, weight, torch.zeros(classes), torch.zeros(draws, dtype=torch.int64), row_keys(draws),
        column_keys(classes), temperature,
    ).samples_M  # fmt: skip
    expected = torch.softmax(logits.double() / temperature, -1).numpy() * draws
    assert chi_square_p(np.bincount(samples.numpy(), minlength=classes), expected) > LOWEST_P


def test_samples_of_different_rows_are_independent() -> None:
    draws, classes = 60_000, 4
    samples = sample_tokens(torch.ones(draws, classes), row_keys(draws, 9), column_keys(classes)).numpy()
    pairs = samples[:-1:2] * classes + samples[1::2]
    assert chi_square_p(np.bincount(pairs, minlength=16), np.full(16, draws / 32)) > LOWEST_P


def test_a_rare_token_is_drawn_as_often_as_it_should_be() -> None:
    """30-bit resolution at the small end: a token of probability 1e-3 among 2,000."""
    draws, classes = 50_000, 2_000
    weights = torch.ones(classes)
    weights[7] = classes * 1e-3
    samples = sample_tokens(weights.expand(draws, classes), row_keys(draws, 5), column_keys(classes))
    probability = weights[7].item() / weights.sum().item()
    assert stats.binomtest(int((samples == 7).sum()), draws, probability).pvalue > LOWEST_P


# --- the vocabulary head


@given(
    rows=st.integers(0, 40), embedding=st.integers(1, 9), classes=st.integers(2, 50), piece_rows=st.integers(1, 50),
    scale=st.floats(0.1, 30), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_loss_gradients_and_samples_are_those_of_the_logits_however_they_are_cut(
    monkeypatch: pytest.MonkeyPatch, rows: int, embedding: int, classes: int, piece_rows: int, scale: float, seed: int
) -> None:
    monkeypatch.setattr(heads, "CPU_PIECE_BYTES", 4 * classes * piece_rows)
    rng = torch.Generator().manual_seed(seed)
    inputs = [
        (scale * torch.randn(*shape, generator=rng)).requires_grad_()
        for shape in ((rows, embedding), (classes, embedding), (classes,))
    ]
    targets = torch.randint(classes, (rows,), generator=rng)
    found = predict_tokens(*inputs, targets, row_keys(rows, seed), column_keys(classes))
    (3.0 * found.loss_sum).backward()
    ours = [tensor.grad for tensor in inputs]
    for tensor in inputs:
        tensor.grad = None
    logits = functional.linear(*inputs)
    losses = functional.cross_entropy(logits.double(), targets, reduction="none")
    (3.0 * losses.sum()).backward()
    torch.testing.assert_close(found.losses_M.double(), losses.detach(), rtol=1e-5, atol=1e-5 * scale**2)
    torch.testing.assert_close(found.loss_sum, found.losses_M.sum())
    for mine, tensor in zip(ours, inputs, strict=True):
        assert mine is not None
        assert tensor.grad is not None
        # A logit of size scale**2 has an error of 1e-7 scale**2, which a softmax takes over and an input multiplies.
        torch.testing.assert_close(mine, tensor.grad, rtol=1e-4, atol=1e-4 * scale + 3e-6 * scale**3)
    assert torch.equal(found.best_M, logits.argmax(-1))
    gumbel = logits.detach() - exponential_noise(row_keys(rows, seed), column_keys(classes)).log()
    nearly = gumbel.gather(1, found.samples_M[:, None]).squeeze(1)
    torch.testing.assert_close(nearly, gumbel.amax(-1), rtol=1e-5, atol=1e-4)  # the same draw, but for a tie


def test_a_loss_far_beyond_what_fp32_probabilities_hold_is_exact() -> None:
    """exp(-200) is 0 in fp32; the loss is 200 all the same, and the gradient finite."""
    hidden = torch.tensor([[200.0]], requires_grad=True)
    found = predict_tokens(
        hidden, torch.tensor([[1.0], [0.0]]), torch.zeros(2), torch.tensor([1]), row_keys(1), column_keys(2)
    )
    found.loss_sum.backward()
    assert (found.loss_sum.item(), hidden.grad) == (200.0, torch.tensor([[1.0]]))


def test_half_precision_gradients_keep_the_rare_tokens() -> None:
    """1/V is below what fp16 holds after a division by the batch; here the division comes after the product."""
    rows, classes = 8, 30_522
    hidden = torch.ones(rows, 4, dtype=torch.float16, requires_grad=True)
    weight = torch.zeros(classes, 4, dtype=torch.float16, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float16, requires_grad=True)
    targets = torch.zeros(rows, dtype=torch.int64)
    found = predict_tokens(hidden, weight, bias, targets, row_keys(rows), column_keys(classes))
    (found.loss_sum * 2.0**10 / rows).backward()
    assert weight.grad is not None
    assert weight.grad[1:].float().numpy() == pytest.approx(2.0**10 / classes, rel=2e-3)


# --- permutations


@given(size=st.one_of(st.integers(1, 300), st.integers(4000, 70_000)), key=st.integers(0, 2**63 - 1))
@settings(max_examples=60)
def test_a_keyed_permutation_holds_every_number_once(size: int, key: int) -> None:
    whole = permutation_at(np.arange(size), size, key)
    assert (np.sort(whole) == np.arange(size)).all()
    some = np.arange(size)[:: max(1, size // 7)]
    assert (permutation_at(some, size, key) == whole[some]).all()  # any place is reached without the others


@pytest.mark.parametrize("size", [10, 5000])
def test_a_keyed_permutation_favours_no_place(size: int) -> None:
    """Where the first number and its neighbour go, in tenths of the whole, over 2,000 keys."""
    for place in (0, 1):
        found = [int(permutation_at(np.array([place]), size, key)[0]) for key in range(2_000)]
        assert chi_square_p(np.bincount(np.array(found) * 10 // size, minlength=10), np.full(10, 200.0)) > LOWEST_P


def test_neighbours_in_a_large_permutation_are_unrelated() -> None:
    whole = permutation_at(np.arange(50_000), 50_000, 7)
    correlation = np.corrcoef(whole[:-1], whole[1:])[0, 1]
    assert abs(correlation) < 4 / math.sqrt(len(whole))
    assert (np.diff(whole) == 1).sum() < 10  # one is expected


# --- masking


def masks_for(seed: int, **changes: object) -> tuple[Masks, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(6, 129, 400)
    positions = np.arange(128)
    maskable = (positions > 0) & (positions < lengths[:, None] - 1) & (rng.random((400, 128)) > 0.02)
    return choose_masks(maskable, lengths, rng, MaskingSection(**changes)), maskable, lengths  # type: ignore[arg-type]


def test_bernoulli_selects_each_token_with_the_given_probability_and_masks_85_percent_of_those() -> None:
    masks, maskable, _ = masks_for(0)
    selected, masked, possible = int(masks.selected.sum()), int(masks.masked.sum()), int(maskable.sum())
    assert stats.binomtest(selected, possible, 0.15).pvalue > LOWEST_P
    assert stats.binomtest(masked, selected, 0.85).pvalue > LOWEST_P
    counts = masks.selected[:, 1:50].sum(0)  # no position is favoured
    expected = maskable[:, 1:50].sum(0) * 0.15
    assert chi_square_p(counts, expected * counts.sum() / expected.sum()) > LOWEST_P


@pytest.mark.parametrize(("length", "count"), [(128, 19), (100, 15), (64, 10), (5, 1), (4, 1)])
def test_a_fixed_count_is_the_originals(length: int, count: int) -> None:
    """19 of 128 = min(round(0.15 * 128), floor(0.155 * 128)); 1 at least."""
    positions = np.arange(128)
    maskable = np.tile((positions > 0) & (positions < length - 1), (50, 1))
    masks = choose_masks(maskable, np.full(50, length), np.random.default_rng(1), MaskingSection(count="fixed"))
    assert (masks.selected.sum(1) == count).all()


def test_a_fixed_count_favours_no_position() -> None:
    maskable = np.ones((20_000, 20), dtype=bool)
    masks = choose_masks(maskable, np.full(20_000, 20), np.random.default_rng(2), MaskingSection(count="fixed"))
    assert (masks.selected.sum(1) == 3).all()
    assert chi_square_p(masks.selected.sum(0), np.full(20, 3000.0)) > LOWEST_P


def test_of_a_fixed_count_85_percent_are_masked_wherever_they_stand() -> None:
    masks, _, _ = masks_for(6, count="fixed")
    by_place = masks.masked[:, 1:60].sum(0), masks.selected[:, 1:60].sum(0)
    assert stats.binomtest(int(masks.masked.sum()), int(masks.selected.sum()), 0.85).pvalue > LOWEST_P
    spread = ((by_place[0] - 0.85 * by_place[1]) ** 2 / (0.85 * 0.15 * by_place[1])).sum()
    assert stats.chi2.sf(spread, 59) > LOWEST_P


@pytest.mark.parametrize("count", ["bernoulli", "fixed"])
def test_a_mask_token_share_of_1_masks_all_that_is_selected(count: str) -> None:
    masks, _, _ = masks_for(7, count=count, mask_token_share=1.0)
    np.testing.assert_equal(masks.masked, masks.selected)


@pytest.mark.parametrize("count", ["bernoulli", "fixed"])
@given(seed=st.integers(0, 10_000), probability=st.floats(0.05, 0.9))
@settings(max_examples=20)
def test_what_may_not_be_masked_never_is(count: str, seed: int, probability: float) -> None:
    masks, maskable, _ = masks_for(seed, count=count, mlm_probability=probability)
    assert not (masks.selected & ~maskable).any()
    assert not (masks.masked & ~masks.selected).any()


def test_replacements_go_to_the_selected_or_only_to_the_masked() -> None:
    selected, _, _ = masks_for(4, replace_at="selected")
    masked, _, _ = masks_for(4, replace_at="masked")
    assert (selected.replaced == selected.selected).all()
    assert (masked.replaced == masked.masked).all()
    assert masked.replaced.sum() < selected.replaced.sum()


# --- losses and schedule


def test_the_discriminators_loss_is_that_of_the_counted_positions() -> None:
    rng = torch.Generator().manual_seed(0)
    scores, replaced = torch.randn(3, 4, generator=rng), torch.tensor([[1, 0, 1, 0]] * 3, dtype=torch.bool)
    counted = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    right = torch.where(replaced, torch.sigmoid(scores), 1 - torch.sigmoid(scores))
    torch.testing.assert_close(discriminator_loss_sum(scores, replaced, counted), -right.log()[counted].sum())


def test_losses_are_taken_in_fp32() -> None:
    hidden, weight = torch.zeros(1, 1, dtype=torch.bfloat16), torch.zeros(30_000, 1, dtype=torch.bfloat16)
    bias = torch.full((30_000,), 9.0, dtype=torch.bfloat16)
    found = predict_tokens(hidden, weight, bias, torch.tensor([0]), row_keys(1), column_keys(30_000))
    assert found.loss_sum.item() == pytest.approx(math.log(30_000), rel=1e-6)


@pytest.mark.parametrize(
    ("step", "rate"), [(0, 0.0), (1, 1e-4), (5, 5e-4), (10, 1e-3), (60, 5e-4), (109, 1e-5), (110, 0.0)]
)
def test_the_schedule_warms_up_and_decays_linearly(step: int, rate: float) -> None:
    value = learning_rate_at(step, kind="linear", learning_rate=1e-3, warmup_steps=10, total_steps=110)
    assert value == pytest.approx(rate, rel=1e-12, abs=1e-18)


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.0),
        (1, 5e-4 * 1e-4 * (1 - 1e-6)),
        (5_000, 5e-4 * 0.5 * 0.995),
        (10_000, 5e-4 * 0.99),  # the warm-up's end lies below the learning rate, since the decay has begun
        (500_000, 2.5e-4),
        (999_999, 5e-4 * 1e-6),
        (1_000_000, 0.0),
    ],
)
def test_the_originals_schedule_is_warm_up_times_decay(step: int, rate: float) -> None:
    schedule = load_recipe("electra-small").schedule
    value = learning_rate_at(step, learning_rate=5e-4, **schedule.model_dump())
    assert value == pytest.approx(rate, rel=1e-9, abs=1e-18)


def test_the_schedule_is_that_of_transformers() -> None:
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    scheduler = get_linear_schedule_with_warmup(optimizer, 7, 50)
    for step in range(50):
        ours = learning_rate_at(step, kind="linear", learning_rate=2e-3, warmup_steps=7, total_steps=50)
        assert ours == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        scheduler.step()
