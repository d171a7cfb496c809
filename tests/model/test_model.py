"""The same function as transformers: logits, losses and every gradient, at equal weights, masks and samples."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, ElectraForMaskedLM, ElectraForPreTraining

from electra_ds.config.recipe import Recipe, load_recipe
from electra_ds.data.token_store import TokenStore
from electra_ds.pretraining.convert import discriminator_tensors, generator_tensors
from electra_ds.pretraining.electra import Electra, encoder_configs
from electra_ds.pretraining.masked_batch import MicroBatch
from tests.helpers import builder_for, model_for, small_recipe, to_transformers

RELATIVE = 1e-5


def close(ours: torch.Tensor, theirs: torch.Tensor, scale_of: torch.Tensor | None = None) -> None:
    """Within 1e-5 of the tensor's largest entry, or of another tensor's where its own are all rounding."""
    scale = (theirs if scale_of is None else scale_of).abs().max().item()
    torch.testing.assert_close(ours, theirs, rtol=RELATIVE, atol=RELATIVE * scale)


def case(store: TokenStore, *overrides: str) -> tuple[Recipe, Electra, MicroBatch]:
    recipe = small_recipe("model.initializer_range=0.2", *overrides)
    model = model_for(store, recipe)
    with torch.no_grad():  # biases and LayerNorms away from 0 and 1, so that a forgotten one shows
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return recipe, model, builder_for(store, recipe).build(3).micro_batch(0, 8, packed=False)


@torch.no_grad()
def generator_logits(model: Electra, batch: MicroBatch) -> torch.Tensor:
    """[M, V], which the model itself never holds."""
    attend = batch.attention_mask()
    hidden_BTH = model.generator(batch.masked_ids_BT, attend, batch.segments_BT, batch.positions_BT)
    head = model.generator_head
    return head.decoder(head.transform(hidden_BTH.flatten(0, 1)[batch.selected_M]))


@pytest.mark.parametrize("sharing", ["embeddings", "tokens", "none", "all"])
@pytest.mark.parametrize("embedding_size", [16, 32], ids=["projected", "same-size"])
@pytest.mark.parametrize("segments", ["one", "two"])
def test_logits_losses_and_gradients_equal_those_of_transformers(
    store: TokenStore, sharing: str, embedding_size: int, segments: str
) -> None:
    sizes = ["generator.width_multiplier=1", "generator.depth_multiplier=1"] if sharing == "all" else []
    _, model, batch = case(
        store, f"generator.sharing={sharing}", f"model.embedding_size={embedding_size}", f"data.segments={segments}",
        *sizes,
    )  # fmt: skip
    assert batch.sequences_BT is not None  # some sequences are padded
    attention_mask = (batch.sequences_BT > 0).long()
    assert (batch.segments_BT is not None) == (segments == "two")
    types = None if batch.segments_BT is None else batch.segments_BT.long()
    output = model.train()(batch)
    total = output.generator_loss_sum / 40 + 50 * output.discriminator_loss_sum / 200
    total.backward()

    generator, discriminator = to_transformers(model)
    mlm_logits = generator(batch.masked_ids_BT, attention_mask=attention_mask, token_type_ids=types).logits
    targets = batch.ids_BT.flatten()[batch.selected_M]
    close(generator_logits(model, batch), mlm_logits.flatten(0, 1)[batch.selected_M].detach())
    mlm_loss = functional.cross_entropy(mlm_logits.flatten(0, 1)[batch.selected_M], targets, reduction="sum")

    corrupted = batch.ids_BT.flatten().clone()
    corrupted[batch.selected_M[batch.replaced_M]] = output.samples_M[batch.replaced_M]
    corrupted = corrupted.view_as(batch.ids_BT)
    labels = (corrupted != batch.ids_BT).float()
    rtd_logits = discriminator(corrupted, attention_mask=attention_mask, token_type_ids=types).logits
    real = batch.sequences_BT > 0
    close(output.discriminator_logits_BT[real], rtd_logits[real].detach())
    rtd_loss = functional.binary_cross_entropy_with_logits(
        rtd_logits[batch.counted_BT], labels[batch.counted_BT], reduction="sum"
    )
    close(output.generator_loss_sum.detach(), mlm_loss.detach())
    close(output.discriminator_loss_sum.detach(), rtd_loss.detach())
    (mlm_loss / 40 + 50 * rtd_loss / 200).backward()

    ours = {
        name: tensor.grad for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_floating_point()
    }
    ours = {name: torch.zeros(()) if grad is None else grad for name, grad in ours.items()}
    compare_gradients(sharing, ours, generator, discriminator)


def compare_gradients(
    sharing: str, ours: dict[str, torch.Tensor], generator: ElectraForMaskedLM, discriminator: ElectraForPreTraining
) -> None:
    """A shared parameter's gradient is the sum of theirs; every gradient is looked at."""
    gen = {name: p.grad for name, p in generator.named_parameters(remove_duplicate=False)}
    disc = {name: p.grad for name, p in discriminator.named_parameters()}
    shared = {
        "none": lambda name: False,
        "tokens": lambda name: "word_embeddings" in name,
        "embeddings": lambda name: "electra.embeddings." in name,
        "all": lambda name: name.startswith("electra."),
    }[sharing]
    seen = 0
    for renamed, theirs, other in (
        (generator_tensors(ours), gen, disc),
        (discriminator_tensors(ours), disc, gen),
    ):
        assert set(renamed) == set(theirs)
        for name, gradient in renamed.items():
            key = "electra.embeddings.word_embeddings.weight" if name == "generator_lm_head.weight" else name
            expected = theirs[name]
            assert expected is not None, name
            if shared(key):
                assert other[key] is not None
                expected = expected + other[key]
            # A key's bias shifts all scores of a query alike, so its true gradient is 0; what stands there is
            # the rounding of its neighbours in the one matrix product.
            close(gradient, expected, renamed[name.replace("key", "value")] if "key.bias" in name else None)
            assert expected.abs().max() > 0 or "token_type" in name, name
            seen += 1
    assert seen == len(gen) + len(disc)


def test_a_batch_without_padding_takes_no_mask_and_gives_the_same(store: TokenStore) -> None:
    _, model, _ = case(store)
    builder = builder_for(store, small_recipe("data.document_sampling=length"))
    batches = (builder.build(step).micro_batch(0, 2) for step in range(200))
    batch = next(batch for batch in batches if batch.sequences_BT is None)
    model.eval()
    plain = model(batch)
    masked = model(batch._replace(sequences_BT=torch.ones(2, 32, dtype=torch.int32)))
    close(plain.discriminator_logits_BT, masked.discriminator_logits_BT)


def test_padding_changes_nothing(store: TokenStore) -> None:
    _, model, batch = case(store)
    model.eval()
    output = model(batch)
    assert batch.sequences_BT is not None
    changed = torch.where(batch.sequences_BT > 0, batch.ids_BT, 7)
    again = model(
        batch._replace(ids_BT=changed, masked_ids_BT=torch.where(batch.sequences_BT > 0, batch.masked_ids_BT, 7))
    )
    close(again.generator_loss_sum, output.generator_loss_sum)
    close(again.discriminator_loss_sum, output.discriminator_loss_sum)


def test_a_sample_that_equals_the_original_counts_as_original(store: TokenStore) -> None:
    _, model, batch = case(store)
    targets = batch.ids_BT.flatten()[batch.selected_M]
    assert not model(batch, targets).is_replaced_BT.any()
    others = torch.where(targets == 9, 10, 9)
    replaced = model(batch, others).is_replaced_BT.flatten()
    assert replaced.nonzero().squeeze(1).tolist() == batch.selected_M[batch.replaced_M].tolist()


def test_replacing_only_at_masks_leaves_the_kept_positions_alone(store: TokenStore) -> None:
    _, model, batch = case(store, "masking.replace_at=masked", "masking.mask_token_share=0.5")
    kept = batch.selected_M[~batch.replaced_M]
    assert len(kept) > 0
    assert not model(batch).is_replaced_BT.flatten()[kept].any()


def test_no_gradient_flows_through_the_samples(store: TokenStore) -> None:
    _, model, batch = case(store, "generator.sharing=none")
    model(batch).discriminator_loss_sum.backward()
    assert all(p.grad is None for name, p in model.named_parameters() if name.startswith("generator"))


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [("rc2020-small", (64, 12, 1, 256)), ("tiny", None)],
)
def test_the_generators_size_follows_the_originals_rule(recipe: str, expected: tuple[int, ...] | None) -> None:

    generator, discriminator = encoder_configs(load_recipe(recipe), 30522, 0)
    if expected:
        found = (
            generator.hidden_size, generator.num_hidden_layers, generator.num_attention_heads,
            generator.intermediate_size,
        )  # fmt: skip
        assert found == expected
    assert generator.hidden_size % generator.num_attention_heads == 0
    assert generator.embedding_size == discriminator.embedding_size


def test_rc2020_small_has_as_many_parameters_as_the_reference_counts() -> None:
    """13,549,057 in the discriminator with its embeddings, 647,162 in the generator alone (type table of two rows)."""

    model = Electra(load_recipe("rc2020-small"), 30522, 0)
    discriminator = sum(p.numel() for n, p in model.named_parameters() if n.startswith("discriminator"))
    generator = sum(p.numel() for n, p in model.named_parameters() if n.startswith("generator"))
    assert (discriminator, generator) == (13_549_057, 647_162)


def test_weights_come_from_the_seed_alone(store: TokenStore) -> None:
    torch.manual_seed(1)
    first = model_for(store, small_recipe())
    torch.manual_seed(2)
    second, third = model_for(store, small_recipe()), model_for(store, small_recipe("seed=1"))
    ours, same, other = (dict(model.named_parameters()) for model in (first, second, third))
    assert all(torch.equal(ours[name], same[name]) for name in ours)
    assert not torch.equal(ours["discriminator.layers.0.output.weight"], other["discriminator.layers.0.output.weight"])
    matrices = torch.cat([p.flatten() for p in first.parameters() if p.dim() == 2])
    assert matrices.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(first.discriminator.layers[0].output_norm.weight, torch.ones(32))  # type: ignore[union-attr]


def test_an_exported_folder_opens_with_transformers_and_gives_the_same_outputs(
    store: TokenStore, tmp_path: Path
) -> None:
    _, model, batch = case(store)
    model.eval()
    generator, discriminator = to_transformers(model)
    generator.save_pretrained(tmp_path / "g")
    discriminator.save_pretrained(tmp_path / "d")
    store.tokenizer.save(tmp_path / "d")
    assert batch.sequences_BT is not None
    mask = batch.sequences_BT > 0
    with torch.no_grad():
        output = model(batch, batch.ids_BT.flatten()[batch.selected_M])
        hidden = model.discriminator(batch.ids_BT, batch.attention_mask())
        theirs = ElectraForPreTraining.from_pretrained(tmp_path / "d").eval()
        close(output.discriminator_logits_BT[mask], theirs(batch.ids_BT, attention_mask=mask.long()).logits[mask])
        encoder = AutoModel.from_pretrained(tmp_path / "d").eval()
        close(hidden[mask], encoder(batch.ids_BT, attention_mask=mask.long()).last_hidden_state[mask])
        mlm = ElectraForMaskedLM.from_pretrained(tmp_path / "g").eval()
        logits = mlm(batch.masked_ids_BT, attention_mask=mask.long()).logits.flatten(0, 1)
        close(generator_logits(model, batch), logits[batch.selected_M])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "d")
    assert tokenizer("Abc de.")["input_ids"][1:-1] == store.tokenizer.encode_lines(["Abc de."])[0]


def test_the_originals_initial_weights_are_those_of_its_code() -> None:
    """TensorFlow's default is uniform within sqrt(6 / (inputs + outputs)), whose deviation is that over sqrt(3)."""
    recipe = load_recipe("electra-small", [])
    weights = dict(Electra(recipe, 2000, 0).named_parameters())
    for network, hidden in (("discriminator", 256), ("generator", 64)):
        projection = weights[f"{network}.embeddings_project.weight"]
        bound = math.sqrt(6 / (128 + hidden))
        assert 0.99 * bound < projection.abs().max() <= bound
        assert projection.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert projection.std() > 4 * 0.0176  # of a normal distribution of 0.02 that is cut at two deviations
    last = weights["discriminator_head.dense_prediction.weight"]
    assert last.abs().max() <= math.sqrt(6 / 257)
    assert last.std() > 0.07
    table = weights["discriminator.embeddings.word_embeddings.weight"]
    assert table[1:].abs().max() <= 0.04
    assert table[1:].std().item() == pytest.approx(0.0176, rel=0.01)
