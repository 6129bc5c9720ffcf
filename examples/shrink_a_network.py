"""A ResNet-18 made smaller in three ways, before any training; which layers are replaced, and which are kept and why.

python examples/shrink_a_network.py
"""

from collections import Counter

import torchvision

import mgic


def main() -> None:
    """Convert copies of one network and print what each costs."""
    dense = torchvision.models.resnet18()
    print(f"{'':32} {'weights':>10} {'':5} {'multiply-adds':>14}")

    ways = {
        "groups of 32, coarsest 64": {"conversion": mgic.Conversion(32, 64)},
        "groups of 8, coarsest 16": {"conversion": mgic.Conversion(8, 16)},
        "at most a billion multiply-adds": {"target_macs": 1e9},
    }
    for name, way in ways.items():
        _, report = mgic.convert(dense, **way)
        before, after = report.before, report.after
        shares = after.params / before.params, after.macs / before.macs
        print(f"{name:32} {after.params:10,} {shares[0]:5.2f} {after.macs:14,} {shares[1]:5.2f}")
    print(f"{'ResNet-18':32} {before.params:10,} {'':5} {before.macs:14,}")

    print("\nin the last one:")
    for (action, reason), count in Counter((row.action, row.reason) for row in report.rows).most_common():
        print(f"{count:3} x {action}{f': {reason}' if reason else ''}")


if __name__ == "__main__":
    main()
