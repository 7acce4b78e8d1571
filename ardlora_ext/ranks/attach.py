"""Let a controller follow an optimizer: two hooks, nothing else to call in the training loop."""

from __future__ import annotations

import json
import warnings
import weakref
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ardlora_ext import processes
from ardlora_ext.config import LoraConfig
from ardlora_ext.distributed.placement import bare, check_placement, check_running
from ardlora_ext.errors import written_by_strangers
from ardlora_ext.layers.linear import LoraLinear
from ardlora_ext.model.record import Injection, adapters, check_module, check_unmerged, injection, is_active
from ardlora_ext.model.unheard import warn_unheard
from ardlora_ext.ranks import resize
from ardlora_ext.ranks.controllers import make_controller
from ardlora_ext.ranks.controllers.base import Controller
from ardlora_ext.ranks.controllers.steps import SmallerSteps
from ardlora_ext.ranks.optimizer import check_optimizer, outermost, settle_loss_scale, unwrapped
from ardlora_ext.ranks.rehearsal import rehearse
from ardlora_ext.ranks.svd_prune import prune
from ardlora_ext.unbroken import nothing, unbroken, undone_by


def attach(
    model: nn.Module,
    optimizer: Any = None,
    total_steps: int | None = None,
    holdout: Callable[[], torch.Tensor] | None = None,
) -> Controller[Any]:
    """Let ranks follow the gradients that `optimizer` steps on.

    A pre-step hook reads the gradients (accumulated, unscaled and clipped by then), a post-step hook changes ranks, so
    any loop works: raw, Trainer, Accelerate, Lightning. A wrapped plain LoRA gets a controller that changes nothing.
    Of several named adapters, the active one is attached; its ranks rest while another is active.

    Args:
        model: a model that `wrap` or `load_pretrained` prepared, also inside DistributedDataParallel, or after
            `fully_shard` or `replicate`. With several processes each of them attaches, and every rank change is
            compared before it is made.
        optimizer: a torch optimizer that holds all adapter parameters and whose state can follow their rows, which is
            tried on a copy: AdamW, SGD, Adafactor, CAME, Prodigy, Lion, Muon and many more. Of one inside another (SAM)
            the inner one's steps are followed. None: the first one that takes a step on an adapter, whoever makes it;
            it is checked then.
        total_steps: optimizer steps of the run, when the config does not say; ARD freezes ranks in the last part.
        holdout: returns the loss of a held-out batch; ARD in `mode="paper"` then learns alpha on those (bilevel, first
            order) at the price of one more forward and backward per step, instead of on the training batch. With
            `budget="auto"` it is called in eval mode before and after each cut, and is to look at the same data always.

    Returns:
        The controller: `ranks()`, `records`, `summary()`, `state_dict()`.

    Raises:
        ValueError: the model is not wrapped or already attached, inside a wrapper that cannot follow rank changes, or
            the optimizer cannot.
        TypeError: not a model, or not an optimizer.

    Example:
        ard.attach(ard.wrap(model, ard.ArdConfig(total_steps=1000)))  # the one line before any training loop
    """
    check_module("attach", model)
    if total_steps is not None and not (isinstance(total_steps, Integral) and total_steps >= 1):
        raise ValueError(f"attach: total_steps must be a whole number >= 1, got {total_steps!r:.60}")
    wrapper, model = model, bare(model)
    record = injection(model)
    if record.controller is not None and record.controller.handles:
        raise ValueError("attach: model must not be attached already; call controller.detach() first")
    if record.config.init == "gradient" and not record.started:
        raise ValueError(
            "attach: init='gradient' must get its directions first: call "
            "ardlora_ext.init_from_gradients(model, batches, loss_fn)"
        )
    torch_optimizer = None if optimizer is None else unwrapped(optimizer)
    check_placement(wrapper, model)
    for name, layer in adapters(model).items():
        check_unmerged("attach", name, layer)
    if torch_optimizer is not None:
        _check(model, record, outermost(optimizer))

    _warn_rounding(record.layers, torch_optimizer)
    controller = make_controller(model, record.config, total_steps, holdout)
    with written_by_strangers(f"attach: the adapter's saved state must be one of {type(controller).__name__}"):
        _take_up(controller, record, total_steps)
    controller.processes = getattr(wrapper, "process_group", None) if record.sync is None else record.sync.group
    follower = _Follower(wrapper, model, record, controller, torch_optimizer)

    def attached() -> None:
        if not follower.waits:
            controller.applied()
        controller.apply = follower.apply
        if torch_optimizer is None:
            controller.handles = [_wait(follower)]
        else:
            follower.follow(torch_optimizer)
        record.controller = controller
        record.optimizer = None if torch_optimizer is None else weakref.ref(torch_optimizer)

    # Ranks that came with a state_dict are those of a run: who resumes it by hand gives the controller its state next.
    follower.waits = not controller.given and any(layer.loaded for layer in record.layers)
    if follower.waits:
        with unbroken():
            attached()
    else:
        follower.apply(controller.start(), attached)
    return controller


def _take_up(controller: Controller[Any], record: Injection, total_steps: int | None) -> None:
    """Go on with a saved schedule, or begin one from the ranks that are there: a new optimizer means a new schedule.

    A schedule that is over, and one of another length than the one asked for, is not gone on with, unless optimizer and
    schedule are resumed together.
    """
    state = record.controller_state
    if record.controller is not None:  # detached: its optimizer is history
        controller.begin_anew()
        return
    if not state:
        return
    saved, step = state["total_steps"], state["step"]
    other = total_steps is not None and saved is not None and total_steps != saved
    if record.resumed or saved is None or not (other or step >= saved):
        controller.load_state_dict(state)
        if other and total_steps is not None:
            warnings.warn(f"attach: the schedule of {saved} steps is extended to {total_steps}", stacklevel=3)
            controller.extend(total_steps)
        return
    if controller.total_steps is None:
        controller.load_state_dict(state)
        warnings.warn(
            f"attach: the ranks of this adapter are final since step {step} of {saved}; give total_steps for a "
            "schedule that moves them again",
            stacklevel=3,
        )
        return
    if step < saved:
        warnings.warn(
            f"attach: total_steps={controller.total_steps} begins a new schedule, the adapter was saved at step {step} "
            f"of {saved}; leave total_steps out to go on with that one",
            stacklevel=3,
        )
    controller.begin_anew()


def _check(model: nn.Module, record: Injection, optimizer: Optimizer) -> None:
    """Check that the outermost optimizer trains the adapters and can follow rank changes; raises as `attach` does."""
    _check_state(model, unwrapped(optimizer))
    if not isinstance(record.config, LoraConfig):
        rehearse(optimizer, adapters(model))


def _warn_rounding(layers: Sequence[LoraLinear], optimizer: Optimizer | None) -> None:
    """Say that weights of few digits lose small updates, unless the optimizer rounds at random."""
    dtype = layers[0].lora_A.dtype
    if dtype in (torch.bfloat16, torch.float16) and not getattr(optimizer, "bf16_stochastic_round", False):
        warnings.warn(
            f"attach: adapters in {dtype} lose updates that are small beside a weight and stop learning as the rate "
            "falls; keep them in float32 (adapter_dtype='float32', the default; the base may be of any dtype)",
            stacklevel=3,
        )


def _check_state(model: nn.Module, optimizer: Optimizer) -> None:
    check_optimizer(optimizer, [(f"{n}.{f}", p) for n, g in adapters(model).items() for f, p in g.trained.items()])


class _Follower:
    """The hooks on the optimizer that one controller follows, and what they know."""

    def __init__(
        self,
        wrapper: nn.Module,
        model: nn.Module,
        record: Injection,
        controller: Controller[Any],
        optimizer: Optimizer | None,
    ) -> None:
        self.wrapper, self.model, self.record, self.controller = wrapper, model, record, controller
        self.optimizer = optimizer
        self.skipped = False  # this step: a gradient is not finite
        self.steps = SmallerSteps(controller.units.layers)
        self.made_for = controller.units.live()
        self.waits = False  # for a state of the controller, or the first step

    def follow(self, optimizer: Optimizer) -> None:
        """Hook into the steps of an optimizer, the one that runs now included."""
        self.optimizer = optimizer
        self.controller.handles += [
            optimizer.register_step_pre_hook(self.before),
            optimizer.register_step_post_hook(self.after),
        ]

    @property
    def active(self) -> bool:
        """Whether a step is one of this adapter."""
        return is_active(self.model, self.record)

    def apply(self, update: resize.RankUpdate | None, made: Callable[[], None] = nothing) -> None:
        """Change ranks in the model and the optimizer, all or nothing; call `made` then."""
        if processes.initialised() and not isinstance(self.record.config, LoraConfig):
            # compared even if there is none here: another process may have one
            plan = json.dumps(None if update is None else update.to_json())
            device = self.record.layers[0].lora_A.device
            processes.agree(f"rank change after step {self.controller.step}", plan, device, self.controller.processes)

        def then() -> None:
            self.controller.applied()
            self.controller.note()
            made()

        if update is not None:
            copies = [copy for found in self.controller.copies if (copy := found()) is not None]
            first = self.controller.settle
            if update.leave == "recompress":
                ranks = {name: [unit.rank for unit in units] for name, units in update.modules.items()}
                prune(self.model, ranks, self.optimizer, self.controller.metric, first=first, then=then)
            else:
                resize.apply(self.model, update, self.optimizer, first=first, then=then)
            for copy in copies:
                resize.apply_to_copy(self.model, copy, update)
                if update.leave == "recompress":  # components are new: the copy begins at the model's again
                    self._renew(copy, update)
            return
        with unbroken():
            self.controller.settle()
            self.controller.note()
            made()

    def _begin(self, optimizer: Optimizer) -> None:
        """Begin a new schedule at the first step where ranks were loaded without a state of the controller.

        Raises:
            ValueError: the optimizer was resumed, or the controller was made for other ranks.
        """
        controller = self.controller
        loaded = any(layer.loaded for layer in self.record.layers)
        if isinstance(self.record.config, LoraConfig) or controller.given or not loaded:
            return
        if any(optimizer.state.get(p) for layer in self.record.layers for p in layer.factors.values()):
            raise ValueError(
                "attach: the controller must be resumed with model and optimizer, got one at step 0; call "
                "controller.load_state_dict(saved) before the first step (accelerator.register_for_checkpointing("
                "controller) does), or controller.begin_anew() for a new schedule"
            )
        if self.waits:
            controller.begin_anew()
            self.apply(controller.start())
            controller.applied()
        elif not np.array_equal(self.made_for, controller.units.live()):
            raise ValueError(
                "attach: ranks must not be loaded after it without a state of the controller; call "
                "controller.load_state_dict(saved) to go on, or attach after model.load_state_dict for a new schedule"
            )

    @torch.no_grad()
    def _renew(self, copy: nn.Module, update: resize.RankUpdate) -> None:
        """Give a copy the model's factors where these were recompressed."""
        ours, theirs = adapters(self.model), adapters(copy)
        for name in update.modules:
            for factor, parameter in theirs[name].factors.items():
                parameter.copy_(ours[name].factors[factor])

    def observe(self, optimizer: Optimizer) -> None:
        check_running(self.wrapper)
        self.skipped = settle_loss_scale(optimizer)
        if not self.skipped:
            if self.controller.step == 0:
                warn_unheard(self.model)
            with undone_by(self.controller.remember()):
                self.controller.observe()

    def before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if not self.active:
            return None
        if self.controller.step == 0:
            self._begin(optimizer)
        self.steps.begin(optimizer, self.controller.step_share)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self.observe(optimizer)
            return None

        def observed() -> Any:  # a closure makes the gradients inside the step
            loss = closure()
            self.observe(optimizer)
            return loss

        return ((args[0], observed, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": observed})

    def after(self, optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        if self.active:
            self.steps.end(optimizer)
            if self.controller.step == 0 and not isinstance(self.record.config, LoraConfig):
                _check_state(self.model, optimizer)  # of an optimizer that a copy could not stand for
            self.controller.carry_out((lambda: None) if self.skipped else self.controller.propose)


def _wait(follower: _Follower) -> Any:
    """Follow the first optimizer that steps on the adapters; return the handle of the hook that looks out for it.

    Torch calls the hook of every optimizer there is, so it does nothing else, and keeps no model alive.
    """
    waiting = weakref.ref(follower)

    def look(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        found = waiting()
        if found is None or found.optimizer is not None or not found.active:
            return
        own = {id(p) for layer in adapters(found.model).values() for p in layer.trained.values()}
        if any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
            _check(found.model, found.record, optimizer)
            found.follow(unwrapped(optimizer))

    return register_optimizer_step_pre_hook(look)
