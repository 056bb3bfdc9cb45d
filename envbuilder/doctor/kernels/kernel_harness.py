"""Holds one call of a kernel against its float64 reference: outputs and gradients, over poisoned memory.

The error is `max|got - reference| / max|reference|`. Inputs are rounded to the case's dtype first, so it is
the kernel's own error. Before each call the allocator's free memory is filled with NaN: an element that a
kernel forgets to write shows as NaN instead of as the right answer of the call before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TF32_UNIT_ROUNDOFF = 2.0**-11
"""Triton multiplies float32 matrices in TF32: 10 bits of mantissa, as float16."""
FLOAT32_FLOOR = 1e-4
"""What float32 accumulation may add in any dtype. Sums of some thousand terms and the GPU's fast exponential
(2 ulp) stay below 1e-5; a kernel that drops a tap, a chunk or a document border errs by 1e-2 and more."""

Result: TypeAlias = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One call of a kernel and what it is held against."""

    kernel: str
    label: str
    run: Callable[..., Result]
    """Called with the inputs by keyword."""
    reference: Callable[..., Result]
    """Called with the same inputs in float64; gives as many tensors as `run`."""
    inputs: Mapping[str, Tensor]
    """On the CPU, with the dtypes and strides that the kernel gets; the floating ones get gradients."""
    tolerance: float
    has_backward: bool = True


def tolerance(roundings: int, dtype: torch.dtype, *, matrices: bool = False) -> float:
    """What `roundings` to the dtype on the longest path to a result may add up to.

    Each is at most one unit roundoff of the largest element. float32 `matrices` are multiplied in TF32.
    """
    unit = TF32_UNIT_ROUNDOFF if matrices and dtype == torch.float32 else UNIT_ROUNDOFF[dtype]
    return roundings * unit + FLOAT32_FLOOR


def poison_free_memory(device: torch.device) -> None:
    """Makes the CUDA allocator's free memory NaN: its pool of small blocks (up to 1 MiB) and the other."""
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    small = [torch.full((2**17,), math.nan, device=device) for _ in range(64)]
    large = [torch.full((2**24,), math.nan, device=device) for _ in range(16)]
    del small, large


def without_tuning() -> None:
    """Leaves each of Triton's tuned kernels that is defined from now on its smallest configuration."""
    try:
        import triton
    except ImportError:  # a torch without it; kernels that need it say so
        return
    tuned = triton.autotune

    def footprint(configuration: Any) -> int:
        """Elements in flight: what block sizes and pipelining make a kernel hold."""
        sizes = [int(size) for name, size in configuration.kwargs.items() if name.startswith("BLOCK_SIZE")]
        return math.prod(sizes) * int(configuration.num_stages)

    def autotune(configs: list[Any], *rest: Any, **options: Any) -> Callable[..., Any]:
        decorate: Callable[..., Any] = tuned([min(configs, key=footprint)], *rest, **options)
        return decorate

    triton.autotune = autotune


def relative_error(got: Tensor, reference: Tensor) -> float:
    """max|got - reference| / max|reference|; infinity where `got` is not finite everywhere."""
    if got.shape != reference.shape or not bool(torch.isfinite(got).all()):
        return math.inf
    return float((got.to(reference.dtype) - reference).abs().max() / reference.abs().max())


def compare(case: Case, device: torch.device) -> dict[str, Any]:
    """Runs one case, forward and where it has one backward, and reports its worst output or gradient."""
    leaves = [name for name, tensor in case.inputs.items() if case.has_backward and _has_gradient(tensor)]
    exact = {name: _in_double(tensor).to(device) for name, tensor in case.inputs.items()}
    # Last before the kernel: what the reference computes must not lie where the kernel's results go.
    poison_free_memory(device)
    inputs = {name: tensor.to(device, copy=True) for name, tensor in case.inputs.items()}
    got, gradients, upstream = _call(case.run, inputs, leaves)
    expected, wanted, _ = _call(
        case.reference, exact, leaves, tuple(_in_double(tensor) for tensor in upstream)
    )
    names = ["output"] if len(got) == 1 else [f"output {number}" for number in range(len(got))]
    names += [f"gradient of {name}" for name in leaves]
    errors = [
        (name, relative_error(*pair))
        for name, *pair in zip(names, (*got, *gradients), (*expected, *wanted), strict=True)
    ]
    return _result(case, *max(errors, key=lambda entry: entry[1]))


def _call(
    function: Callable[..., Result],
    inputs: dict[str, Tensor],
    leaves: list[str],
    upstream: tuple[Tensor, ...] | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The outputs, the gradients of `leaves`, and the outputs' gradients that these follow from."""
    with torch.set_grad_enabled(bool(leaves)):
        for name in leaves:
            inputs[name].requires_grad_()
        result = function(**inputs)
        outputs = result if isinstance(result, tuple) else (result,)
        if not leaves:
            return outputs, (), ()
        upstream = upstream or _upstream(outputs)
        gradients = torch.autograd.grad(outputs, [inputs[name] for name in leaves], upstream)
        return tuple(output.detach() for output in outputs), gradients, upstream


def _in_double(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor


def _has_gradient(tensor: Tensor) -> bool:
    return bool(tensor.is_floating_point() or tensor.is_complex())


def _upstream(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    # In the outputs' own layout: kernels ask for it.
    return tuple(torch.empty_like(out).copy_(torch.randn(out.shape, generator=generator)) for out in outputs)


def _result(case: Case, quantity: str, error: float) -> dict[str, Any]:
    result = {"kernel": case.kernel, "case": case.label, "quantity": quantity, "tolerance": case.tolerance}
    if error <= case.tolerance:
        return {**result, "error": error, "problem": None}
    if not math.isfinite(error):
        problem = f"{quantity} has elements that are not finite: left unwritten, or overflowed"
        return {**result, "error": None, "problem": problem}
    problem = f"{quantity} is off by {error:.1e} of its largest element (allowed: {case.tolerance:.1e})"
    return {**result, "error": error, "problem": problem}


def random(shape: tuple[int, ...], seed: int, *, low: float | None = None, high: float = 1.0) -> Tensor:
    """Normal numbers, or uniform ones in [low, high); the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    if low is None:
        return torch.randn(shape, generator=generator)
    return low + (high - low) * torch.rand(shape, generator=generator)


def documents(batch: int, length: int) -> Tensor:
    """seq_idx of packed rows: three documents, with borders at other places in each row."""
    borders = torch.tensor([[length // 3 + row, 2 * length // 3 - row] for row in range(batch)])
    return (torch.arange(length)[None, :, None] >= borders[:, None, :]).sum(dim=-1).to(torch.int32)


def with_settings(function: Callable[..., Any], **settings: object) -> Callable[..., Any]:
    """`function` with these settings, taking its tensors by keyword."""
    return lambda **inputs: function(**inputs, **settings)


def run_cases(
    name: str, cases: Callable[[], Iterator[Case]], device: torch.device
) -> Iterator[dict[str, Any]]:
    """Every case of one suite; what raises is a result too, and ends the suite, for CUDA may be unusable."""
    kernel, label = name, "importing"
    try:
        for case in cases():
            kernel, label = case.kernel, case.label
            yield compare(case, device)
    except Exception as error:
        yield failure(kernel, label, f"{type(error).__name__}: {error}")


def failure(kernel: str, label: str, problem: str) -> dict[str, Any]:
    """The result of a case that could not be measured."""
    unmeasured = {"quantity": None, "error": None, "tolerance": None}
    return {"kernel": kernel, "case": label, "problem": problem, **unmeasured}
