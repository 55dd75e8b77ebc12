"""Lay out Fashion-MNIST (Xiao et al. 2017: 70,000 images of clothes, 28 × 28, 10 classes) as torchvision reads it.

    apt-get install dataset-fashion-mnist
    python -m benchmarks.quality.fashion_mnist [--source /usr/share/datasets/fashion-mnist] [--data-dir data]

Afterwards `--data torch/fashion_mnist --data-dir data` works everywhere.
"""

import argparse
import gzip
from pathlib import Path

from ofb.engine.checkpoint import write_atomically

FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def lay_out(source: Path, data_dir: Path) -> Path:
    """Unpack the four files below `data_dir`; the folder they lie in.

    Raises:
        FileNotFoundError: a file is not in `source`.
    """
    folder = data_dir / "FashionMNIST" / "raw"
    for name in FILES:
        content = gzip.decompress((source / f"{name}.gz").read_bytes())
        write_atomically(folder / name, lambda file, content=content: file.write(content))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    arguments = parser.parse_args()
    try:
        print(lay_out(arguments.source, arguments.data_dir))
    except FileNotFoundError as error:
        parser.error(f"source: no {error.filename}; install Debian's package dataset-fashion-mnist, or give --source")


if __name__ == "__main__":
    main()
