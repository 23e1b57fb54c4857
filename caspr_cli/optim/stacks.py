"""Same-shape blocks of many parameters, side by side in memory, so that one batched product serves them all."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from caspr_cli.optim.blocks import Layout, Shape, is_vector
from caspr_cli.optim.device import Question, is_captured, sent
from caspr_cli.optim.options import Group, apply_dtype, factor_dtype
from caspr_cli.optim.parts import length
from caspr_cli.optim.roots import Root
from caspr_cli.optim.symmetric import diagonal, pack, packed_length, trace, unpack

RowIndex = slice | Tensor  # of a stack: neighbours, or their numbers [k]

# Numbers that a step works on at once. On a CPU they and what becomes of them stay in the cache; elsewhere it bounds
# the memory that a step takes beside the state.
CHUNK_CPU, CHUNK = 2**20, 2**25

# Lower bound of the input divisor, relative to the current gradient scale: it keeps scaled inputs far from float32's
# overflow.
LEAST_SCALE = 1e-20

# How many times the share of a row (or column) in the statistics may grow before new roots are computed at once. A row
# that was silent has grown by thousands with its first gradient. Of rows that were not, 16 times was the most that was
# seen (the first steps of the vision transformer and the tagger).
OUTGROWN = 25


@dataclass(frozen=True)
class Storage:
    """The types in which a stack keeps its factors."""

    dtype: torch.dtype  # of the statistics
    root_dtype: torch.dtype
    packed: bool  # whether roots are
    measured: bool = False  # whether there are eigenvectors in their place, which cannot be packed

    @classmethod
    def of(cls, p: Tensor, group: Group) -> Storage:
        """Return those of a parameter. Roots have no more digits than their products would read of them."""
        dtype, measured = factor_dtype(p, group), group["measured"] > 0
        of_roots = group["root_dtype"] or (dtype if measured else apply_dtype(dtype, p.device, group))
        return cls(dtype, of_roots, bool(group["pack_roots"]) and not measured, measured)


class View(Tensor):
    """A part of a stack that is saved and copied by itself. A plain view takes the memory of the whole stack along."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # On the CPU: all of a state_dict is copied before the first of it is written.
        return self.to("cpu", copy=True).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()


@dataclass
class Stack:
    """K blocks of one shape. ``rows[p]`` are the blocks of parameter p, in the order of its layout."""

    shape: Shape
    axes: tuple[int, ...]  # those that have statistics; S and A follow it
    storage: Storage
    S: list[Tensor]  # statistics over scale^2, packed [K, packed_length(d_i)]
    A: list[Tensor]  # roots in units of root_scale, [K, d_i, d_i] or packed; or eigenvectors, each a column
    # Diagonal of the damped S over the trace of S when A was computed, [K, d_i]; tiny where S was zero, 0 where that is
    # not known. An empty list for vectors, of which each entry is a row.
    shares: list[Tensor]
    values: list[Tensor]  # with eigenvectors, eigenvalues of the damped S in units of root_scale^2, [K, d_i]
    V: Tensor | None  # and the second moment in their basis over scale^2, [K, d_1, ..., d_k]
    scale: Tensor  # [K]
    root_scale: Tensor  # [K], 0 where there is no scale yet
    total: Tensor  # [K], weights of all gradients in S
    retries: Tensor  # [K], refusals of a root in a row: the power of ten that multiplies eps
    rejected: Tensor  # [K], roots that were refused
    rows: dict[Tensor, slice] = field(default_factory=dict)
    rooted: set[Tensor] = field(default_factory=set)  # parameters whose roots have been computed
    based: set[int] = field(default_factory=set)  # rows that have eigenvectors, where these take the roots' place
    members: list[Tensor] = field(default_factory=list)  # the parameters of ``rows``
    ids: frozenset[int] = frozenset()  # and their ids: to hash a tensor takes ten times as long
    plan: object = None  # what it was built by
    whole: bool = False  # whether each of these parameters is one block
    marks: dict[Tensor, tuple[str, Tensor]] = field(default_factory=dict)  # an entry of the state of each, see is_in()
    interval: int = 1
    refresh_offset: list[int] = field(default_factory=list)  # [K], the step of an interval at which a root is refreshed
    _chunks: list[tuple[list[Tensor], slice]] = field(default_factory=list)  # of all members
    _indices: dict[tuple[int, ...], Tensor] = field(default_factory=dict)  # of rows, sent to the device once
    asked: tuple[list[int], Question] | None = None  # the lengths of the stacks of one GPU, and whether they outgrew

    @classmethod
    def empty(cls, shape: Shape, axes: tuple[int, ...], K: int, storage: Storage, device: torch.device) -> Stack:
        def new(*size: int, dtype: torch.dtype = storage.dtype) -> Tensor:
            return torch.zeros(K, *size, dtype=dtype, device=device)

        sizes = [shape[axis] for axis in axes]
        roots = [(packed_length(d),) if storage.packed else (d, d) for d in sizes]
        return cls(
            shape,
            axes,
            storage,
            [new(packed_length(d)) for d in sizes],
            [new(*size, dtype=storage.root_dtype) for size in roots],
            [] if is_vector(shape) else [new(d) for d in sizes],
            [new(d) for d in sizes] if storage.measured else [],
            new(*shape) if storage.measured and axes else None,
            scale=new(),
            root_scale=new(),
            total=new(),
            retries=new(),
            rejected=new(),
        )

    @property
    def sizes(self) -> Shape:
        """Sizes of the statistics: the lengths of the axes that have them."""
        return tuple(self.shape[axis] for axis in self.axes)

    @property
    def known(self) -> Tensor:
        """``[K]``: the blocks that had a gradient before their last roots."""
        return (self.scale > 0) & (self.root_scale > 0)

    def state(self, p: Tensor, part: int) -> dict[str, Tensor]:
        """Return the entries of ``optimizer.state[p]``, as views. ``part`` counts p's block shapes."""
        rows = self.rows[p]
        named = {name: getattr(self, name) for name in ("scale", "root_scale", "total", "retries", "rejected")}
        if self.V is not None:
            named["moment"] = self.V
        factors = {"statistics": self.S, "root": self.A, "share": self.shares, "eigenvalue": self.values}
        for name, tensors in factors.items():
            named |= {f"{name}_{axis}": tensor for axis, tensor in zip(self.axes, tensors, strict=False)}
        return {f"{name}.{part}": tensor[rows].as_subclass(View) for name, tensor in named.items()}

    def chunks(self, params: list[Tensor]) -> Iterator[tuple[list[Tensor], slice]]:
        """Yield these parameters (in the stack's order) a few at a time, with their rows, which are neighbours."""
        if params is self.members:
            if not self._chunks:
                self._chunks = list(self._cut(params))
            return iter(self._chunks)
        return self._cut(params)

    def _cut(self, params: list[Tensor]) -> Iterator[tuple[list[Tensor], slice]]:
        size = torch.Size(self.shape).numel()
        limit = (CHUNK_CPU if self.scale.device.type == "cpu" else CHUNK) // size
        run: list[Tensor] = []
        for p in params:
            start, stop = self.rows[run[0]].start if run else 0, self.rows[p].stop
            if run and (self.rows[run[-1]].stop != self.rows[p].start or stop - start > limit):
                yield run, slice(start, self.rows[run[-1]].stop)
                run = []
            run.append(p)
        if run:
            yield run, slice(self.rows[run[0]].start, self.rows[run[-1]].stop)

    def index(self, rows: list[int]) -> RowIndex:
        """Return an index of these rows (ascending): a slice, which copies nothing, where they are neighbours."""
        if rows[-1] - rows[0] == len(rows) - 1:
            return slice(rows[0], rows[-1] + 1)
        key = tuple(rows)
        if key not in self._indices:
            self._indices[key] = sent(torch.tensor(rows, device="cpu"), self.scale.device)
        return self._indices[key]

    def is_due(self, row: int, age: int) -> bool:
        """Whether it is this row's turn, ``age`` steps after its first root."""
        return (age - self.refresh_offset[row]) % self.interval == 0

    def unit(self, group: Group) -> Tensor:
        """``[K]``: c, where S is the statistic over c^2 with the bias of a moving average corrected; 1 without one.

        With another exponent than 1/2 what is meant by S has a trace of 1, see statistics().
        """
        corrected = self.corrected(group)
        if group["exponent"] != 0.5 and self.S:
            sums = self.trace()
            corrected = corrected * torch.where(sums > 0, sums, 1).sqrt()
        return torch.where(self.scale > 0, corrected, 1)

    def corrected(self, group: Group) -> Tensor:
        """``[K]``: c, where S and V are over c^2 with the bias of a moving average corrected."""
        if group["statistics"] == "ema":
            return self.scale / self.total.clamp(min=torch.finfo(self.total.dtype).tiny).sqrt()  # 0: so is the scale
        return self.scale

    def statistics(self, place: int, at: RowIndex, group: Group) -> Tensor:
        """``[k, d, d]`` of these rows, in the units of unit()."""
        S = unpack(self.S[place][at], self.sizes[place])
        if group["exponent"] == 0.5:
            return S
        sums = self.trace()[at]
        return S / torch.where(sums > 0, sums, 1).view(-1, 1, 1)

    def trace(self) -> Tensor:
        """``[K]``: the sum of squares that is in S, the same along each axis."""
        return trace(self.S[0], self.sizes[0])

    def has_gradients(self, place: int, at: RowIndex) -> Tensor:
        """``[k, d]``, which rows of the axis at this place of ``axes`` have anything in the statistics."""
        return diagonal(self.S[place][at], self.sizes[place]) > 0

    def outgrown(self) -> Tensor:
        """Return ``[K]``, whether a row, of any axis, has ``OUTGROWN`` times the share in the statistics that it had
        when the block's roots were computed.

        Such a row was silent, so the roots lengthen it as far as the damping lets them, and the graft would give it the
        step of the whole tensor. A block without any gradient until then has outgrown its roots, which are the identity
        in any units, with its first one. That all rows grow together changes no share.
        """
        grown = torch.zeros_like(self.scale, dtype=torch.bool)
        for S, d, known in zip(self.S, self.sizes, self.shares, strict=False):
            now = diagonal(S, d)
            grown |= ((now > OUTGROWN * now.sum(1, keepdim=True) * known) & (known > 0)).any(1)
        return grown

    def remember_shares(self, place: int, at: RowIndex, S: Tensor, shift: Tensor, accepted: Tensor) -> None:
        """Keep what :meth:`outgrown` compares with, for these rows whose roots of S + shift I are ``accepted`` [k]."""
        if not self.shares:
            return
        now = S.diagonal(dim1=1, dim2=2).double()
        total = now.sum(1, keepdim=True)
        nothing = torch.finfo(S.dtype).tiny  # any gradient has more
        shares = torch.where(total > 0, (now + shift.unsqueeze(1)) / total, nothing).to(S.dtype)
        self.shares[place][at] = torch.where(accepted.unsqueeze(1), shares, self.shares[place][at])

    def input_scale(self, group: Group) -> Tensor:
        """``[K]``: what an input of the roots is divided by.

        A block whose gradient has been zero until after its last refresh has identity roots and takes today's scale.
        One that has outgrown its roots by more than any type holds is divided by as much as keeps it finite.
        """
        known = torch.where(self.root_scale > 0, self.root_scale, self.unit(group))
        return torch.maximum(known, self.scale * LEAST_SCALE)

    def root(self, place: int, at: RowIndex, dtype: torch.dtype) -> Tensor:
        """``[k, d, d]`` of these rows, of the axis at this place of ``axes``."""
        A = self.A[place][at]
        return unpack(A, self.sizes[place], dtype) if self.storage.packed else A.to(dtype)

    def store(self, place: int, at: RowIndex, root: Root, accepted: Tensor) -> None:
        """Store these roots; of rows that are not ``accepted`` [k] the old one, or the identity if there is none."""
        A = root.A
        if A.device.type != "cpu" or not bool(accepted.all()):
            old = self.root(place, at, A.dtype)
            blank = (old == 0).flatten(1).all(1).view(-1, 1, 1)
            old = torch.where(blank, torch.eye(self.sizes[place], dtype=A.dtype, device=A.device), old)
            A = torch.where(accepted.view(-1, 1, 1), A, old)
        self.A[place][at] = (pack(A) if self.storage.packed else A).to(self.storage.root_dtype)
        if root.values is not None:
            old = torch.where(self.values[place][at] > 0, self.values[place][at], 1)
            self.values[place][at] = torch.where(accepted.unsqueeze(1), root.values.to(old.dtype), old)

    def forget_roots(self) -> None:
        """Forget all roots: they are computed anew, each with its block's next gradient."""
        torch._foreach_zero_([*self.A, self.root_scale, *self.shares])
        self.rooted.clear()
        self.based.clear()

    def is_in(self, state: dict[Tensor, dict[str, Tensor]]) -> bool:
        """Whether ``state`` still holds the views of this stack: a loop that moves state elsewhere replaces them."""
        return all(state.get(p, {}).get(name) is view for p, (name, view) in self.marks.items())


def outgrown(stacks: Sequence[Stack]) -> list[list[bool]]:
    """Return :meth:`Stack.outgrown` of each stack; on a GPU what was true in the step before, so as not to wait for it.

    Where it is everyone's turn in each step, as with an interval of 1, nothing is asked, nor are numbers that cannot be
    read: on the "meta" device, and in a CUDA graph, which repeats the turns with which it was captured.
    """
    answers = {id(stack): [False] * len(stack.scale) for stack in stacks}
    asked = [stack for stack in stacks if stack.interval > 1 and stack.shares]
    asked = [stack for stack in asked if not (stack.scale.is_meta or is_captured(stack.scale.device))]
    for device in {stack.scale.device for stack in asked}:
        here = [stack for stack in asked if stack.scale.device == device]
        lengths = [len(stack.scale) for stack in here]
        question = Question(torch.cat([stack.outgrown() for stack in here]))
        if device.type == "cuda":
            earlier, here[0].asked = here[0].asked, (lengths, question)
            if earlier is None or earlier[0] != lengths:
                continue
            question = earlier[1]
        found = iter(question.answer())
        answers |= {id(stack): list(itertools.islice(found, n)) for stack, n in zip(here, lengths, strict=True)}
    return [answers[id(stack)] for stack in stacks]


def build_stacks(
    params: list[Tensor], layouts: dict[Tensor, Layout], storages: dict[Tensor, Storage], state: Any
) -> list[Stack]:
    """Return stacks of the blocks of ``params``; factors in ``state`` are copied in, and ``state`` becomes views.

    What was stored otherwise (packed or not, of another type) is converted.

    Raises:
        ValueError: a factor in ``state`` is of another axis or has another shape than the options call for.
    """
    counts: dict[tuple[Shape, Shape, Storage, torch.device], list[tuple[Tensor, int, int]]] = {}
    for p in params:
        for name in outdated(state[p], layouts[p], measured=storages[p].measured):
            del state[p][name]
        check_axes(state[p], p, layouts[p])
        for shape, blocks in layouts[p].blocks.items():
            part = layouts[p].shapes.index(shape)
            key = shape, layouts[p].axes, storages[p], p.device
            counts.setdefault(key, []).append((p, part, len(blocks)))
    stacks = []
    for (shape, axes, storage, device), members in counts.items():
        stack = Stack.empty(shape, axes, sum(n for *_, n in members), storage, device)
        start = 0
        stack.whole = all(layouts[p].shape == shape for p, *_ in members)
        for p, part, n in members:
            stack.rows[p] = slice(start, start + n)
            start += n
            for name, view in stack.state(p, part).items():
                old = state[p].get(name)
                if old is not None:
                    view.copy_(_converted(old, view, p, name, shape))
                    if axes and name == f"root_{axes[0]}.{part}":
                        has = view.flatten(1).any(1).tolist()  # waits for the device, once a rebuild
                        stack.based |= {stack.rows[p].start + i for i, yes in enumerate(has) if yes}
                        stack.rooted |= {p} if any(has) else set()
                state[p][name] = view
            stack.marks[p] = f"scale.{part}", state[p][f"scale.{part}"]
        stack.members, stack.ids = list(stack.rows), frozenset(map(id, stack.rows))
        stacks.append(stack)
    return stacks


def _converted(old: Tensor, view: Tensor, p: Tensor, name: str, shape: Shape) -> Tensor:
    """Return a stored factor in the form that ``view`` has."""
    if old.shape == view.shape:
        return old
    axis = name.partition(".")[0].rpartition("_")[2]
    if axis.isdigit() and len(old) == len(view):
        d = shape[int(axis)]
        if old.shape[1:] == (d, d) and view.ndim == 2:
            return pack(old)
        if old.shape[1:] == (packed_length(d),) and view.ndim == 3:
            return unpack(old, d)
    raise ValueError(f"{other_blocks(name, p)} ({tuple(old.shape)} was saved, {tuple(view.shape)} is wanted)")


def outdated(state: Iterable[str], layout: Layout, *, measured: bool = True) -> list[str]:
    """Return the names of factors that older versions kept: of an axis that is too long, the roots with them, and
    eigenvectors; and of those that are for eigenbases alone, where nothing is ``measured`` in them."""
    names = list(state)
    old = {part for part in range(len(layout.shapes)) if any(f"statistics_{i}.{part}" in names for i in layout.long)}
    kept = tuple(f"statistics_{axis}" for axis in layout.axes)
    kinds = ("statistics_", "root_", "share_")
    long = [n for n in names if n.startswith(kinds) and not n.startswith(kept) and int(n.rpartition(".")[2]) in old]
    unused = ("basis_",) if measured else ("basis_", "moment.", "eigenvalue_")
    return [*long, *(n for n in names if n.startswith(unused))]


def check_axes(state: Iterable[str], p: Tensor, layout: Layout) -> None:
    """Refuse statistics of other axes: their roots would have another exponent, and pass for these.

    Raises:
        ValueError: the same on all ranks, of a state that is whole.
    """
    for part in range(len(layout.shapes)):
        found = {name for name in state if name.startswith("statistics_") and name.endswith(f".{part}")}
        wanted = {f"statistics_{axis}.{part}" for axis in layout.axes}
        if found and (different := sorted(found ^ wanted)):
            raise ValueError(other_blocks(different[0], p))


def check_factors(state: dict[str, Tensor], p: Tensor, layout: Layout) -> None:
    """Refuse statistics and roots, whole ones or parts, of other axes or blocks.

    Raises:
        ValueError: the same on all ranks.
    """
    names = [name for name in state if is_factor(name) and name not in outdated(state, layout)]
    check_axes(names, p, layout)
    for name in names:
        kind, _, part = name.rpartition(".")
        shape, axis = dict(enumerate(layout.shapes)).get(int(part)), kind.rpartition("_")[2]
        if shape is None or length(state[name]) != len(layout.blocks[shape]):
            raise ValueError(other_blocks(name, p))
        if axis.isdigit():
            d = shape[int(axis)]
            fitting = ((d,),) if kind.startswith(("share_", "eigenvalue_")) else ((d, d), (packed_length(d),))
            if tuple(state[name].shape[1:]) not in fitting:
                raise ValueError(other_blocks(name, p))
        elif kind == "moment" and tuple(state[name].shape[1:]) != shape:
            raise ValueError(other_blocks(name, p))


def is_factor(name: str) -> bool:
    """Whether an entry of the state is a view into a stack, of a type of its own."""
    own = ("scale", "root_scale", "total", "retries", "rejected", "moment")
    of_axes = ("statistics_", "root_", "basis_", "share_", "eigenvalue_")
    return name.partition(".")[0] in own or name.startswith(of_axes)


def shape_of(name: str, layout: Layout) -> Shape:
    """Return the shape of the blocks of a factor."""
    return layout.shapes[int(name.rpartition(".")[2])]


def other_blocks(name: str, p: Tensor) -> str:
    return f"{name} of a parameter of shape {tuple(p.shape)}: block_size, merge or axes were others when it was made"
