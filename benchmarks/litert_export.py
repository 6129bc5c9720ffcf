"""A LiteRT file of a network, run and held against eager PyTorch: in an environment of its own (docs/deploy.md).

    python benchmarks/litert_export.py mgic_resnet20 --out mgic_resnet20.tflite --weights model.safetensors

``litert-torch`` needs torch below 2.15. The file has the batch of its example, one.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import litert_torch
import torch
from ai_edge_litert.interpreter import Interpreter

from mgic.benchmarking import Network
from mgic.exporting import count_convolutions, signal_to_error
from mgic.formats import TOLERANCE
from mgic.models import build_model
from mgic.runtime.paths import relative_error
from mgic.training.weights import fit_weights, read_safetensors

CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("network", help="as mgic bench takes it: name, name@SIZE or name:argument=value,...")
    parser.add_argument("--weights", type=Path, help="safetensors file; random weights without it")
    parser.add_argument("--out", type=Path, required=True, help="file.tflite")
    args = parser.parse_args()
    network = Network.parse(args.network)
    model, size = network.build()
    if args.weights:
        model = build_model(network.name, network.args).eval()
        fit_weights(model, read_safetensors(args.weights), f"{args.weights} does not fit {network}")
    x, fresh = torch.randn(1, *size), torch.randn(1, *size)
    staged = args.out.with_name(f".tmp-{args.out.name}")
    try:
        litert_torch.convert(model, (x,)).export(str(staged))
        interpreter = Interpreter(model_path=str(staged))
        interpreter.allocate_tensors()
        nodes = Counter(one["op_name"] for one in interpreter._get_ops_details())
        error, decibels = 0.0, float("inf")
        for image in (x, fresh):
            interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image.numpy())
            interpreter.invoke()
            found = torch.from_numpy(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))
            with torch.no_grad():
                expected = model(image)
            error = max(error, relative_error(found, expected))
            decibels = min(decibels, signal_to_error(found, expected))
        made, wanted = sum(nodes[name] for name in CONVOLUTIONS), count_convolutions(model, x)
        print(f"{args.out}: {staged.stat().st_size / 2**20:.2f} MiB, batch 1, error {error:.1e} ({decibels:.1f} dB)")
        print(f"{made} convolutions for the network's {wanted}; operations: {dict(nodes.most_common())}")
        if error > TOLERANCE or made > wanted:
            print("not exported: it differs from the network", file=sys.stderr)
            return 1
        staged.replace(args.out)
        return 0
    finally:
        staged.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
