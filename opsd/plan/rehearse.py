"""One step on meta tensors, phase by phase: the code of the step, no values, every byte written down."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from opsd.adamw_low_bit import embedding_names, moments_of
from opsd.config import Config
from opsd.decode import Room, Slots
from opsd.engine import prefill, response_hidden
from opsd.four_bit import scales
from opsd.group import Group, split
from opsd.model import LanguageModel
from opsd.objectives.logprobs import token_logprobs
from opsd.plan.alike import Alike
from opsd.plan.ledger import Ledger
from opsd.plan.names import ADAPTERS, AVERAGE, GRADIENTS, MOMENTS, PREFIXES, SLOTS, WEIGHTS
from opsd.plan.outline import checkpointed
from opsd.plan.stand_ins import HostShapes, LossShapes, StepShapes, workspace_bytes
from opsd.plan.workload import Workload
from opsd.prefix_store import MemoryTier, PrefixStore
from opsd.prompts import Prompt
from opsd.sampling import Sampling
from opsd.teacher import ShadowTeacher, Teacher, build_teacher, score
from opsd.teacher_cache import TeacherCache

Phases = dict[str, Counter[str]]


class Rehearsal:
    """A model on meta, its moments and teacher, and the ledger of all of it.

    cuda: allocate as on CUDA, in blocks of 512 bytes.
    """

    def __init__(self, config: Config, model: LanguageModel, work: Workload, cuda: bool):
        self.config, self.model, self.work, self.cuda = config, model, work, cuda
        self.ledger = Ledger(512 if cuda else 64)
        if cuda:
            checkpointed(model, HostShapes(self.ledger))
        twice = config.optim.in_backward and config.optim.max_grad_norm is not None  # the backward, over one graph
        offloads = config.model.activation_checkpointing == "offload"
        Alike(self.ledger, model.module.get_decoder().layers, trips=not twice and not offloads)
        every = dict(model.module.named_parameters())
        adapter = [p for name, p in every.items() if ".lora_" in name]
        self.ledger.name([*every.values(), *model.module.buffers(), *scales(model.module)], WEIGHTS)
        self.ledger.name(adapter, ADAPTERS)
        self.teacher: Teacher | None = build_teacher(config.teacher, model) if work.views is not None else None
        if self.teacher is not None:
            self.ledger.name(self.teacher.state().values(), AVERAGE)
        trained = model.trainable()
        self.moments = moments_of(trained, embedding_names(model.module, trained), config.optim, cuda)
        self.ledger.name(self.moments.resident, MOMENTS)
        for p in model.trainable().values():
            p.register_post_accumulate_grad_hook(self._whole)
        self._frees = False  # whether a gradient goes as soon as it is whole
        store = PrefixStore(model.device, [self._tier()], dtype=config.engine.prefix_dtype)
        self._filling = Counter[str]()  # the cache of a teacher, with a pass of one response
        self._rollouts: dict[tuple[Sampling, int], Counter[str]] = {}
        self.cache = TeacherCache(store) if self._keeps_prefixes() else None

    def fixed(self) -> Phases:
        """The phases that no token budget changes."""
        return {"update": self._update()}

    def rollouts(self, budget: int) -> Phases:
        """Of a step, and of an evaluation, which `sft` has no use for, with passes over prompts of at most `budget`."""
        if self.config.objective.kind == "sft":
            return {}
        asked = {"rollout": (self.work.prompts, Sampling.of(self.config.rollout))}
        if self.work.held_out:
            evaluated = (self.work.views or self.work.prompts)[:1] * self.config.evaluate.batch_size
            asked["evaluation"] = evaluated, Sampling.greedy(self.work.length)
        return {name: self._rollout(*one, budget) for name, one in asked.items()}

    def passes(self, budget: int) -> Phases:
        """Teacher and student over the largest pass of at most `budget` tokens."""
        parts = split(self.work.group(), budget)
        part = max(parts, key=lambda part: part.tokens)
        phases, target = Phases(), None
        if self.teacher is not None:
            if self.cache is not None and self.teacher.updates is None and not self._filling:  # once, then found
                with self.ledger.phase() as self._filling:
                    self._scores(split(self.work.group(), 1)[0])
            with self.ledger.phase() as found:
                target = self._scores(part)
            phases["teacher"] = max(found, self._filling, key=Counter.total)
        self._frees = self.config.optim.in_backward and len(parts) == 1
        phases["student"] = self._student(part, target, len(parts) > 1)
        if self._frees:
            phases["update"] = self._update()
        return phases

    def _update(self) -> Counter[str]:
        """AdamW is one kernel, which makes nothing, but for moments that come a parameter at a time; a moving teacher
        may."""
        if not self._frees:
            self._give_gradients()
        with self.ledger.phase() as seen:
            with self.ledger.under(MOMENTS):
                for paged in self.moments.paged:
                    _come_and_go(paged)
            if self.teacher is not None:
                self.teacher.update()
        self._drop_gradients()
        return seen

    def _give_gradients(self) -> None:
        trained = self.model.trainable().values()
        for p in trained:
            p.grad = torch.empty_like(p)
        self.ledger.name((p.grad for p in trained), GRADIENTS)

    def _whole(self, p: Tensor) -> None:
        self.ledger.name([p.grad], GRADIENTS)
        if self._frees:
            p.grad = None

    def _drop_gradients(self) -> None:
        for p in self.model.trainable().values():
            p.grad = None

    def _rollout(self, prompts: tuple[Prompt, ...], sampling: Sampling, budget: int) -> Counter[str]:
        """As of `_decoded`, remembered by what a budget changes."""
        per_pass = max(1, min(budget // prompts[0].length, len(prompts)))
        key = sampling, per_pass
        if key not in self._rollouts:
            self._rollouts[key] = self._decoded(prompts, sampling, per_pass)
        return self._rollouts[key]

    @torch.no_grad()
    def _decoded(self, prompts: tuple[Prompt, ...], sampling: Sampling, per_pass: int) -> Counter[str]:
        """As opsd.rollout does it: some prompts, room for all, the others, a step at full length, the next prompts.

        per_pass: prompts, all of one length, that are computed together.
        """
        total = len(prompts) * sampling.group_size
        slots = min(self.config.rollout.slots, total)
        at_once = -(-slots // sampling.group_size)
        room = Room(slots, min(len(prompts), 2 * at_once), max(prompt.length for prompt in prompts), total)
        with self.ledger.phase() as seen, self.model.mode(train=False):
            board = None
            for first in range(0, min(at_once, len(prompts)), per_pass):
                stored = prefill(self.model, prompts[first : min(first + per_pass, at_once)])
                with self.ledger.under(SLOTS):
                    board = board or Slots(self.model, room.rounded() if self.cuda else room, sampling, stored[0])
                for lane, one in enumerate(stored, start=first):
                    board.let_in(lane, one)
            del stored
            assert board is not None
            with self.ledger.under(SLOTS):
                board.reserve(sampling.max_new_tokens)
            positions = (board.start + board.fed).expand(self.model.axes, -1)
            hidden = self.model.forward_packed(board.token[None], positions, {}, StepShapes())
            board.draw.next(hidden, board.row, board.fed)
            if total > slots:
                prefill(self.model, prompts[: min(per_pass, at_once)])
        return seen

    def _scores(self, part: Group) -> tuple[Tensor, Any]:
        assert self.teacher is not None and part.views is not None
        arguments = self.teacher, self.model, part.views, part.responses, True, self.cache, part.again or None
        for tier in self.cache.store.memory if self.cache is not None else ():
            self.ledger.name((x for _, one in tier.kept.items() for x in one.tensors()), PREFIXES)
        return score(*arguments)

    def _student(self, part: Group, target: Any, several: bool) -> Counter[str]:
        if several:
            self._give_gradients()
        with self.ledger.phase() as seen, self.model.mode(train=True):
            hidden = response_hidden(self.model, part.prompts, part.responses)
            loss = self._loss(part, hidden)
            if self._frees and self.config.optim.max_grad_norm is not None:  # for the norm alone
                loss.backward(retain_graph=True)
            loss.backward()
        self._drop_gradients()
        return seen

    def _loss(self, part: Group, hidden: Tensor) -> Tensor:
        objective, head = self.config.objective, self.model.head
        loss = hidden.new_zeros((), dtype=torch.float32)
        if objective.kind == "distill":
            weight = head.weight.to(hidden.dtype)
            is_copy = weight is not head.weight and isinstance(self.teacher, ShadowTeacher)
            _teachers = weight.detach().clone() if is_copy else None
            workspace = workspace_bytes(len(hidden), weight, objective.workspace_mib, self.cuda)
            loss = loss + LossShapes.apply(hidden, weight, workspace, self.ledger).sum()
        if objective.kind != "distill" or objective.alpha > 0:
            loss = loss + token_logprobs(hidden, head, part.responses.packed_tokens, objective.workspace_mib).sum()
        return loss

    def _keeps_prefixes(self) -> bool:
        engine = self.config.engine
        return self.work.views is not None and engine.teacher_cache != "none" and engine.share_prefix

    def _tier(self) -> MemoryTier:
        engine = self.config.engine
        mib = engine.teacher_cache_device_mib if self.cuda else engine.teacher_cache_host_mib
        return MemoryTier("device", mib * 2**20, lambda stored: stored, lambda stored: stored.nbytes)


def _come_and_go(tensors: list[Tensor]) -> None:
    _here = [torch.empty_like(x) for x in tensors]
