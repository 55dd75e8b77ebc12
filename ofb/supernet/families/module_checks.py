"""What a model's modules do besides what their classes say: a supernet reads their weights and does not call them."""

from collections import defaultdict

from torch import nn
from torch.nn.utils import parametrize

from ofb.supernet.families.vit_checks import Obstacles

LIBRARIES = ("torch.nn.", "timm.", "ofb.")
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def obstacles(model: nn.Module) -> Obstacles:
    """Hooks, parametrizations and forward passes of a user's own, and weights that are in use twice."""
    for name, module in model.named_modules():
        name = name or "the model"
        parametrized = parametrize.is_parametrized(module)
        yield parametrized, f"{name}: its weights are parametrized; remove that before (remove_parametrizations)"
        hook = next((each for kind in HOOKS for each in getattr(module, kind).values()), None)
        yield hook is not None, f"{name}: its hook {_name_of(hook)} would be passed over; remove it before"
        written_in = getattr(type(module).forward, "__module__", "")
        own = "forward" in vars(module) or not written_in.startswith(LIBRARIES)
        kind = f"{type(module).__module__}.{type(module).__name__}"
        yield own, f"{name}: the forward of {kind} would be passed over; merge what it adds into the weights before"
    users = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users[parameter].append(name)
    for first, *others in users.values():
        shared = f"{first} and {others[0]}" if others else ""
        yield bool(others), f"{shared} are one parameter, which cannot be pruned for each of them; give each its own"


def _name_of(hook: object) -> str:
    return getattr(hook, "__name__", type(hook).__name__)
