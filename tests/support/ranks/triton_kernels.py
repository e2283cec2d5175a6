"""Compares the Triton kernels with their plain forms: on a GPU or, where TRITON_INTERPRET=1 is set, on the CPU.

Prints one line per comparison that was made. tests/wan/model/test_kernels.py runs it in Triton's interpreter.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from mount import mount_pack

mount_pack()
from layers import WRITING  # noqa: E402
from tiny import TINY, random_weights  # noqa: E402
from wan_pack.wan.model.codes import hadamard  # noqa: E402
from wan_pack.wan.model.eight_bits import E4M3, KeptWeight, quantise_rows  # noqa: E402
from wan_pack.wan.model.kernels.fused import triton_ops  # noqa: E402
from wan_pack.wan.model.linear import FP8_PRODUCTS, Fp8Tokens  # noqa: E402
from wan_pack.wan.model.ops import PLAIN, HeadPlaces  # noqa: E402
from wan_pack.wan.model.rope import rope_table  # noqa: E402
from wan_pack.wan.transformer.context import Context, pad_text  # noqa: E402
from wan_pack.wan.transformer.transformer import WanModel, meta_model, parameter_dtype  # noqa: E402
from wan_pack.wan.vae.vae_ops import VAE_OPS, Sum  # noqa: E402

TOKENS, COLUMNS, HEAD = 3, 56, 8
"""Of 7 heads; neither columns nor heads fill two blocks."""
BF16 = torch.bfloat16
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
HUGE = 1e30 if DEVICE == "cuda" else 1e3
"""The interpreter wraps round what is far under the least code."""
TRITON = triton_ops()


def near(name: str, out: object, expected: object) -> None:
    """Equal in float32; in other types up to one code, as the interpreter cuts off where a GPU rounds."""
    pairs = zip(out, expected, strict=True) if isinstance(expected, tuple) else [(out, expected)]
    for got, want in pairs:
        if isinstance(want, Fp8Tokens):
            near(name, got, tuple(want))
            continue
        assert got.dtype == want.dtype and got.shape == want.shape, (name, got.dtype, got.shape, want.shape)
        relative, least = {BF16: (2**-7, 2e-6), E4M3: (2**-3, 2**-9)}.get(want.dtype, (1e-5, 1e-5))
        got, want = got.float(), want.float()
        if relative == 2**-3 and DEVICE == "cpu":
            # Rounding up to a power of two, the interpreter loses the carry: half of it comes out.
            power = got.abs().frexp().mantissa == 0.5
            got = torch.where(power & ((2 * got - want).abs() <= relative * want.abs()), want, got)
        torch.testing.assert_close(got, want, rtol=relative, atol=least, msg=lambda m: f"{name}: {m}")
    print(name)


def compare(values: torch.Generator) -> None:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=values).to(DEVICE)

    x, y = draw(TOKENS, COLUMNS), draw(TOKENS, COLUMNS).to(BF16)
    affine = draw(COLUMNS), draw(COLUMNS)
    shared, own = (draw(1, COLUMNS), draw(1, COLUMNS)), (draw(TOKENS, COLUMNS), draw(TOKENS, COLUMNS))
    pairs = {"affine": affine, "shared": shared, "own": own}
    for (kind, pair), dtype in product(pairs.items(), (torch.float32, BF16, E4M3)):
        near(f"norm {kind} {dtype}", TRITON.norm(x, *pair, dtype), PLAIN.norm(x, *pair, dtype))
        for gate in (None, shared[0], own[0]):
            out, expected = (ops.add_norm(x, y, gate, *pair, dtype) for ops in (TRITON, PLAIN))
            near(f"add_norm {kind} {dtype}", out, expected)
    for gate in (shared[0], own[0]):
        near("add", TRITON.add(x, y, gate), PLAIN.add(x, y, gate))
    zeros = torch.zeros(TOKENS, COLUMNS, dtype=BF16, device=DEVICE)
    for rows in (y, zeros):
        near("cast", TRITON.cast(rows, E4M3), PLAIN.cast(rows, E4M3))
    layer = torch.nn.Identity()
    wide = (3 * draw(TOKENS, 80)).to(BF16)
    near("gelu", TRITON.gelu_linear(layer, wide, E4M3), PLAIN.gelu_linear(layer, wide, E4M3))
    compare_ends(draw)
    weights = draw(COLUMNS), draw(COLUMNS)
    near("rms_norm", TRITON.rms_norm(x, weights[0]), PLAIN.rms_norm(x, weights[0]))
    rope = rope_table((1, 1, TOKENS), HEAD, device=DEVICE)
    for rows in (x, y):
        near("rotate", TRITON.rotate(rows, weights[0], rope, HEAD), PLAIN.rotate(rows, weights[0], rope, HEAD))
    # One piece with nothing behind it, two full ones, and the heads of the smaller models.
    for count in (1, 2, 12, 24):
        rows, weight = draw(TOKENS, count * HEAD), draw(count * HEAD)
        near("rms_norm", TRITON.rms_norm(rows, weight), PLAIN.rms_norm(rows, weight))
        near("rotate", TRITON.rotate(rows, weight, rope, HEAD), PLAIN.rotate(rows, weight, rope, HEAD))
        near("norm", TRITON.norm(rows, weight, weight, BF16), PLAIN.norm(rows, weight, weight, BF16))
        near("cast", TRITON.cast(rows.to(BF16), E4M3), PLAIN.cast(rows.to(BF16), E4M3))
    for size, loud in product((16, 32), (1.0, 50.0)):
        # Heads of 16 + 4 and of 8 + 2, of several tokens at a time: enough for the matrix units. The interpreter
        # multiplies the bits of bfloat16 as if they were integers.
        rows, weight = (draw(TOKENS, 320) * 3).to(torch.float32 if DEVICE == "cpu" else BF16), draw(320)
        weight[::7] *= loud
        spread = rope_table((1, 1, TOKENS), size, device=DEVICE)
        codes, expected = (ops.rotate_codes(rows, weight, spread, size) for ops in (TRITON, PLAIN))
        near("rotate_codes", codes, tuple(expected))
        out, expected = (torch.zeros(100, size, device=DEVICE).to(E4M3) for _ in range(2))
        places = torch.tensor([[i * TOKENS * size for i in range(320 // size)], [size] * (320 // size)], device=DEVICE)
        scales = [
            ops.write_heads(rows, weight, spread, size, into.view(-1), HeadPlaces(places))
            for ops, into in ((TRITON, out), (WRITING, expected))
        ]
        near("write_heads", (out, scales[0]), (expected, scales[1]))
    qkv = draw(150, 3, 5, 16).to(BF16) * torch.tensor([1.0, 0.01, 100.0, 0.0, 1.0], device=DEVICE)[:, None].to(BF16)
    for heads in (qkv[:, 2], qkv[:140, 1, 1:4], qkv[:, 0, :0]):
        near("quantise_heads", TRITON.quantise_heads(heads), tuple(PLAIN.quantise_heads(heads)))
    # Heads in any order and at any distance, as ranks' parts of a message are; what lies between is left alone.
    table = torch.tensor([[16, 0, 640, 320, 24, 8, 480], [32, 32, 8, 40, 32, 32, 8]], device=DEVICE)
    for rows, weight in product((x, y), (weights[0], None)):
        out, expected = (torch.full((100, HEAD), 7.0, dtype=rows.dtype, device=DEVICE) for _ in range(2))
        for ops, into in ((TRITON, out), (WRITING, expected)):
            ops.write_heads(rows, weight, None if weight is None else rope, HEAD, into, HeadPlaces(table))
        near("write_heads", out, expected)


def compare_ends(draw: Callable[..., torch.Tensor]) -> None:
    """Codes where they end: of the largest value, of rows of zeros or nearly so, and of what is no number."""
    layer = torch.nn.Identity()
    for columns in (128, 320, 5120, 13824):
        rows = (3 * draw(5, columns)).to(BF16)
        rows[0] = 0
        rows[1, 5], rows[2, 7] = HUGE, -HUGE
        rows[3] = torch.linspace(-12, 12, columns)
        near("cast", TRITON.cast(rows, E4M3), PLAIN.cast(rows, E4M3))
        near("gelu", TRITON.gelu_linear(layer, rows, E4M3), PLAIN.gelu_linear(layer, rows, E4M3))
        # A scale of theirs would have no finite reciprocal, which times 0 is no number.
        least = torch.zeros_like(rows)
        least[:, ::3] = 1e-38
        made = TRITON.cast(least, E4M3)
        assert (made.scale == 1).all() and not made.codes.float().isnan().any(), made
        rows[4, 3] = torch.nan
        # The interpreter has no NaN in e4m3.
        for made in (TRITON.cast(rows, E4M3), TRITON.gelu_linear(layer, rows, E4M3)) if DEVICE == "cuda" else ():
            assert made.codes.float().isnan().nonzero().tolist() == [[4, 3]]
    # All of a row in one head, and there along one column of the matrix: the bound of its codes.
    for size, dtype in product((16, 32), (torch.float32,) if DEVICE == "cpu" else (torch.float32, BF16)):
        rows = torch.zeros(TOKENS, 320 // size, size, device=DEVICE, dtype=dtype)
        rows[:, 1] = hadamard(size, rows.device, dtype)[:, 5]
        rope = torch.ones(TOKENS, size // 2, device=DEVICE), torch.zeros(TOKENS, size // 2, device=DEVICE)
        weight = torch.ones(320, device=DEVICE)
        codes, expected = (ops.rotate_codes(rows.flatten(1), weight, rope, size) for ops in (TRITON, PLAIN))
        near("rotate_codes", codes, tuple(expected))
        assert (codes.codes[:, 1, 5].float() == 448).all()


def compare_vae(values: torch.Generator) -> None:
    """What lies between convolutions, with and without what is to be added; 24 channels do not fill a block of 32.

    The plain forms work on the same values in float32: the kernels round once.
    """
    frames, height, width, channels = 2, 3, 5, 24
    fused, plain = VAE_OPS["triton"](), VAE_OPS["plain"]()
    shape = (frames, height, width, channels)
    for dtype in (torch.float32, BF16):
        x, bias, residual, weight = (
            torch.randn(size, generator=values).to(DEVICE, dtype) for size in (shape, channels, shape, channels)
        )

        def room(ops: object, *size: int, dtype: torch.dtype = dtype) -> tuple[torch.Tensor, torch.Tensor]:
            """A tensor with something around its rows, and all of it."""
            padded = [size[0] + 2, size[1] + 2, *size[2:]]
            whole = torch.full(padded, 7.0, device=DEVICE, dtype=torch.float32 if ops is plain else dtype)
            return whole[2:, 1:-1], whole

        sums = [Sum(x, *rest) for rest in product((None, bias), (None, residual))] + [Sum(torch.zeros_like(x))]
        for total in sums:
            wide = Sum(*(None if y is None else y.float() for y in total))
            pairs = ((fused, total), (plain, wide))
            near("vae_add", *(ops.add(y, None).to(dtype) for ops, y in pairs))
            for silu in (False, True):
                outs = []
                for ops, y in pairs:
                    inside, whole = room(ops, *shape)
                    y = y._replace(x=y.x.clone())
                    kept = ops.norm(y, weight.to(y.x.dtype), inside, silu, True)
                    outs.append((kept.to(dtype), whole.to(dtype)))
                near("vae_norm", *outs)
            for of in (1, 2):
                outs = []
                for ops, y in pairs:
                    inside, whole = room(ops, of * frames, 2 * height, 2 * width, channels // of)
                    ops.upsample(y, of, inside)
                    outs.append(whole.to(dtype))
                near("vae_upsample", *outs)


def compare_models() -> None:
    """A whole forward, with full and with fp8 products."""
    layers = [f"blocks.{i}.{layer}" for i, layer in product(range(TINY.num_layers), FP8_PRODUCTS)]
    fp8 = {f"{layer}.weight": KeptWeight(E4M3, scaled=True) for layer in layers}
    tokens = torch.randn(6, 64, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    for products in (False, True):
        model = meta_model(TINY, torch.float32, fp8 if products else None, fp8_products=layers if products else ())
        weights = {name: t.to(parameter_dtype(name, torch.float32)) for name, t in random_weights().items()}
        for name in fp8 if products else ():
            weights[name], weights[f"{name}_scale"] = quantise_rows(weights[name], E4M3)
        model.load_state_dict(weights, assign=True)
        model.to(DEVICE)
        out = []
        for ops in (PLAIN, TRITON):
            out.append(_forward(model, ops, tokens))
        error = ((out[1] - out[0]).norm() / out[0].norm()).item()
        # On a GPU cuBLAS computes GELU's tanh, faster and with fewer digits.
        exact = 1e-5 if DEVICE == "cpu" else 1e-3
        assert error < (2e-2 if products else exact), f"fp8 {products}: {error}"
        print("model, fp8", products)


def _forward(model: WanModel, ops: object, tokens: torch.Tensor) -> torch.Tensor:
    for block in model.blocks:
        block.ops = ops
    text = Context(pad_text(torch.ones(2, TINY.text_dim, device=DEVICE)))
    rope = rope_table((1, 2, 3), TINY.head_dim, device=DEVICE)
    return model(tokens, torch.tensor([700.0], device=DEVICE), text, rope)


if __name__ == "__main__":
    with torch.no_grad():
        compare(torch.Generator().manual_seed(0))
        compare_vae(torch.Generator().manual_seed(1))
        compare_models()
