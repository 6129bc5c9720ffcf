"""What gross shape alone tells of the generated solids: logistic regression on extents and moments, one record.

    python benchmarks/solids_baseline.py --root data --record results/solids/extents_and_moments.json

All 2,048 points of each cloud are used: the networks see a part of them.
"""

import argparse
import shlex
import sys

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mgic.data import load_data
from mgic.training import RECIPES, make_record, write_record


def extents_and_moments(points: np.ndarray) -> np.ndarray:
    """Gross shape, the yardstick of this set: a linear model on these numbers must not do what a network can.

    Extents and second to fourth moments of the centred cloud, along the given axes and along its principal ones, with mixed
    moments, and the mean powers of the distance to the centre.

    Shape:
        ``(P, 3) -> (46,)``
    """
    points = points - points.mean(axis=0)
    points = points / np.sqrt((points**2).sum(axis=1).mean())
    principal = points @ np.linalg.eigh(points.T @ points)[1]
    principal = principal * np.where((principal**3).sum(axis=0) < 0, -1, 1)  # the longer side ahead
    numbers = []
    for cloud in (points, principal):
        first, second = cloud[:, [0, 0, 1]], cloud[:, [1, 2, 2]]
        numbers += [
            cloud.max(axis=0),
            cloud.min(axis=0),
            (first * second).mean(axis=0),
            (first**2 * second**2).mean(axis=0),
        ]
        numbers += [(cloud**power).mean(axis=0) for power in (2, 3, 4)]
    radius = np.linalg.norm(points, axis=1)
    return np.concatenate([*numbers, [radius.min(), radius.max(), radius.mean(), (radius**3).mean()]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", default="data", help="folder of data sets")
    parser.add_argument("--record", help="write a record to this file")
    args = parser.parse_args()

    data = load_data("solids", args.root, **RECIPES["solids"].data_args)
    splits = {"train": data.train, "test": data.test}
    numbers = {k: np.array([extents_and_moments(c.double().numpy()) for c in s.clouds]) for k, s in splits.items()}
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    model.fit(numbers["train"], data.train.labels)
    metrics = {f"{k}_accuracy": [100 * model.score(numbers[k], splits[k].labels)] for k in splits}
    for name, values in metrics.items():
        print(f"{name}: {values[0]:.2f} %")
    if args.record:
        command = shlex.join(["python", "benchmarks/solids_baseline.py", "--record", args.record])
        count = numbers["train"].shape[1]
        notes = [f"logistic regression on {count} extents and moments of all stored points; it draws no random numbers"]
        write_record(args.record, make_record(command, data.note, [0], metrics, notes))


if __name__ == "__main__":
    sys.exit(main())
