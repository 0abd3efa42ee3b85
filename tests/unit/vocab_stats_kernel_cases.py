"""What holds of the kernels alone. Run by test_vocab_stats_kernels.py with Triton's interpreter."""

from __future__ import annotations

import torch
from vocab_stats_cases import case, from_logits, here

from rl_lvr.ops.vocab_stats import triton_rows, vocab_stats
from rl_lvr.ops.vocab_stats.gradient import coefficients
from rl_lvr.ops.vocab_stats.partial import empty
from rl_lvr.ops.vocab_stats.sweep import Slice
from rl_lvr.ops.vocab_stats.torch_rows import differentiate


def test_the_kernels_are_what_runs() -> None:
    assert here() == "triton"
    assert type(triton_rows.fold_kernel).__name__ == "InterpretedFunction"


def test_slices_do_not_change_a_bit() -> None:
    """Tiles of a block each, in the order of the ids, wherever the workspace cuts them."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randint(-3, 4, (3, 8), generator=random) / 2
    weight = torch.randint(-3, 4, (9000, 8), generator=random) / 1
    follows = torch.tensor([True, True, False])
    whole = vocab_stats(hidden, weight, top_k=4, next_row=follows, backend="triton")
    sliced = vocab_stats(hidden, weight, top_k=4, next_row=follows, backend="triton", workspace_bytes=3 * 4 * 4096)
    for name in ("log_z", "entropy", "not_top1", "renyi2", "topk_mass", "topk_mean_logprob", "kl_next"):
        assert torch.equal(getattr(whole, name), getattr(sliced, name)), name


def test_gradient_of_logits_in_bfloat16() -> None:
    """As a GPU's matrix product takes it: one rounding away from float32, which in the interpreter is a truncation."""
    logits = torch.randn(3, 2500, generator=torch.Generator().manual_seed(1)) * 3
    chosen = torch.tensor([0, 2499, 7])
    part = triton_rows.fold(empty(3, 4, logits.device, logits.dtype), Slice(logits, 0, None, 1.0), chosen, None)
    wanted = torch.randn(9, 3, generator=torch.Generator().manual_seed(2))
    c = coefficients(part, chosen, wanted, 1.0)
    exact, half = torch.empty(3, 2500), torch.full((3, 2500), torch.nan, dtype=torch.bfloat16)
    differentiate(Slice(logits, 0, None, 1.0), c, exact)
    triton_rows.differentiate(Slice(logits, 0, None, 1.0), c, half)
    torch.testing.assert_close(half.float(), exact, rtol=2**-7, atol=1e-12)


def test_nothing_outside_the_slice_is_written() -> None:
    wide = torch.randn(4, 700, generator=torch.Generator().manual_seed(3))
    out = torch.full((4, 700), torch.nan)
    piece = Slice(wide[:, :513], 0, None, 1.0)
    part = triton_rows.fold(empty(4, 0, wide.device, wide.dtype), piece, None, None)
    triton_rows.differentiate(piece, coefficients(part, None, torch.ones(9, 4), 1.0), out[:, :513])
    assert out[:, :513].isfinite().all()
    assert out[:, 513:].isnan().all()


def test_a_vocabulary_as_large_as_qwen_s() -> None:
    logits = torch.randn(1, 152_064, generator=torch.Generator().manual_seed(4))
    logits[0, 151_000] = 28.0
    ours = vocab_stats(*from_logits(logits), top_k=10, backend="triton")
    truth = vocab_stats(*from_logits(logits), top_k=10, backend="reference")
    assert 0 < truth.entropy < 1e-4
    for name in ("log_z", "entropy", "not_top1", "renyi2", "topk_mass", "topk_mean_logprob"):
        torch.testing.assert_close(getattr(ours, name), getattr(truth, name), rtol=1e-5, atol=0, msg=name)


def test_half_precision_hidden_states_meet_float32_logits() -> None:
    given = case().to(torch.bfloat16)
    torch.testing.assert_close(given.run("triton").log_z, given.run("torch").log_z, rtol=1e-6, atol=1e-6)
