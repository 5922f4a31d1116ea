"""Any model as a chain of stages: a sequence of like blocks, and what comes before and after it.

The sequence is the container with the most parameters whose children are of one class and run one
after another, each on the output of the one before; what else they are given is the same for every
image. What comes before it is the model stopped at
the first block; what comes after is the model with its blocks passed over, which is tried out: the
chain has to compute what the model computes.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.layers import QuantConv2d
from qat.models import example_inputs
from qat.reconstruct.stage import Stage

Given = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a module after its first one."""


class _Call(NamedTuple):
    """What a module was called with and gave."""

    name: str
    input: Any
    output: Any
    given: Given


class _Stopped(Exception):
    """A forward pass came to where it was to stop."""


def sequence_stages(model: nn.Module) -> list[Stage] | None:
    """The stages of a model, in order; None where it has no such sequence."""
    (inputs, *others) = example_inputs(model, str(next(model.parameters()).device))
    if others:
        return None
    example = torch.randn(
        inputs.shape, generator=torch.Generator().manual_seed(0), dtype=inputs.dtype
    ).to(inputs.device)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            for names in _candidates(model):
                calls = _in_sequence(model, names, example)
                if not calls:
                    continue
                found = _chain(model, calls)
                if _disjoint(found) and _same(found, model, example):
                    return found
    finally:
        for module, mode in modes.items():
            module.training = mode
    return None


def _candidates(model: nn.Module) -> list[list[str]]:
    """Names of the children of containers whose children are alike, the largest container first."""
    found = []
    for name, module in model.named_modules():
        children = list(module.children())
        alike = len(children) > 1 and len({type(child) for child in children}) == 1
        if alike and isinstance(module, nn.ModuleList | nn.Sequential) and name:
            size = sum(p.numel() for p in module.parameters())
            found.append((size, [f"{name}.{child}" for child, _ in module.named_children()]))
    return [names for size, names in sorted(found, key=lambda pair: -pair[0]) if size]


def _in_sequence(model: nn.Module, names: list[str], example: Tensor) -> list[_Call] | None:
    """The call of each module; None unless they run as a sequence.

    They have to run once each, in order, each on what the one before gives, and whatever else they
    are given (the rotations of RoPE, shared biases of positions) must not depend on the image.
    """
    calls, others = _calls(model, names, example), _calls(model, names, example.flip(-1) * 0.5)
    if [call.name for call in calls] != names or len(others) != len(calls):
        return None
    alone = all(_is_tensor(call.input) and _is_tensor(call.output) for call in calls)
    follow = all(a.output is b.input for a, b in pairwise(calls))
    constant = all(_equal(a.given, b.given) for a, b in zip(calls, others, strict=True))
    return calls if alone and follow and constant else None


def _calls(model: nn.Module, names: list[str], images: Tensor) -> list[_Call]:
    found: list[_Call] = []

    def keep(name: str, _: nn.Module, inputs: Any, options: Any, output: Any) -> None:
        found.append(_Call(name, inputs[0] if inputs else None, output, (inputs[1:], options)))

    with ExitStack() as stack:
        for name in names:
            hook = partial(keep, name)
            module = model.get_submodule(name)
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        model(images)
    return found


def _equal(one: Any, other: Any) -> bool:
    match one, other:
        case Tensor(), Tensor():
            return torch.equal(one, other)
        case (dict(), dict()):
            return one.keys() == other.keys() and all(_equal(one[k], other[k]) for k in one)
        case (list() | tuple(), list() | tuple()):
            return len(one) == len(other) and all(map(_equal, one, other))
    return one is other or bool(one == other)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _chain(model: nn.Module, calls: list[_Call]) -> list[Stage]:
    names = [call.name for call in calls]
    blocks = [model.get_submodule(name) for name in names]

    def before(images: Tensor) -> Tensor:
        seen: list[Tensor] = []

        def stop(_: nn.Module, inputs: tuple[Tensor]) -> None:
            seen.append(inputs[0])
            raise _Stopped

        handle = blocks[0].register_forward_pre_hook(stop)
        try:
            model(images)
        except _Stopped:
            pass
        finally:
            handle.remove()
        return seen[0]

    def after(x: Tensor) -> Tensor:
        (image,) = example_inputs(model, str(x.device))
        images = image.expand(len(x), *image.shape[1:])
        passed: list[Callable[..., Tensor]] = [lambda y, *_, **__: y] * (len(blocks) - 1)
        with _replaced(blocks, [*passed, lambda *_, **__: x]):
            return model(images)

    owner = names[0].rpartition(".")[0]
    early, late = _around(model, names)
    return [
        Stage(f"before {owner}", early, before, _channels(blocks[0], calls[0].input)),
        *(
            Stage(
                call.name,
                (block,),
                partial(_run, block, *call.given),
                _channels(block, call.output),
            )
            for call, block in zip(calls, blocks, strict=True)
        ),
        Stage(f"after {owner}", late, after),
    ]


def _channels(block: nn.Module, x: Tensor) -> int:
    """The axis of the channels of what a block reads or gives: 1 where its convolutions do."""
    convolutions: list[Any] = [m for m in block.modules() if isinstance(m, nn.Conv2d | QuantConv2d)]
    widths = {width for conv in convolutions for width in (conv.in_channels, conv.out_channels)}
    return 1 if x.ndim == 4 and x.shape[1] in widths else -1


def _run(block: nn.Module, others: tuple[Any, ...], options: dict[str, Any], x: Tensor) -> Tensor:
    return block(x, *others, **options)


@contextmanager
def _replaced(blocks: list[nn.Module], functions: list[Callable[..., Tensor]]) -> Iterator[None]:
    """Let blocks run other functions within the block."""
    own = [{k: v for k, v in vars(block).items() if k == "forward"} for block in blocks]
    try:
        for block, function in zip(blocks, functions, strict=True):
            block.forward = function
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            vars(block).update(forward)


def _around(
    model: nn.Module, names: list[str]
) -> tuple[tuple[nn.Module, ...], tuple[nn.Module, ...]]:
    """The largest modules that run before, and after, a sequence of others."""
    owner = names[0].rpartition(".")[0]
    above = {owner, *(owner[:i] for i, char in enumerate(owner) if char == "."), ""}
    sides: tuple[list[nn.Module], list[nn.Module]] = ([], [])
    begun = False
    for name, module in model.named_modules():
        begun = begun or name == owner
        inside = name in above or name.startswith(f"{owner}.")
        if not inside and name.rpartition(".")[0] in above:
            sides[begun].append(module)
    return tuple(sides[0]), tuple(sides[1])


def _disjoint(chain: list[Stage]) -> bool:
    """Whether every parameter belongs to one module of one stage, so that it is trained once."""
    found = [id(p) for stage in chain for module in stage.modules for p in module.parameters()]
    return len(found) == len(set(found))


def _same(chain: list[Stage], model: nn.Module, example: Tensor) -> bool:
    x = example
    for stage in chain:
        x = stage.forward(x)
    return torch.equal(x, model(example))
