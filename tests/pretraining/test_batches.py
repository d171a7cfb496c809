"""From a step to its global batch, and from there to micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from electra_ds.data.token_store import Ranges, TokenStore, split_holdout
from electra_ds.pretraining.batches import BatchBuilder
from electra_ds.training.step import prefetched
from tests.helpers import builder_for, small_recipe


@given(step=st.integers(0, 10**9))
@settings(max_examples=20)
def test_any_step_is_reached_at_once_and_is_always_the_same(store: TokenStore, step: int) -> None:
    recipe = small_recipe()
    first, second = builder_for(store, recipe).build(step), builder_for(store, recipe).build(step)
    np.testing.assert_equal(vars(first), vars(second))
    assert (first.ids_BT != builder_for(store, recipe).build(step + 1).ids_BT).any()


def test_a_batch_is_cls_a_window_sep_and_padding(store: TokenStore) -> None:
    recipe = small_recipe()
    tokenizer = store.tokenizer
    batch = builder_for(store, recipe).build(3)
    text = store.tokens.tobytes()
    assert (batch.lengths_B < 32).any()  # the corpus has short documents
    assert (batch.lengths_B == 32).any()
    for row, length in zip(batch.ids_BT, batch.lengths_B, strict=True):
        assert row[0] == tokenizer.cls_id
        assert row[length - 1] == tokenizer.sep_id
        assert (row[length:] == tokenizer.pad_id).all()
        assert row[1 : length - 1].astype(np.uint16).tobytes() in text
    special = tokenizer.is_special[batch.ids_BT]
    assert not (batch.masks.selected & special).any()
    assert not (batch.counted_BT & special).any()


@pytest.mark.parametrize("sequence_length", [32, 128, 8192])
def test_the_last_document_of_a_store_is_read_to_its_end_and_no_further(
    store: TokenStore, sequence_length: int
) -> None:
    """Also where a window is longer than the whole store."""
    recipe = small_recipe(f"data.sequence_length={sequence_length}", "model.max_position_embeddings=8192")
    documents = Ranges(store.documents[-3:-1], store.documents[-2:])
    builder = BatchBuilder(store, documents, recipe, seed=1)
    batch, rows = builder.build(0, 2), builder.sampler.rows(0, 2)
    for ids, start, size in zip(batch.ids_BT, rows.starts_B, rows.first_B, strict=True):
        assert start + size <= store.documents[-1]
        assert ids[1 : size + 1].tolist() == store.tokens[start : start + size].tolist()
        assert (ids[size + 2 :] == store.tokenizer.pad_id).all()


def test_two_segments_are_laid_out_with_a_sep_after_each(store: TokenStore) -> None:
    tokenizer = store.tokenizer
    builder = builder_for(store, small_recipe("data.segments=two"))
    seen_both = 0
    for step in range(10):
        batch, rows = builder.build(step), builder.sampler.rows(step, 8)
        assert batch.second_segment_BT is not None
        for row, ids in enumerate(batch.ids_BT):
            first, second = int(rows.first_B[row]), int(rows.second_B[row])
            text = store.tokens[rows.positions_BC[row, : first + second]]
            laid_out = [tokenizer.cls_id, *text[:first], tokenizer.sep_id]
            if second:
                laid_out += [*text[first:], tokenizer.sep_id]
            padding = 32 - len(laid_out)
            assert ids.tolist() == laid_out + padding * [tokenizer.pad_id]
            assert batch.lengths_B[row] == len(laid_out)
            in_second = (first + 2) * [False] + (len(laid_out) - first - 2) * [True] + padding * [False]
            assert batch.second_segment_BT[row].tolist() == in_second
            seen_both += second > 0
    assert seen_both


def test_the_discriminators_loss_can_count_cls_and_sep_but_never_padding(store: TokenStore) -> None:
    batch = builder_for(store, small_recipe("discriminator.loss_on_special=true")).build(3)
    assert (batch.counted_BT.sum(1) == batch.lengths_B).all()


@given(size=st.sampled_from([1, 2, 4, 8]), step=st.integers(0, 50))
@settings(max_examples=15)
def test_micro_batches_of_any_size_hold_the_same_masks_and_random_numbers(
    store: TokenStore, size: int, step: int
) -> None:
    batch = builder_for(store, small_recipe()).build(step)
    whole = batch.micro_batch(0, 8, packed=False)
    pieces = [batch.micro_batch(first, size, packed=False) for first in range(0, 8, size)]
    for name in ("ids_BT", "masked_ids_BT", "counted_BT", "replaced_M", "noise_keys_M"):
        joined = np.concatenate([getattr(piece, name).numpy() for piece in pieces])
        np.testing.assert_equal(joined, getattr(whole, name).numpy())
    places = [piece.selected_M.numpy() + index * size * 32 for index, piece in enumerate(pieces)]
    np.testing.assert_equal(np.concatenate(places), whole.selected_M.numpy())


def test_noise_keys_differ_between_steps_rows_and_positions(store: TokenStore) -> None:
    builder = builder_for(store, small_recipe())
    keys = np.concatenate([builder.build(step).noise_keys_BT.ravel() for step in range(20)])
    assert len(np.unique(keys)) > 0.999 * len(keys)


def test_the_prefetching_thread_gives_every_step_in_order_and_ends(store: TokenStore) -> None:
    builder = builder_for(store, small_recipe())
    steps = [step for step, _ in prefetched(builder, 4, 9)]
    assert steps == [4, 5, 6, 7, 8]
    iterator = prefetched(builder, 0, 10**9)
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]


def test_a_batch_builder_for_held_out_text_never_sees_training_text(store: TokenStore) -> None:
    recipe = small_recipe()
    split = split_holdout(store.documents, recipe.data, recipe.seed)
    held = BatchBuilder(store, split.holdout, recipe, seed=77)
    allowed = {(int(start), int(stop)) for start, stop in zip(split.holdout.starts, split.holdout.stops, strict=True)}
    for step in range(20):
        rows = held.sampler.rows(step, 8)
        for start, length in zip(rows.starts_B, rows.first_B, strict=True):
            assert any(first <= start and start + length <= last for first, last in allowed)
