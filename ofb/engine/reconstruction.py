"""Pictures of masked image modelling while a search goes on."""

from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from ofb.engine.checkpoint import write_atomically
from ofb.engine.config import SearchConfig
from ofb.engine.device import autocast, pick_device
from ofb.engine.journal import Journal
from ofb.engine.run_folder import RECONSTRUCTION_FILE
from ofb.engine.seeding import seed_everything
from ofb.engine.shards import Loader
from ofb.supernet import Supernet

IMAGES = 8
LEAST_SIDE = 64  # pixels of a picture; smaller images are enlarged
DEVIATIONS = 2.5  # of locally normalized pixels, shown from black to white


def images_to_rebuild(supernet: Supernet, loader: Loader) -> Tensor | None:
    """A few images (B, C, H, W) of a loader; None where the supernet rebuilds none."""
    return None if supernet.masked_images is None else next(iter(loader))[0][:IMAGES]


def record_reconstruction(
    journal: Journal, supernet: Supernet, images: Tensor, epoch: int, config: SearchConfig
) -> None:
    """Show what an open supernet rebuilds of images, and keep it in the run folder; the same patches are hidden each
    time."""
    seed_everything(config.seed, "reconstruction", 0)
    device = pick_device(config)
    with autocast(config, device):
        rows = supernet.eval().reconstruct(images.to(device))
    picture = in_rows(rows)
    journal.record_picture(epoch, "reconstruction", picture)
    if config.output is not None:
        path = Path(config.output) / RECONSTRUCTION_FILE
        write_atomically(path, lambda file: to_pil_image(picture).save(file, "PNG"))


def in_rows(rows: tuple[Tensor, ...]) -> Tensor:
    """One picture (3, height, width) in 0 to 1 of rows of locally normalized images, (B, C, H, W) each."""
    images = torch.cat(rows).float().cpu()
    factor = -(-LEAST_SIDE // images.shape[-1])
    large = interpolate(images.div(2 * DEVIATIONS).add(0.5).clamp(0, 1), scale_factor=factor)
    if large.shape[1] not in (1, 3):
        large = large.mean(1, keepdim=True)
    return make_grid(large, nrow=len(rows[0]), padding=4, pad_value=1.0)
