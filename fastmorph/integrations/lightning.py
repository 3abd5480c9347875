"""Growth in mid-training with Lightning: a callback that grows, and a mixin by which checkpoints load and resume.

    class Classifier(GrowingModule, LightningModule):
        growing = "net"

        def __init__(self):
            super().__init__()
            self.net = make_net()
        ...

    trainer = Trainer(callbacks=[Grow(fm.Deepen("conv", activation="relu"), epoch=5, example_inputs=x)])

`Classifier.load_from_checkpoint(path)` and `trainer.fit(Classifier(), ckpt_path=path)` then make the grown network first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from torch import nn
from torch.optim import Optimizer

from fastmorph.errors import MorphError
from fastmorph.plan.history import history
from fastmorph.plan.morph import Options, morph, restructure
from fastmorph.plan.optimizers import like
from fastmorph.plan.plan import Plan
from fastmorph.plan.schedulers import rebound
from fastmorph.plan.transaction import Operator

try:
    from lightning.pytorch import Callback
except ModuleNotFoundError:  # the same library under its older name
    from pytorch_lightning import Callback

_KEY = "fastmorph"


class GrowingModule:
    """Mixin in front of LightningModule: what grew is in the checkpoints, and is made again before they are loaded.

    Attributes:
        growing: the name of the attribute that holds the network, an nn.Module.
    """

    growing = "net"
    _groups: list[dict[str, Any]] | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note the growths, and the names in each optimizer's groups."""
        super().on_save_checkpoint(checkpoint)  # type: ignore[misc]
        names = {parameter: name for name, parameter in self.named_parameters()}  # type: ignore[attr-defined]
        checkpoint[_KEY] = {
            "plans": [plan.to_toml() for plan in history(getattr(self, self.growing))],
            "groups": [
                {
                    "names": [[names[p] for p in group["params"] if p in names] for group in optimizer.param_groups],
                    "twins": getattr(optimizer, "_fastmorph_twins", ()),
                }
                for optimizer in self.trainer.optimizers  # type: ignore[attr-defined]
            ],
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the architecture that the checkpoint's weights are of."""
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        noted = checkpoint.get(_KEY)
        if noted is None:
            return
        network: nn.Module = getattr(self, self.growing)
        plans, done = tuple(map(Plan.from_toml, noted["plans"])), history(network)
        if plans[: len(done)] != done:
            raise MorphError(
                f"{type(self).__name__}.{self.growing} was grown in another way than the checkpoint's: load it into a new "
                f"{type(self).__name__}."
            )
        for plan in plans[len(done) :]:
            network = restructure(network, plan)
        setattr(self, self.growing, network)
        self._groups = noted["groups"]

    def on_fit_start(self) -> None:
        """Put the parameters of the optimizers, as `configure_optimizers` made them, into the groups of the checkpoint's."""
        super().on_fit_start()  # type: ignore[misc]
        groups, self._groups = self._groups, None
        for place, noted in enumerate(groups or ()):
            trainer = self.trainer  # type: ignore[attr-defined]
            old: Optimizer = trainer.optimizers[place]
            _exchange(trainer, old, self._arranged(old, noted), tuple(noted["twins"]))

    def _arranged(self, old: Optimizer, noted: dict[str, Any]) -> Optimizer:
        named = dict(self.named_parameters())  # type: ignore[attr-defined]
        sources = list(range(len(old.param_groups)))
        for twin in noted["twins"]:
            sources.append(sources[twin])
        if len(sources) != len(noted["names"]):
            raise MorphError(
                f"configure_optimizers makes {len(old.param_groups)} parameter groups, the checkpoint has "
                f"{len(noted['names']) - len(noted['twins'])}: make them as they were."
            )
        groups = [
            {**old.param_groups[source], "params": [named[name] for name in names]}
            for source, names in zip(sources, noted["names"], strict=True)
        ]
        return like(old, groups, {})


class Grow(Callback):  # type: ignore[misc]
    """Grows the network of a `GrowingModule` once, with its optimizer and schedulers, and goes on training it.

    Args:
        plan: what to do, names as in the network alone (without the attribute's).
        epoch: at whose beginning to grow, counted from 0; or
        monitor: the name of a logged metric: grow once it has not improved for `patience` validations.
        patience: see `monitor`.
        min_delta: what counts as an improvement.
        mode: "min" or "max", where the metric is better.
        **options: those of `fastmorph.morph`, above all example_inputs.

    Raises MorphError, before training, for an epoch and a monitor, or neither; in training as `morph` does, with the network as
    it was, and where more than one optimizer trains the network or several processes do.
    """

    def __init__(
        self,
        plan: Plan | Sequence[Operator] | Operator,
        *,
        epoch: int | None = None,
        monitor: str | None = None,
        patience: int = 3,
        min_delta: float = 0.0,
        mode: str = "min",
        **options: Unpack[Options],
    ) -> None:
        if (epoch is None) == (monitor is None):
            raise MorphError("Grow takes an epoch or a monitor: say when to grow, by one of them.")
        if mode not in ("min", "max"):
            raise MorphError(f"mode={mode!r} must be 'min' or 'max'.")
        self.plan = plan if isinstance(plan, Plan) else Plan(plan)
        self.epoch, self.monitor, self.patience, self.min_delta = epoch, monitor, patience, min_delta
        self.sign = 1 if mode == "min" else -1
        self.options = options
        self.certificate: Any = None
        self._state: dict[str, Any] = {"grown": False, "best": None, "waited": 0}

    @property
    def state_key(self) -> str:
        """One for each plan, so that a trainer may hold several."""
        return f"fastmorph.Grow{self._generate_state_key(plan=self.plan.to_toml(), epoch=self.epoch, monitor=self.monitor)}"

    def state_dict(self) -> dict[str, Any]:
        """Whether it has grown, and how long it has waited."""
        return dict(self._state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._state = dict(state_dict)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Grow, if it is time."""
        stalled = self.monitor is not None and self._state["waited"] >= self.patience
        if not self._state["grown"] and (stalled or trainer.current_epoch == self.epoch):
            self._grow(trainer, pl_module)
            self._state["grown"] = True

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Look at the metric."""
        if self.monitor is None or trainer.sanity_checking or self._state["grown"]:
            return
        if self.monitor not in trainer.callback_metrics:
            raise MorphError(f"Grow: no metric {self.monitor!r} was logged; there are {sorted(trainer.callback_metrics)}.")
        value, best = self.sign * float(trainer.callback_metrics[self.monitor]), self._state["best"]
        if best is None or value < best - self.min_delta:
            self._state |= {"best": value, "waited": 0}
        else:
            self._state["waited"] += 1

    def _grow(self, trainer: Any, module: Any) -> None:
        if not isinstance(module, GrowingModule):
            raise MorphError(f"{type(module).__name__} cannot grow: let it be a subclass of GrowingModule, LightningModule.")
        if trainer.world_size > 1:
            raise MorphError("Grow works in one process: save a checkpoint, grow it in one process, and resume.")
        network: nn.Module = getattr(module, module.growing)
        own = set(network.parameters())
        training = [
            each for each in trainer.optimizers if any(p in own for group in each.param_groups for p in group["params"])
        ]
        if len(training) > 1:
            raise MorphError(f"{len(training)} optimizers train {module.growing!r}; Grow carries one over: grow between runs.")
        optimizer = training[0] if training else None
        grown = morph(network, self.plan, optimizer=optimizer, **self.options)
        self.certificate = grown.certificate
        setattr(module, module.growing, grown.model)
        if optimizer is not None and grown.optimizer is not None:
            _exchange(trainer, optimizer, grown.optimizer, grown._twins)


def _exchange(trainer: Any, old: Optimizer, new: Optimizer, twins: tuple[int, ...]) -> None:
    """Let the trainer, and the schedulers of an optimizer, go on with another one."""
    known = tuple(getattr(old, "_fastmorph_twins", ()))
    vars(new)["_fastmorph_twins"] = (*known, *twins)
    for config in trainer.lr_scheduler_configs:
        if config.scheduler.optimizer is old:
            config.scheduler = rebound(config.scheduler, new, twins)
    trainer.strategy.optimizers = [new if optimizer is old else optimizer for optimizer in trainer.optimizers]
