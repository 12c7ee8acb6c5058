"""Whether a decode stack can run a model, told before any of its weights is used.

The stack's own code runs with a twin of the net on torch's meta device, where tensors have a shape
and no values. What looks at a value there would look at one on the GPU, which a recorded step
cannot wait for; what passes arguments that a stack does not take fails there as it would later.
"""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lib.models import dry_run, experts
from lib.stacks.stack import StackError

aten = torch.ops.aten
CONTEXT, CAPACITY = 5, 64  # tokens
# What torch says where a value is asked for and there is none.
_NO_VALUE = ("meta tensor", "Cannot copy out of meta", "data-dependent", "unimplemented by default")
# What it says of an operation that has no form for shapes alone.
_NO_SHAPE = ("from the 'Meta' backend", "not implemented for")
_REASONS: weakref.WeakKeyDictionary[Any, dict[Any, str]] = weakref.WeakKeyDictionary()


class Numbers(TorchDispatchMode):
    """Where slices, choices and ranges of a step begin, and its factors: numbers that its code has
    as Python has them, which a recorded step repeats as they were."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[float] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.slice.Tensor, aten.select.int):
            axis, place = (*args, None, None)[1:3]
            size = args[0].shape[axis or 0]
            self.seen.add(min(place or 0, size) + (size if (place or 0) < 0 else 0))
        elif func in (aten.arange.start, aten.arange.start_step):
            self.seen.add(args[0])
        self.seen.update(value for value in args if isinstance(value, float))
        return func(*args, **(kwargs or {}))


def require(stack: str, net: Any, rehearse: Callable[[Any], None]) -> None:
    """Raise a StackError where the stack cannot run the net; `rehearse` runs it with a twin.

    Asked once for a net in its present implementations of attention and experts.
    """
    text = net.config.get_text_config(decoder=True)
    place = (stack, text._attn_implementation, text._experts_implementation)
    reasons = _REASONS.setdefault(net, {})
    if place not in reasons:
        reasons[place] = _reason(net, rehearse)
    if reasons[place]:
        raise StackError(
            f"the stack {stack!r} cannot run {net.config.model_type}: {reasons[place]}"
        )


def _reason(net: Any, rehearse: Callable[[Any], None]) -> str:
    try:
        with torch.inference_mode(False):
            shapes = twin(net)
    except Exception:  # what cannot be built twice is found out when it runs
        return ""
    try:
        with dry_run.silently(), torch.inference_mode(False), torch.no_grad():
            rehearse(shapes)
    except StackError as error:
        return str(error)
    except Exception as error:  # of the library's code, called as a recorded step calls it
        if any(part in str(error) for part in _NO_VALUE):
            return (
                f"its step looks at a value that is on the GPU (at `{_line(error)}`), which a "
                "recorded step cannot wait for; use hf-eager"
            )
        if any(part in str(error) for part in _NO_SHAPE):
            return ""  # which says nothing of the operation on a GPU
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        return (
            f"its code does not take what this stack hands to it (at `{_line(error)}`: "
            f"{type(error).__name__}, {lines[0]}); use hf-eager"
        )
    return ""


def twin(net: Any) -> Any:
    """The same net of shapes, on the meta device."""
    shapes = dry_run.twin_of(net)
    if experts.in_use(shapes) == "grouped_mm":  # the same shapes, for every dtype
        experts.use(shapes, "batched_mm")
    return shapes


def _line(error: BaseException) -> str:
    """The last line of the library's model code that ran."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/transformers/" in frame.filename]
    return ((own or frames)[-1].line or "").strip()
