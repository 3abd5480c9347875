"""`fastmorph grow` for checkpoints of transformers: a directory with a config.json, to sizes that its config is to have."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from fastmorph.cli.networks import CommandError, need

SIZES = (
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    *("num_hidden_layers", "vocab_size", "num_experts"),
)


def add_sizes(parser: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    """The options; `count` reads a positive number."""
    group = parser.add_argument_group("checkpoints of transformers", "a SRC with a config.json, without --model and --plan")
    for size in SIZES:
        group.add_argument(f"--{size.replace('_', '-')}", type=count, metavar="N", help="what the config is to have")
    group.add_argument("--fill", choices=("pair", "zero", "rotate"), help="what new weights begin with (default: as fits)")
    group.add_argument("--untie", action="store_true", help="give the head a weight of its own first")
    group.add_argument("--no-verify", action="store_true", help="do not load and compare the two models")


def grow(arguments: argparse.Namespace) -> int:
    """Grow a checkpoint directory into another one."""
    need("transformers", "safetensors")
    from fastmorph.transformers.checkpoint import grow_checkpoint

    sizes = {size: getattr(arguments, size) for size in SIZES}
    if arguments.model or arguments.plan:
        raise CommandError("a checkpoint of transformers grows by sizes, such as --hidden-size, not by --model and --plan.")
    history, certificate = grow_checkpoint(
        arguments.source,
        arguments.out,
        sizes,
        fill=arguments.fill,
        untie=arguments.untie,
        seed=arguments.seed or 0,
        verify=not arguments.no_verify,
    )
    print(history.to_toml())
    print(certificate or "Not verified: load both by from_pretrained, and compare them.")
    print(f"\n{arguments.out} holds the child, for from_pretrained, and the plan that made it (growth.toml).")
    return 0
