"""Options of the commands that train nothing; `ofb.engine.config` has the others."""

from dataclasses import dataclass, fields
from typing import Literal

from ofb.checks import at_least, check_numbers
from ofb.engine.config import DataConfig, RunConfig

# Options of EvaluateConfig that are those of the network's run where they are not given.
OF_THE_RUN = (*(field.name for field in fields(DataConfig)), "seed", "amp", "amp_dtype")


@dataclass(kw_only=True)
class TargetConfig:
    """Which networks of a run."""

    target: str | None = None
    """The network of this target alone, such as 30%, where a search had several; each of them if not given."""


@dataclass(kw_only=True)
class EvaluateConfig(TargetConfig, RunConfig, DataConfig):
    """Evaluate a saved network. Data, seed and precision are those of its run where they are not given."""

    checkpoint: str
    """A run folder, or its export folder."""

    data: str | None = None
    """`digits`, or a data set as timm names it (ofb train --help); that of the run if not given, with its folder."""

    split: Literal["val", "test"] = "test"
    """Images to evaluate on: those that chose the best epoch, or those that only report."""

    def __post_init__(self) -> None:
        self.names_data = self.data is not None or self.data_dir is not None  # before the digits take their place
        super().__post_init__()


@dataclass(kw_only=True)
class ProfileConfig(TargetConfig):
    """Show MACs, parameters and milliseconds of a network's layers; for a search, beside those of the dense network."""

    network: str
    """A run folder, or its export folder, or any timm model name."""

    device: str | None = None
    """cpu, cuda or cuda:N; the GPU where there is one if not given."""

    batch_size: int = 1
    """Images at once when time is measured."""

    def __post_init__(self) -> None:
        check_numbers(self)
        at_least(self, 1, "batch_size")


@dataclass(kw_only=True)
class DoctorConfig:
    """Say what of the stack is here, which backend runs and why, and check every op against float64."""

    device: str | None = None
    """cpu, cuda or cuda:N; the GPU where there is one if not given."""


@dataclass(kw_only=True)
class CompletionConfig:
    """Print what completes this command's options in a shell: eval "$(ofb completion bash)"."""

    shell: Literal["bash", "zsh", "tcsh"]
    """Your shell."""


@dataclass(kw_only=True)
class ExportConfig(TargetConfig):
    """Write a saved network as one file that runs elsewhere, and put it on the Hugging Face hub."""

    checkpoint: str
    """A run folder, or its export folder."""

    format: Literal["onnx", "program"] = "onnx"
    """ONNX, or a torch.export program, which torch alone runs. Either takes any batch size, and is compared with the
    network before it is written."""

    output: str | None = None
    """File to write, of one network; model.onnx or model.pt2 beside each network if not given."""

    push_to_hub: str | None = None
    """Repository USER/NAME on the Hugging Face hub to put the network into, with the files beside it and a model card
    written from its run."""

    hub_private: bool = False
    """A new repository is for its owner alone."""


@dataclass(kw_only=True)
class ReportConfig:
    """Write what a run did as one page, RUN/report/index.html, and pictures beside it."""

    run: str
    """A run folder, finished or not."""
