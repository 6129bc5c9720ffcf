"""What is timed: networks by name or files that were exported, and the ways to run them."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.models import reparameterize_model
from torch import Tensor, nn
from torch.nn import functional as F

from ..counting import Cost, cost
from ..errors import UserError
from ..exporting import describe_artefact, format_of, load_artefact
from ..models import build_model
from ..models.spelling import input_size, spelled
from ..runtime.paths import PATHS, PathUnavailable, Run, eager
from ..training.fast import fast_training_


@torch.no_grad()
def random_norms_(model: nn.Module) -> None:
    """Give the norms of a network that nobody trained random scales and variances.

    As they are initialised, some networks multiply a branch by zero, and no check of an output would see what it does.
    """
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_var is not None:
            for scale in (norm.weight, norm.running_var):
                scale.uniform_(0.5, 1.5)


def _flow(value: Any) -> str:
    """A value as YAML writes it on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, sort_keys=False).removesuffix("...\n").strip()


@dataclass(frozen=True)
class Network:
    """A network to time, with random weights; where timm can merge its branches for inference, they are merged.

    Args:
        name: Registered name.
        args: Arguments of the network.
        size: Height and width of its input; its own by default.
    """

    name: str
    args: Mapping[str, Any] = field(default_factory=dict, hash=False)
    size: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Network":
        """Read ``name@SIZE:argument=value,...``, see `mgic.models.spelling.spelled`.

        Examples:
            >>> Network.parse("mgic_resnet50@160:group_size=8,coarsest=16")
            Network(name='mgic_resnet50', args={'group_size': 8, 'coarsest': 16}, size=160)
        """
        return cls(*spelled(text))

    def __str__(self) -> str:
        size = f"@{self.size}" if self.size else ""
        args = ",".join(f"{key}={_flow(value)}" for key, value in self.args.items())
        return f"{self.name}{size}{':' if args else ''}{args}"

    @property
    def file_name(self) -> str:
        """What files of it are called."""
        return self.name.rpartition(":")[2] + ("_converted" if "conversion" in self.args else "")

    def build(self) -> tuple[nn.Module, tuple[int, ...]]:
        """Return the network in eval mode and the size of its input; always with the same weights, see `random_norms_`.

        Raises:
            UserError: If there is no such network, or it does not take the arguments.
        """
        torch.manual_seed(0)
        model = build_model(self.name, self.args)
        random_norms_(model)
        return reparameterize_model(model.eval()), self.input_size(model)

    def input_size(self, model: nn.Module) -> tuple[int, ...]:
        """Size of one input of the network that was built: pixels as asked for, or its own."""
        return input_size(model, self.size)

    def cost(self) -> Cost:
        """Count it, with branches merged."""
        return cost(*self.build())

    def ways(self, paths: Sequence[str]) -> Sequence[str]:
        """Those of the paths asked for that it can be run by: all."""
        return paths

    def prepare(self, case: "Case") -> tuple[Callable[[], Run], Tensor, Any]:
        """Return what makes the path, an input, and what eager PyTorch makes of it; None for a training step."""
        model, size = self.build()
        x = torch.randn(case.batch, *size)
        expected = None if case.path == TRAINING else eager(model, x, case.threads)(x)
        return lambda: WAYS[case.path](model, x, case.threads), x, expected

    def load_libraries(self, case: "Case") -> None:
        """Run a tiny network first: what a path loads for itself is neither the network's memory nor its build time."""
        tiny, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2)).eval(), torch.ones(1, 3, 3, 3)
        with suppress(PathUnavailable):
            WAYS[case.path](tiny, x, case.threads)(x)


@dataclass(frozen=True)
class ExportedFile:
    """A file that `mgic.export` wrote: its runtime is the one way to run it, and it was held against eager PyTorch then.

    Args:
        file: Its place.
        sha256: Of the file, for what is kept of its times.
    """

    file: str
    sha256: str

    @classmethod
    def open(cls, file: str) -> "ExportedFile":
        """Take a file, if it is the one its description is of.

        Raises:
            UserError: If there is no such file, it is damaged, or there is no description beside it.
        """
        one = cls(file, "")
        return replace(one, sha256=one.described()["sha256"][Path(file).name])

    def described(self) -> dict[str, Any]:
        """Its description."""
        described = describe_artefact(Path(self.file))
        if described is None:
            raise UserError(f"{self.file}: without {Path(self.file).name}.json nobody knows the size of its input")
        return described

    def __str__(self) -> str:
        return Path(self.file).name

    def cost(self) -> Cost:
        """What the network was counted for when it was exported."""
        described = self.described()
        return Cost(described["params"], described["macs"], tuple(described["input_size"]))

    def ways(self, paths: Sequence[str]) -> Sequence[str]:
        """Its own runtime, whatever is asked for."""
        return [self.described()["format"]]

    def prepare(self, case: "Case") -> tuple[Callable[[], Run], Tensor, Any]:
        """As of a network; what it was held against stayed behind."""
        described = self.described()
        most = described["batches"][1]
        if most is not None and case.batch > most:
            raise PathUnavailable(f"it takes {most} inputs at most")
        x = torch.randn(case.batch, *described["input_size"])
        return lambda: load_artefact(self.file, case.threads), x, None

    def load_libraries(self, case: "Case") -> None:
        """Import its runtime."""
        import_module(format_of(Path(self.file)).runtime)


def training_step(model: nn.Module, example_input: Tensor, threads: int) -> Run:
    """One step of SGD in eager PyTorch, as ``mgic train`` takes it, on made-up labels: forward, backward, update."""
    fast_training_(model.train())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def run(x: Tensor) -> None:
        logits = model(x)
        loss = F.cross_entropy(logits, torch.arange(len(x)) % logits.shape[1])
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    return run


TRAINING = "training"
WAYS = {**PATHS, TRAINING: training_step}
"""What can be timed: every path of inference, and a training step."""


@dataclass(frozen=True)
class Case:
    """One thing to time: a network, how it is run, on how many inputs and threads."""

    network: Network | ExportedFile
    path: str
    batch: int = 1
    threads: int = 1
