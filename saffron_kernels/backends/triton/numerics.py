"""Small functions that kernels share: an accurate exponential, floats as integers in the same order, membership."""

from __future__ import annotations

import triton
import triton.language as tl

from saffron_kernels.backends.triton.launch import INTERPRETED

_LOG2E = tl.constexpr(1.4426950408889634)  # rounded to fp32 where it meets fp32: 1.44269502
_LOG2E_REST = tl.constexpr(1.92596298909109e-08)  # what that rounding drops
_LN2 = tl.constexpr(0.6931471805599453)
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b: 16-bit operands on the tensor cores with fp32 accumulation, fp32 operands in true fp32 (no tf32)."""
    if _INTERPRETED:  # it would multiply the bit patterns of bf16; products of 16-bit floats are exact in fp32
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 to `dtype`, rounded to nearest even, which the interpreter does not do for bf16: it truncates."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def exp(x):
    """e^x in fp32 to about one unit in the last place.

    `tl.exp` rounds x * log2(e) first, which costs |x| * 2^-24 of relative accuracy: too coarse for probabilities
    that are compared with those of other backends. Here the rounding error of the product is propagated.
    """
    high = x * _LOG2E
    low = tl.fma(x, _LOG2E, -high) + x * _LOG2E_REST
    # -inf * log2(e) - -inf is NaN: keep e^-inf = 0.
    low = tl.where(high > -1e4, low, 0.0)
    power = tl.exp2(high)
    return power + power * (low * _LN2)


@triton.jit
def tanh(x):
    """To a few units in the last place: a polynomial near 0 (Cephes' tanhf), where exponentials cancel."""
    size = tl.abs(x)
    e = exp(-2.0 * size)
    far = (1.0 - e) / (1.0 + e)
    z = x * x
    y = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z
    y = ((y + 1.33314422036e-1) * z - 3.33332819422e-1) * z
    return tl.where(size < 0.625, y * x + x, tl.where(x < 0, -far, far))


@triton.jit
def order_key(x):
    """Floats as int32 of the same order; -0.0 and 0.0 are equal. NaN has no place in it."""
    bits = tl.where(x == 0, 0.0, x).to(tl.float32).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def is_one_of(token, few_ptr, num_few):
    """Which tokens are among a few; none where `few_ptr` is None."""
    found = token != token
    if few_ptr is not None:
        for i in range(num_few):
            found = found | (token == tl.load(few_ptr + i))
    return found
