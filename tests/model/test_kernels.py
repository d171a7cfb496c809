"""The layer's own backward passes: the same gradients as autograd's, and dropout that drops what it should."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch.nn import functional

from electra_ds.model import kernels
from electra_ds.model.kernels import attention, dropout, dropout_add, feed_forward

LOWEST_P = 1e-4


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_dropout_drops_that_share_and_keeps_the_mean(probability: float) -> None:
    torch.manual_seed(3)
    size = 200_001  # not a multiple of the four that a random word serves
    found = dropout(torch.ones(size), probability)
    dropped = int((found == 0).sum())
    assert stats.binomtest(dropped, size, probability).pvalue > LOWEST_P
    assert found.max().item() == pytest.approx(1 / (1 - probability), rel=2e-4)
    pairs = (found[:-1:2] == 0) & (found[1::2] == 0)  # neighbours, which come out of one word
    assert stats.binomtest(int(pairs.sum()), len(pairs), probability**2).pvalue > LOWEST_P


def test_dropout_is_a_function_of_torchs_seed() -> None:
    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return dropout(torch.ones(1000), 0.3)

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_nothing_is_drawn_or_copied_where_nothing_drops() -> None:
    hidden = rand(4, 5)
    before = torch.get_rng_state()
    assert dropout(hidden, 0.0) is hidden
    assert torch.equal(dropout_add(hidden, hidden, 0.0), 2 * hidden)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_where_the_forward_passed_and_the_residual_always(dtype: torch.dtype) -> None:
    hidden = torch.ones(64, 32, dtype=dtype, requires_grad=True)
    residual = torch.zeros(64, 32, requires_grad=True)
    found = dropout_add(hidden, residual, 0.25)
    assert found.dtype == torch.float32
    (3.0 * found).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == dtype
    torch.testing.assert_close(hidden.grad.float(), 3.0 * found.detach(), rtol=1e-2, atol=0)
    assert residual.grad is not None
    assert torch.equal(residual.grad, torch.full((64, 32), 3.0))


@pytest.mark.parametrize("scores_at_once", [1, 300, 1 << 18], ids=["one by one", "in twos", "all at once"])
@pytest.mark.parametrize("masked", ["no mask", "padding", "by query"])
def test_attention_with_dropout_is_the_formula_and_so_are_its_gradients(
    monkeypatch: pytest.MonkeyPatch, scores_at_once: int, masked: str
) -> None:
    """With unit vectors as values the output is the dropped probabilities themselves, which gives the mask away."""
    monkeypatch.setattr(kernels, "_SCORES_AT_ONCE", scores_at_once)
    batch, length, heads = 5, 8, 2
    attend = {
        "no mask": None,
        "padding": (torch.arange(8) < torch.tensor([[8], [3], [5], [1], [8]]))[:, None, None, :],
        "by query": (torch.arange(8)[:, None] // 4 == torch.arange(8)[None, :] // 4).expand(5, 1, 8, 8),
    }[masked]
    inputs = rand(batch, length, 3, heads, length).detach()
    units = inputs.clone()
    units[:, :, 2] = torch.eye(length)[:, None].expand(batch, length, heads, length)
    torch.manual_seed(5)
    shown = attention(units.flatten(2), attend, heads, 0.3).view(batch, length, heads, length).transpose(1, 2)

    query_key_value = inputs.flatten(2).requires_grad_()
    torch.manual_seed(5)
    found = attention(query_key_value, attend, heads, 0.3)
    weights = torch.linspace(-1, 1, found.numel()).view_as(found)
    (found * weights).sum().backward()

    again = inputs.flatten(2).requires_grad_()
    query, key, value = again.view(batch, length, 3, heads, length).permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(-1, -2) * length**-0.5
    probabilities = torch.softmax(scores if attend is None else scores.masked_fill(~attend, float("-inf")), -1)
    scale = 65536 / round(0.7 * 65536)
    expected = ((probabilities * (shown != 0) * scale) @ value).transpose(1, 2).flatten(2)
    (expected * weights).sum().backward()
    torch.testing.assert_close(shown, probabilities * (shown != 0) * scale)
    possible = int(probabilities.gt(0).sum())
    assert stats.binomtest(int((shown != 0).sum()), possible, 0.7).pvalue > LOWEST_P
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(query_key_value.grad, again.grad)


def test_without_dropout_attention_is_torchs() -> None:
    query_key_value = rand(3, 6, 24)
    query, key, value = query_key_value.view(3, 6, 3, 2, 4).permute(2, 0, 3, 1, 4)
    expected = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(query_key_value, None, 2, 0.0), expected)


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
def test_the_feed_forwards_gradients_are_autograds(mode: str) -> None:
    torch.manual_seed(0)
    first, second = torch.nn.Linear(6, 20), torch.nn.Linear(20, 6)
    if mode == "bf16":
        first, second = first.bfloat16(), second.bfloat16()
    parameters = [*first.parameters(), *second.parameters()]
    results = []
    for ours in (True, False):
        hidden = rand(3, 5, 6).detach().to(first.weight.dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            output = feed_forward(hidden, first, second) if ours else second(functional.gelu(first(hidden)))
        (output.float() * torch.linspace(-1, 1, 90).view(3, 5, 6)).sum().backward()
        results.append([output, hidden.grad, *(parameter.grad for parameter in parameters)])
        for parameter in parameters:
            parameter.grad = None
    rounding = 1e-5 if mode == "fp32" else 2e-2
    for mine, theirs in zip(*results, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=rounding, atol=rounding)


def test_the_feed_forward_keeps_its_inner_tensor_once() -> None:
    """autograd would keep what goes into GELU and what comes out, each four times as wide as a layer."""
    first, second = torch.nn.Linear(8, 32), torch.nn.Linear(32, 8)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()), lambda nothing: nothing):
        feed_forward(rand(4, 16, 8), first, second)
    assert sorted(kept) == sorted([4 * 16 * 8, 4 * 16 * 32, 8 * 32, 8 * 32])
