"""Linear layers on the GPU over weights as the checkpoint holds them: FP8 with FP8 or bf16 activations, and bf16.

The functions choose between the Gluon kernels for compute capability 9.0 (linear_many.py, linear_few.py, linear_one.py)
and the portable kernel of this file.  Reference: dsv4_kernels.linear.

One reduction plan: the tensor cores sum every 128 inputs from nothing (FP8 to about 14 bits), and these sums, in FP8
times both scales, are added in float32 in the inputs' order.  Tiles, the number of tokens, what is the first operand
and who sums which 128 change no bit of a result, so nor do chunks or neighbours.
Letters: S tokens, O outputs, I inputs, G groups, P parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gpu import is_hopper
from .rounded import INTERPRETED, ROUND_BLOCK, Rounded, round_activations

BLOCK = ROUND_BLOCK  # inputs, and rows of an FP8 weight, that share a scale
ONE, FEW = 4, 64  # tokens of linear_one.py's and linear_few.py's kernels
LONG = 16  # blocks of a row from which linear_one.py is faster
ROUNDED_BY_ALL = 1  # tokens that every program of a product rounds for itself, which is faster than a kernel before it


@dataclass(frozen=True)
class Fp8Matrix:
    """An FP8 weight as on disk: data e4m3 [O, I], scale e8m0 bytes, uint8 [ceil(O/128), I/128]; both contiguous.

    Matrices that read the same input may be stacked, rows and scales, if all but the last have a multiple of 128 rows.
    """

    data: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        if self.data.dtype != torch.float8_e4m3fn or self.data.dim() != 2 or self.data.shape[1] % BLOCK:
            raise ValueError(
                f"an FP8 weight must be float8_e4m3fn [O, I] with I a multiple of {BLOCK}, "
                f"got {self.data.dtype} {tuple(self.data.shape)}"
            )
        wanted = (-(-self.data.shape[0] // BLOCK), self.data.shape[1] // BLOCK)
        if self.scale.dtype != torch.uint8 or tuple(self.scale.shape) != wanted:
            raise ValueError(
                f"the scales of an FP8 weight {tuple(self.data.shape)} must be uint8 {wanted}, "
                f"got {self.scale.dtype} {tuple(self.scale.shape)}"
            )
        _contiguous(("weight", self.data), ("scales", self.scale))

    @property
    def shape(self) -> torch.Size:
        return self.data.shape

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes


def fp8_linear(
    x: Rounded | Tensor, w: Fp8Matrix, out: Tensor | None = None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """x w^T with x rounded to e4m3: ``dtype`` (bfloat16 or float32) [S, O].

    x: Rounded [S, I], or bfloat16 or float32 [S, I], which is rounded first.  Raises ValueError for other shapes,
    dtypes and strides.
    """
    if isinstance(x, Tensor) and x.dtype == torch.bfloat16 and 0 < x.shape[0] <= ROUNDED_BY_ALL and is_hopper(x.device):
        from .linear_one import multiply_one

        _contiguous(("activations", x))
        out = _checked(x, w.data, w.shape[0], out, dtype)
        if multiply_one(x, w.data, out, None, w.scale, rounding=True):
            return out
    rounded = x if isinstance(x, Rounded) else round_activations(x)
    _contiguous(("activations", rounded.data), ("their scales", rounded.scale))
    out = _checked(rounded.data, w.data, w.shape[0], out, dtype)
    return _product(rounded.data, w.data, out, rounded.scale, w.scale)


def plain_linear(x_SI: Tensor, w: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """x w^T of bfloat16 inputs: ``dtype`` (float32 or bfloat16) [S, O].

    x: bfloat16 [S, I]; w: bfloat16 [O, I], or the parts of a float32 weight, [P, O, I] (`split_float32`).  128 divides
    I.  Raises ValueError for anything else.
    """
    if x_SI.dtype != torch.bfloat16 or w.dtype != torch.bfloat16:
        raise ValueError(
            f"a plain linear takes bfloat16 inputs and weights (float32 weights through split_float32), "
            f"got {x_SI.dtype} and {w.dtype}"
        )
    _contiguous(("activations", x_SI), ("weight", w))
    parts = w.shape[0] if w.dim() == 3 else 1
    out = _checked(x_SI, w, w.shape[-2], out, dtype)
    return _product(x_SI, w.view(-1, w.shape[-1]), out, parts=parts)


@overload
def grouped_linear(x_SGI: Tensor, w: Fp8Matrix, out: Tensor | None = None) -> Tensor: ...


@overload
def grouped_linear(x_SGI: Tensor, w: Fp8Matrix, out: Rounded | None = None, *, rounded: Literal[True]) -> Rounded: ...


def grouped_linear(
    x_SGI: Tensor, w: Fp8Matrix, out: Tensor | Rounded | None = None, rounded: bool = False
) -> Tensor | Rounded:
    """Block-diagonal product: group g of x times rows g*O/G .. (g+1)*O/G of w: bfloat16 [S, O], or that rounded.

    x: bfloat16 [S, G, I], not rounded; w: [O, I], O/G a multiple of 128.  Weights become bfloat16, which is exact (up
    to scales of 2^-117).  ``rounded``: the result as `round_activations` of the bfloat16 values has it.
    """
    tokens, groups, width = x_SGI.shape
    outputs = w.shape[0]
    if x_SGI.dtype != torch.bfloat16 or w.shape[1] != width or outputs % (groups * BLOCK):
        raise ValueError(
            f"a grouped linear takes bfloat16 [S, G, I] and an FP8 weight of G * O rows, O a multiple of {BLOCK}, "
            f"got {x_SGI.dtype} {tuple(x_SGI.shape)} and {tuple(w.shape)}"
        )
    _contiguous(("activations", x_SGI))
    x = x_SGI.view(tokens, groups * width)
    if rounded:
        result = out if isinstance(out, Rounded) else Rounded.empty(tokens, outputs, x.device)
        if is_hopper(x.device) and tokens > FEW and outputs // groups % 256 == 0:
            from .linear_many import multiply_many

            multiply_many(x, expanded(w), result.data, groups=groups, rounded=result.scale)
            return result
        return round_activations(grouped_linear(x_SGI, w), result)
    if isinstance(out, Rounded):
        raise ValueError("a grouped linear writes Rounded only with rounded=True")
    out = _checked(x.view(tokens * groups, width), w.data, outputs, out, torch.bfloat16, tokens)
    if is_hopper(x.device) and tokens > FEW:
        return _product(x, expanded(w), out, groups=groups)
    return _product(x, w.data, out, w_scale=w.scale, groups=groups)


def split_float32(x: Tensor) -> Tensor:
    """``x`` float32 as three bfloat16 that add up to it, [3, *x.shape]; exact above 2^-110."""
    first = x.to(torch.bfloat16)
    rest = x - first.float()
    second = rest.to(torch.bfloat16)
    return torch.stack([first, second, (rest - second.float()).to(torch.bfloat16)])


def expanded(w: Fp8Matrix) -> Tensor:
    """The matrix as bfloat16 [O, I], exact (see `grouped_linear`)."""
    rows, columns = w.shape
    out = torch.empty(rows, columns, dtype=torch.bfloat16, device=w.data.device)
    grid = (triton.cdiv(rows, 32), columns // BLOCK)
    _expand[grid](w.data, w.scale, out, rows, columns, ROWS=32, num_warps=4)
    return out


# ---- checks ----------------------------------------------------------------------------------------------------------


def _contiguous(*tensors: tuple[str, Tensor]) -> None:
    for name, tensor in tensors:
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise ValueError(
                f"a linear on the GPU needs its {name} contiguous and aligned to 16 bytes, "
                f"got shape {tuple(tensor.shape)} with strides {tensor.stride()}; call .contiguous()"
            )


def _checked(
    x: Tensor, w: Tensor, outputs: int, out: Tensor | None, dtype: torch.dtype, tokens: int | None = None
) -> Tensor:
    """``out``, or room for the result, after all that must fit has been compared."""
    if x.dim() != 2 or x.shape[1] != w.shape[-1] or x.shape[1] % BLOCK:
        raise ValueError(
            f"activations [S, I] and weights [O, I] must agree in I, a multiple of {BLOCK}, "
            f"got {tuple(x.shape)} and {tuple(w.shape)}"
        )
    shape = (x.shape[0] if tokens is None else tokens, outputs)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=x.device)
    if tuple(out.shape) != shape or out.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"a linear writes bfloat16 or float32 {shape}, got {out.dtype} {tuple(out.shape)}")
    _contiguous(("result", out))
    return out


# ---- dispatch --------------------------------------------------------------------------------------------------------


def _product(
    x: Tensor,
    w: Tensor,
    out: Tensor,
    x_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
    parts: int = 1,
    groups: int = 1,
) -> Tensor:
    """x [S, G * I], w [P * O, I] -> out [S, O].  Scales of both: FP8; of w only: FP8 weights, bf16 activations."""
    tokens, outputs = out.shape
    if not tokens or not outputs:
        return out
    if is_hopper(x.device):
        widen, blocks = w_scale is not None and x_scale is None, w.shape[1] // BLOCK
        if tokens <= ONE and blocks >= LONG:
            from .linear_one import multiply_one

            if multiply_one(x, w, out, x_scale, w_scale, parts, groups):
                return out
        if tokens <= FEW and not (widen and groups > 1 and blocks % 2):
            from .linear_few import multiply_few

            return multiply_few(x, w, out, x_scale, w_scale, parts, groups)
        if tokens > FEW and outputs % 8 == 0 and not widen:  # rows of a result that TMA can write
            from .linear_many import multiply_many

            return multiply_many(x, w, out, x_scale, w_scale, parts, groups)
    none = out.view(torch.uint8)
    s_tiles, o_tiles = triton.cdiv(tokens, 64), triton.cdiv(outputs, 64)
    _linear[(s_tiles * o_tiles,)](
        x,
        w,
        out,
        none if x_scale is None else x_scale,
        none if w_scale is None else w_scale,
        tokens,
        outputs,
        w.shape[1],
        x.shape[1],
        parts,
        max(1, o_tiles // groups),
        FP8=x_scale is not None,
        WIDEN=w_scale is not None and x_scale is None,
        S_TILE=64,
        O_TILE=64,
        num_warps=4,
        num_stages=4,
    )
    return out


# ---- portable kernels ------------------------------------------------------------------------------------------------


@triton.jit
def _power(exponent):
    """2^(exponent - 127) of an e8m0 byte: float32."""
    return tl.maximum(exponent.to(tl.int32) << 23, 1 << 22).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["tokens", "parts", "group_tiles"])
def _linear(
    x_ptr,
    w_ptr,
    out_ptr,
    xs_ptr,
    ws_ptr,
    tokens,
    outputs,
    inputs,
    x_stride,
    parts,
    group_tiles,
    FP8: tl.constexpr,
    WIDEN: tl.constexpr,
    S_TILE: tl.constexpr,
    O_TILE: tl.constexpr,
):
    """One tile [S_TILE, O_TILE] a program, tokens first: the least that wgmma takes are 64."""
    s_tiles = tl.cdiv(tokens, S_TILE)
    s = tl.program_id(0) % s_tiles * S_TILE + tl.arange(0, S_TILE)
    o_tile = tl.program_id(0) // s_tiles
    o = o_tile * O_TILE + tl.arange(0, O_TILE)
    k = tl.arange(0, 128)
    blocks = inputs // 128
    x = x_ptr + s.to(tl.int64)[:, None] * x_stride + (o_tile // group_tiles * inputs + k)[None, :]
    w = w_ptr + o.to(tl.int64)[:, None] * inputs + k[None, :]
    xs = xs_ptr + s.to(tl.int64) * blocks
    ws = ws_ptr + o_tile * O_TILE // 128 * blocks
    shown, rows = (s < tokens)[:, None], (o < outputs)[:, None]
    acc = tl.zeros([S_TILE, O_TILE], tl.float32)
    for step in range(parts * blocks):
        block = step % blocks
        x_tile = tl.load(x + block * 128, mask=shown, other=0.0)
        w_tile = tl.load(w + (step // blocks).to(tl.int64) * outputs * inputs + block * 128, mask=rows, other=0.0)
        if FP8:
            scale = tl.load(xs + block, mask=s < tokens, other=0.0) * _power(tl.load(ws + block))
            acc += tl.dot(x_tile, tl.trans(w_tile)) * scale[:, None]
        else:
            if WIDEN:
                w_tile = (w_tile.to(tl.float32) * _power(tl.load(ws + block))).to(tl.bfloat16)
            if INTERPRETED:  # which has no products of bfloat16
                x_tile, w_tile = x_tile.to(tl.float32), w_tile.to(tl.float32)
            # A limit that binds nobody, but keeps the compiler from summing all inputs in the tensor cores.
            acc += tl.dot(x_tile, tl.trans(w_tile), max_num_imprecise_acc=128)
    place = out_ptr + s.to(tl.int64)[:, None] * outputs + o[None, :]
    tl.store(place, acc.to(out_ptr.dtype.element_ty), mask=shown & (o < outputs)[None, :])


@triton.jit
def _expand(w_ptr, ws_ptr, out_ptr, rows, columns, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    place = row.to(tl.int64)[:, None] * columns + block * 128 + tl.arange(0, 128)[None, :]
    scale = _power(tl.load(ws_ptr + tl.program_id(0) * ROWS // 128 * (columns // 128) + block))
    w = tl.load(w_ptr + place, mask=(row < rows)[:, None], other=0.0).to(tl.float32) * scale
    tl.store(out_ptr + place, w.to(tl.bfloat16), mask=(row < rows)[:, None])
