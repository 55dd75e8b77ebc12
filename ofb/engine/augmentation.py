"""timm's augmentation of training images, mended where Pillow refuses it, and with errors that name the policy."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import timm
from packaging.version import Version
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp
from torchvision.transforms import Compose

AUGMIX_OF_ANY_SHAPE = Version("1.0.30")  # of timm


class Augmentation:
    """The transform of training images, as timm makes it for a policy.

    At the highest magnitudes timm's policies posterize to 0 bits, which older Pillows take for a black image and newer
    ones refuse. Here at least one bit is kept.

    Args:
        transform: what timm made of the policy; its posterize is changed in place.
        policy: value of --aa.

    Raises:
        RuntimeError: on an image, if augmenting it fails.
    """

    def __init__(self, transform: Callable, policy: str | None) -> None:
        for op in _ops(transform):
            if op.name.startswith("Posterize"):
                op.aug_fn = partial(_keep_a_bit, op.aug_fn)
        self.transform, self.policy = transform, policy

    def __call__(self, image: Image.Image) -> Any:
        try:
            return self.transform(image)
        except MemoryError:
            raise
        except Exception as error:
            raise RuntimeError(
                f"aa: {self.policy} cannot augment this image ({type(error).__name__}: {error}); "
                "try another --aa, or --aa None for none, and please report this with the traceback"
            ) from error


def check_policy(policy: str | None, input_size: tuple[int, int, int]) -> None:
    """Raise ValueError where timm knows no policy of this name, or it fails on images of this size (C, H, W)."""
    channels, height, width = input_size
    needs_new_timm = (policy or "").startswith("augmix") and (channels == 1 or height != width)
    if needs_new_timm and Version(timm.__version__) < AUGMIX_OF_ANY_SHAPE:
        raise ValueError(
            f"aa: expected timm {AUGMIX_OF_ANY_SHAPE} or newer for {policy} on images that are grey or not square, got "
            f"timm {timm.__version__}; update it (pip install -U timm), or use another policy"
        )
    try:
        create_transform(8, is_training=True, auto_augment=policy)
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(
            f"aa: expected a policy of timm (rand-m9-mstd0.5-inc1, augmix-m5, original, originalr, v0, v0r, 3a, with "
            f"options), got {policy!r}: {error}; --aa None for none"
        ) from error


def _keep_a_bit(posterize: Callable, image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    return posterize(image, max(1, bits_to_keep), **options)


def _ops(transform: Any) -> Iterator[AugmentOp]:
    """The operations of a policy, wherever in timm's transform they are: AutoAugment, RandAugment or AugMix."""
    if isinstance(transform, AugmentOp):
        yield transform
    elif isinstance(transform, Compose):
        transform = transform.transforms
    parts = transform if isinstance(transform, list) else getattr(transform, "policy", getattr(transform, "ops", []))
    for part in parts:
        yield from _ops(part)
