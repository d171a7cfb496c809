"""Sequences laid side by side in one row: the same numbers as with each in a row of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from electra_ds.data.packing import packed_rows
from electra_ds.data.token_store import TokenStore
from electra_ds.pretraining.electra import ElectraOutput
from electra_ds.pretraining.masked_batch import MaskedBatch, MicroBatch
from tests.helpers import builder_for, model_for, small_recipe

WIDTH = 32
lengths_of_sequences = st.lists(st.integers(2, WIDTH), min_size=1, max_size=60)


@given(lengths_of_sequences)
def test_every_token_stands_in_one_place_and_padding_is_marked(lengths: list[int]) -> None:
    rows = packed_rows(np.array(lengths), WIDTH)
    if rows is None:
        assert len(lengths) < 2 or sum(sorted(lengths)[:2]) > WIDTH  # no two sequences fit into one row
        return
    sources_BT = rows.pack(np.arange(len(lengths) * WIDTH).reshape(-1, WIDTH))
    assert len(sources_BT) < len(lengths)
    expected = [index * WIDTH + place for index, length in enumerate(lengths) for place in range(length)]
    real = rows.pack(np.arange(WIDTH) < np.array(lengths)[:, None])
    assert sorted(sources_BT[real].tolist()) == expected
    assert (sources_BT % WIDTH >= np.array(lengths)[sources_BT // WIDTH])[~real].all()
    assert sources_BT.ravel()[rows.moved(np.array(expected), WIDTH)].tolist() == expected


@given(lengths_of_sequences)
def test_a_sequence_is_not_cut_and_no_row_is_left_that_fits_into_another(lengths: list[int]) -> None:
    rows = packed_rows(np.array(lengths), WIDTH)
    if rows is None:
        return
    assert (rows.starts_S % WIDTH + lengths <= WIDTH).all()
    filled = np.sort(np.bincount(rows.starts_S // WIDTH, lengths)).astype(int)
    assert filled.sum() == sum(lengths)
    assert filled[:2].sum() > WIDTH or len(filled) == 1


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shortest", [6, 64])
def test_rows_are_nearly_as_few_as_the_tokens_fill(shortest: int, seed: int) -> None:
    """Of sequences above half a row no two fit together, so half of these are chosen below."""
    lengths = np.random.default_rng(seed).integers(shortest, 129, 128)
    lengths[::2] = lengths[::2] // 2
    rows = packed_rows(lengths, 128)
    assert rows is not None
    assert len(rows.leaders_B) <= 1.12 * np.ceil(lengths.sum() / 128)


def test_the_same_lengths_are_always_packed_alike() -> None:
    rows = packed_rows(np.array([9, 32, 20, 9, 12, 9]), WIDTH)
    assert rows is not None
    assert rows.starts_S.tolist() == [64, 0, 32, 73, 52, 82]  # 20 and 12 fill a row; the nines follow in their order


def padded_and_packed(store: TokenStore, *overrides: str) -> tuple[MaskedBatch, MicroBatch, MicroBatch]:
    batch = builder_for(store, small_recipe("global_batch_size=24", *overrides)).build(3)
    padded, packed = batch.micro_batch(0, 24, packed=False), batch.micro_batch(0, 24)
    assert len(packed.ids_BT) < len(padded.ids_BT)
    return batch, padded, packed


def by_sequence(batch: MicroBatch, values_BT: torch.Tensor) -> torch.Tensor:
    """The values at real tokens, sequence by sequence."""
    assert batch.sequences_BT is not None
    positions = torch.arange(WIDTH).expand(values_BT.shape) if batch.positions_BT is None else batch.positions_BT
    real = batch.sequences_BT > 0
    return values_BT[real][(batch.sequences_BT * WIDTH + positions)[real].argsort()]


@pytest.mark.parametrize("segments", ["one", "two"])
def test_tokens_masks_and_noise_keys_follow_their_sequences(store: TokenStore, segments: str) -> None:
    batch, padded, packed = padded_and_packed(store, f"data.segments={segments}")
    for name in ("ids_BT", "masked_ids_BT", "counted_BT"):
        assert torch.equal(by_sequence(packed, getattr(packed, name)), by_sequence(padded, getattr(padded, name)))
    if segments == "two":
        assert packed.segments_BT is not None
        assert padded.segments_BT is not None
        assert torch.equal(by_sequence(packed, packed.segments_BT), by_sequence(padded, padded.segments_BT))
    assert packed.counted_BT.sum() == batch.num_counted
    for name in ("replaced_M", "noise_keys_M"):
        assert torch.equal(getattr(packed, name), getattr(padded, name))
    for one in (padded, packed):
        assert torch.equal(one.ids_BT.flatten()[one.selected_M], torch.from_numpy(batch.ids_BT[batch.masks.selected]))


def test_a_query_sees_its_own_sequence_alone_and_padding_sees_something(store: TokenStore) -> None:
    _, _, packed = padded_and_packed(store)
    mask, sequences = packed.attention_mask(), packed.sequences_BT
    assert mask is not None
    assert sequences is not None
    assert mask.shape == (len(sequences), 1, WIDTH, WIDTH)
    assert mask.any(-1).all()
    row, _, query, place = mask.nonzero(as_tuple=True)
    assert (sequences[row, query] == sequences[row, place]).all()
    size_of = torch.bincount(sequences[sequences > 0])
    real = sequences > 0
    assert (mask[:, 0].sum(-1)[real] == size_of[sequences[real]]).all()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("segments", ["one", "two"])
@pytest.mark.parametrize("sharing", ["embeddings", "none"])
def test_packed_rows_give_the_losses_gradients_and_logits_of_padded_ones(
    store: TokenStore, segments: str, sharing: str
) -> None:
    overrides = (f"data.segments={segments}", f"generator.sharing={sharing}", "model.initializer_range=0.2")
    _, padded, packed = padded_and_packed(store, *overrides)
    model = model_for(store, small_recipe(*overrides)).train()
    outputs: list[ElectraOutput] = []
    gradients: list[dict[str, torch.Tensor]] = []
    for batch in (padded, packed):
        model.zero_grad()
        outputs.append(model(batch))
        (outputs[-1].generator_loss_sum + 50 * outputs[-1].discriminator_loss_sum).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    expected, found = outputs
    assert found.discriminator_logits_BT.isfinite().all()
    assert torch.equal(found.samples_M, expected.samples_M)
    close(found.generator_loss_sum.detach(), expected.generator_loss_sum.detach())
    close(found.discriminator_loss_sum.detach(), expected.discriminator_loss_sum.detach())
    close(found.generator_losses_M, expected.generator_losses_M)
    for name in ("discriminator_logits_BT", "is_replaced_BT"):
        close(by_sequence(packed, getattr(found, name)).float(), by_sequence(padded, getattr(expected, name)).float())
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        close(gradient, gradients[0][name])


def same(ours: MicroBatch, theirs: MicroBatch) -> bool:
    return all(
        (one is None and other is None) or (one is not None and other is not None and torch.equal(one, other))
        for one, other in zip(ours, theirs, strict=True)
    )


@given(step=st.integers(0, 10**6), size=st.sampled_from([1, 2, 4, 8]))
@settings(max_examples=30)
def test_where_no_row_is_saved_nothing_changes(store: TokenStore, step: int, size: int) -> None:
    batch = builder_for(store, small_recipe()).build(step)
    for first in range(0, 8, size):
        lengths = np.sort(batch.lengths_B[first : first + size])
        padded, packed = batch.micro_batch(first, size, packed=False), batch.micro_batch(first, size)
        assert padded.positions_BT is None
        assert (padded.sequences_BT is None) == bool((lengths == WIDTH).all())
        if size < 2 or lengths[:2].sum() > WIDTH:
            assert same(packed, padded)
        else:
            assert len(packed.ids_BT) < size
            assert packed.positions_BT is not None
