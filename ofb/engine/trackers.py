"""Where a run can be watched while it goes on: TensorBoard, and Weights & Biases.

Both are given the same: an epoch's numbers, how every submodule looks, and a picture.
"""

import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from ofb.engine.config import TrainingConfig
from ofb.engine.history import Look
from ofb.engine.options import to_dict


class TensorBoard:
    """Scalars, histograms and pictures of a stage in RUN/tensorboard/STAGE.

    Args:
        folder: the run folder.
        stage: names the curves.
        start_epoch: what was written from this epoch on is hidden: it is written again.
    """

    def __init__(self, folder: Path, stage: str, start_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard" / stage), purge_step=start_epoch)

    def numbers(self, epoch: int, numbers: Mapping[str, float]) -> None:
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, epoch)
        self.writer.flush()

    def looks(self, epoch: int, looks: Mapping[str, Look]) -> None:
        for name, look in looks.items():
            self.writer.add_histogram(f"importance/{name}", look.importance, epoch)
            sizes, p = look.by_units()
            # A histogram over sizes, each bucket as high as its candidate is likely.
            self.writer.add_histogram_raw(
                f"probability/{name}",
                min=sizes[0],
                max=sizes[-1],
                num=1,
                sum=float(sizes @ p),
                sum_squares=float(sizes**2 @ p),
                bucket_limits=sizes.tolist(),
                bucket_counts=p.tolist(),
                global_step=epoch,
            )

    def picture(self, epoch: int, name: str, picture: Tensor) -> None:
        self.writer.add_image(name, picture, epoch)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """The same as TensorBoard has, on https://wandb.ai or offline; all stages of a run are one run there.

    Args:
        config: its project and options.
        stage: prefixes the curves.
        first_step: of this stage: an epoch that is run again gets its old number, which is not logged twice.

    Raises:
        ValueError: it does not start.
    """

    def __init__(self, config: TrainingConfig, stage: str, first_step: int) -> None:
        import wandb

        self.wandb, self.stage, self.first_step = wandb, stage, first_step
        folder = None if config.output is None else Path(config.output)
        try:
            self.run = wandb.init(
                project=config.wandb_project,
                name=None if folder is None else folder.name,
                dir=folder,
                id=None if folder is None else _run_id(folder),
                resume="allow",
                config={stage: to_dict(config)},
            )
        except wandb.errors.Error as error:
            raise ValueError(
                f"log_wandb: Weights & Biases does not start: {error}; run `wandb login`, set WANDB_MODE=offline, or "
                "leave --log-wandb out"
            ) from error

    def numbers(self, epoch: int, numbers: Mapping[str, float]) -> None:
        self._log(epoch, numbers)

    def looks(self, epoch: int, looks: Mapping[str, Look]) -> None:
        for name, look in looks.items():
            sizes, p = look.by_units()
            edges = np.concatenate([[0], sizes])
            histograms = {
                f"importance/{name}": self.wandb.Histogram(look.importance.tolist()),
                f"probability/{name}": self.wandb.Histogram(np_histogram=(p.numpy(), edges)),
            }
            self._log(epoch, histograms)

    def picture(self, epoch: int, name: str, picture: Tensor) -> None:
        self._log(epoch, {name: self.wandb.Image(to_pil_image(picture))})

    def close(self) -> None:
        self.run.finish()

    def _log(self, epoch: int, values: Mapping[str, object]) -> None:
        named = {f"{self.stage}/{key}": value for key, value in values.items()}
        self.run.log(named | {f"{self.stage}/epoch": epoch}, step=self.first_step + epoch)


def _run_id(folder: Path) -> str:
    """The run's name at Weights & Biases, the same after a resume."""
    path = folder / "wandb" / "run-id"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text()
