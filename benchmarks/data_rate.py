"""Images a second that one worker reads, decodes and augments, from a folder and from shards of the same JPEG files.

    python benchmarks/data_rate.py --record results/data-rate.json

The files are made here, about as large as ImageNet's are on average (469 x 387 pixels, 110 kB): noise at several scales, so
that a decoder has as much to do. They are read once before the clock starts: the rate is the processor's, not a disk's.
"""

import argparse
import io
import shlex
import statistics
import sys
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from mgic.data import Augmentation, epoch_order, load_data
from mgic.training import make_record, write_record

WIDTH, HEIGHT = 469, 387
"""About the mean size of ImageNet's training images."""
BATCH = 32


def jpeg(seed: int) -> bytes:
    """One file: noise at four scales."""
    from PIL import Image

    generator = np.random.default_rng(seed)
    picture = np.zeros((HEIGHT, WIDTH, 3), np.float32)
    for cells, strength in ((4, 90), (16, 50), (64, 30), (256, 115)):
        coarse = generator.random((cells, cells, 3), dtype=np.float32).transpose(2, 0, 1)
        planes = [Image.fromarray(plane).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC) for plane in coarse]
        picture += strength * np.stack([np.asarray(plane) for plane in planes], -1)
    file = io.BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_files(root: Path, images: int, shard: int) -> float:
    """Write a folder and shards of the same files; return their mean size in bytes."""
    files = {part: [jpeg(seed) for seed in range(count)] for part, count in (("train", images), ("val", 2))}
    for part, contents in files.items():
        for k, content in enumerate(contents):
            path = root / "folder" / part / str(k % 2) / f"{k:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        for first in range(0, len(contents), shard):
            path = root / "shards" / f"{part}-{first:06d}.tar"
            path.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(path, "w") as archive:
                for k in range(first, min(first + shard, len(contents))):
                    for suffix, content in (("jpg", contents[k]), ("cls", b"%d" % (k % 2))):
                        info = tarfile.TarInfo(f"{k:06d}.{suffix}")
                        info.size = len(content)
                        archive.addfile(info, io.BytesIO(content))
    return statistics.fmean(map(len, files["train"]))


def rate(split, workers: int, epoch: int) -> float:
    """Images a second over one epoch, the first batch of every worker left out."""
    order = epoch_order(len(split), 0, epoch)
    batches = [b for b in torch.split(order, BATCH) if len(b) == BATCH]
    stream = split.training_batches(batches, Augmentation(flip=True), epoch, 0, workers)
    left_out = max(workers, 1)
    for _ in range(left_out):
        next(stream)
    began = time.perf_counter()
    read = sum(len(labels) for _, labels in stream)
    return read / (time.perf_counter() - began)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--shard", type=int, default=256, help="images in a tar file")
    parser.add_argument("--size", type=int, default=224, help="pixels of the network's input")
    parser.add_argument("--workers", type=int, nargs="+", default=[1], help="0 reads in this process")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record")
    args = parser.parse_args(arguments)
    if args.images // BATCH <= max(*args.workers, 1):
        parser.error(f"--images must be more than {BATCH} for each worker, and {BATCH} more")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        size = write_files(root, args.images, args.shard)
        sets = {
            "folder": partial(load_data, f"images:{root / 'folder'}"),
            "shards": partial(load_data, f"shards:{root / 'shards'}"),
        }
        splits = {name: load(image_size=args.size).train for name, load in sets.items()}
        metrics = {f"{name}.images_per_second_{w}_workers": [] for name in splits for w in args.workers}
        for turn in range(args.repeats + 1):  # the first is not counted: it fills the caches
            for name, split in splits.items():
                for workers in args.workers:
                    found = rate(split, workers, turn)
                    if turn:
                        metrics[f"{name}.images_per_second_{workers}_workers"].append(found)
    for name, values in metrics.items():
        print(f"{name}: median {statistics.median(values):.0f}, {min(values):.0f} to {max(values):.0f}")
    if args.record:
        command = shlex.join(["python", "benchmarks/data_rate.py", *(sys.argv[1:] if arguments is None else arguments)])
        data = (
            f"{args.images} generated JPEG files of {WIDTH} x {HEIGHT} pixels, {size / 1e3:.0f} kB on average; random crops "
            f"resized to {args.size} x {args.size}, flipped; files in memory"
        )
        write_record(args.record, make_record(command, data, list(range(args.repeats)), metrics, bytes_per_image=size))


if __name__ == "__main__":
    main()
