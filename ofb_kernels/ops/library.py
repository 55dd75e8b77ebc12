"""How the Triton backend's functions are called: as ops of torch's library where something looks, else straight."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


class LibraryOp:
    """A function as the op `ofb_kernels::name`, to be registered with as one does with `torch.library.custom_op`.

    A compiler, a tracer, a dispatch mode or a transform sees the op. Where none of them looks, the function is called
    straight, under an `autograd.Function` where it has a gradient: the dispatcher's way through a custom op costs the
    host several times as much.

    Args:
        name: of the op.
        function: takes what the op's schema says (its annotations), and writes none of its arguments.
    """

    def __init__(self, name: str, function: Callable) -> None:
        self._name, self._function, self._apply = name, function, function
        self._definition = torch.library.custom_op(f"ofb_kernels::{name}", function, mutates_args=())
        self.register_fake = self._definition.register_fake

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        self._definition.register_autograd(backward, setup_context=setup_context)

        def forward(ctx, *arguments):  # with a setup_context of its own PyTorch looks at signatures in every call
            output = self._function(*arguments)
            setup_context(ctx, arguments, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(once_differentiable(backward))}
        self._apply = type(self._name, (torch.autograd.Function,), members).apply

    def __call__(self, *arguments):
        if _observed(arguments):
            return getattr(torch.ops.ofb_kernels, self._name)(*arguments)
        return self._apply(*arguments)


def library_op(name: str) -> Callable[[Callable], LibraryOp]:
    """Makes the function below it an op of that name."""
    return lambda function: LibraryOp(name, function)


def _observed(arguments: tuple) -> bool:
    """Whether anything but the function itself has to see the call."""
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or torch._C._are_functorch_transforms_active():
        return True
    tensors = (each for each in arguments if isinstance(each, Tensor))
    return any(type(each) not in (Tensor, torch.nn.Parameter) or each.is_meta for each in tensors)
