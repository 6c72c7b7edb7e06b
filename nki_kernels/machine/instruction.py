"""The decorator that turns one block into one instruction.

A block states everything about an instruction once: engines, operand rules, cost and source in the
decorator; operands in the signature, which is the published one; meaning in the docstring;
semantics in the body. The registry, the entry points and the generated pages derive from the
blocks.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from nki_kernels.hardware.spec import Engine
from nki_kernels.machine import core, describe
from nki_kernels.machine.access_rules import PartlyRead, Parts, TensorIndirection
from nki_kernels.machine.core import Run, VirtualRegister, index_of
from nki_kernels.machine.errors import RuleViolation
from nki_kernels.machine.handles import NkiInstruction
from nki_kernels.machine.indirection import resolve
from nki_kernels.machine.rules import Operands, Rule
from nki_kernels.machine.tensor import NkiTensor
from nki_kernels.machine.trace import Access, Event, PeWork, Site, Work, where

P = ParamSpec("P")
R = TypeVar("R")

#: Builds the work record of a call from its operands (after the rules passed).
Cost = Callable[[Operands], Work]


@dataclasses.dataclass(slots=True)
class Plan:
    """The remembered verdict for one operand signature: engine, accesses, cost."""

    opcode: str
    names: tuple[str, ...]
    engine: Engine
    tensors: tuple[int, ...]
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    updates: tuple[int, ...]
    registers: tuple[int, ...]
    hidden_reads: tuple[str, ...]
    hidden_writes: tuple[str, ...]
    work: Work
    updated_work: Work | None
    body: Callable[[Run, Engine, Any, tuple[Any, ...]], None]
    state: Callable[[Run, tuple[Any, ...]], Any] | None
    ends_groups: bool
    handles_dynamic: bool
    parts: Parts | None


@dataclasses.dataclass(slots=True)
class Call:
    """A call that meets other cores: what its body needs to take part, and the event it leaves.

    Attributes:
        run: the core that calls.
        opcode: its name.
        site: its kernel line.
        engine: where it runs.
        work: its cost.
        extra: index tensors of run-time addresses.
        event: what the body recorded; None if there was nothing to do.
    """

    run: Run
    opcode: str
    site: Site
    engine: Engine
    work: Work
    extra: tuple[Access, ...]
    event: Event | None = None


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One declared instruction; see `instruction` for the fields."""

    name: str
    names: tuple[str, ...]
    engines: tuple[Engine, ...]
    default: Callable[[Operands], Engine]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    updates: tuple[str, ...]
    rules: tuple[Rule, ...]
    cost: Cost
    hidden: Callable[[Operands], tuple[tuple[str, ...], tuple[str, ...]]] | None
    state: Callable[[Run, tuple[Any, ...]], Any] | None
    source: str
    body: Callable[..., Any]
    handles_dynamic: bool
    many: str
    meets: bool
    parts: Parts | None

    def plan(self, run: Run, args: tuple[Any, ...]) -> Plan:
        """Judge a call signature for the first time.

        Raises:
            RuleViolation: with every broken rule of the call.
        """
        ops = Operands(self.name, self.names_of(args), args, run.spec)
        self._types(ops, run)
        asked = ops.values.get("engine", Engine.unknown)
        try:
            ops.engine = self.default(ops) if asked is Engine.unknown else asked
        except RuleViolation as unreadable:
            raise self.violation(run, [str(unreadable)]) from None
        problems = [] if ops.engine in self.engines or self._dma() else [self._wrong_engine(ops)]
        warned: list[str] = []
        if not problems:
            indirection = any(isinstance(rule, TensorIndirection) for rule in self.rules)
            for rule in self.rules if indirection else (*self.rules, TensorIndirection()):
                found = _verdict(rule, ops)
                if found is None:
                    continue
                level = run.options.level(rule.check)
                if level == "error":
                    problems.append(found)
                elif level == "warn":
                    warned.append(found)
        if problems:
            raise self.violation(run, problems)
        if warned:
            run.report("warn", self.violation(run, warned))
        return self._assemble(ops)

    def names_of(self, args: tuple[Any, ...]) -> tuple[str, ...]:
        """Return the name of each argument; the tensors of a list operand come last."""
        listed = len(args) - len(self.names)
        return self.names + tuple(f"{self.many}[{i}]" for i in range(listed))

    def violation(self, run: Run, problems: list[str]) -> RuleViolation:
        """Build the error that lists every broken rule of a call."""
        head = f"nisa.{self.name} at {where(run.kernel_site())}: "
        document = self.source.partition("; cost")[0]
        return RuleViolation(head + "; and ".join(problems) + f" [{document}]")

    def unusable(self, run: Run, args: tuple[Any, ...]) -> RuleViolation:
        """Build the error for an argument of a type no instruction takes (a list, an array ...)."""
        bad = [
            f"{name} is {type(value).__name__}; operands are tensors (nl.ndarray), numbers, enums "
            "and nl operators: load arrays with dma_copy"
            for name, value in zip(self.names_of(args), args, strict=True)
            if type(value).__hash__ is None
        ]
        return self.violation(run, bad)

    def _dma(self) -> bool:
        return self.engines == (Engine.dma,)

    def _wrong_engine(self, ops: Operands) -> str:
        names = ", ".join(e.name for e in self.engines)
        return f"engine={ops.engine.name}; {self.name} runs on {names}: choose one of those"

    def _types(self, ops: Operands, run: Run) -> None:
        listed = tuple(ops.values)[len(self.names) :]
        for name in (*self._required, *listed):
            value = ops[name]
            if not isinstance(value, NkiTensor):
                hint = "allocate one with nl.ndarray and pass it"
                raise self.violation(
                    run,
                    [f"{name} is {type(value).__name__} {value!r}; it must be a tensor: {hint}"],
                )
        if "engine" in ops.values and not isinstance(ops["engine"], Engine):
            raise self.violation(
                run, [f"engine={ops['engine']!r}; it must be a member of nisa.engine"]
            )

    @property
    def _required(self) -> tuple[str, ...]:
        """Operands annotated as tensors; others may be absent or numbers."""
        annotations = self.body.__annotations__
        return tuple(n for n in (*self.writes, *self.reads) if annotations.get(n) == "NkiTensor")

    def _assemble(self, ops: Operands) -> Plan:
        names = tuple(ops.values)
        index = {n: i for i, n in enumerate(names)}

        def present(names: tuple[str, ...]) -> tuple[int, ...]:
            return tuple(index[n] for n in names if isinstance(ops[n], NkiTensor))

        work = self.cost(ops)
        hidden = ((), ()) if self.hidden is None else self.hidden(ops)
        updated = dataclasses.replace(work, accumulate=True) if isinstance(work, PeWork) else None
        engine = Engine.dma if self._dma() else ops.engine
        writes = present(self.writes)
        return Plan(
            opcode=f"nisa.{self.name}",
            names=names,
            engine=engine,
            tensors=tuple(i for i, n in enumerate(names) if isinstance(ops[n], NkiTensor)),
            reads=present((*self.reads, *names[len(self.names) :])),
            writes=writes,
            updates=present(self.updates),
            registers=tuple(
                i for i, n in enumerate(names) if isinstance(index_of(ops[n]), VirtualRegister)
            ),
            hidden_reads=hidden[0],
            hidden_writes=hidden[1],
            work=work,
            updated_work=updated,
            body=self._adapt(),
            state=self.state,
            ends_groups=self.name not in ("nc_matmul", "nc_matmul_mx"),
            handles_dynamic=self.handles_dynamic,
            parts=self.parts,
        )

    def _adapt(self) -> Callable[[Run, Engine, Any, tuple[Any, ...]], None]:
        body, end = self.body, len(self.names)

        def run_body(run: Run, engine: Engine, state: Any, args: tuple[Any, ...]) -> None:
            body(Context(run, engine, state), *args)

        if not self.many:
            return run_body
        at = list(inspect.signature(body).parameters).index(self.many) - 1

        def run_listed(run: Run, engine: Engine, state: Any, args: tuple[Any, ...]) -> None:
            body(Context(run, engine, state), *args[:at], args[end:], *args[at:end])

        return run_listed


@dataclasses.dataclass(slots=True)
class Context:
    """What a body may know beside its operands: the run, the engine in charge, the group state."""

    run: Run
    engine: Engine
    state: Any = None


def _verdict(rule: Rule, ops: Operands) -> str | None:
    """Return what the rule finds; an operator token it cannot read is a finding too."""
    try:
        return rule.problem(ops)
    except RuleViolation as unreadable:
        return str(unreadable)


REGISTRY: dict[str, Instruction] = {}

_ENTRY = """
def {name}({signature}):
    run = _current.get()
    if run is None:
        run = _no_run("nisa.{name}")
    event = {issue}, ({number}, {key}), ({args},))
    if name is not None:
        _named(run, name, event)
    return _handle(event)
"""


def meet(run: Run, ins: Instruction, key: Any, args: tuple[Any, ...]) -> Event | None:
    """Check a call that waits for other cores; its body moves the values and records the event."""
    try:
        plan = run._plans.get(key)
    except TypeError:
        raise ins.unusable(run, args) from None
    if plan is None:
        plan = run._plans[key] = ins.plan(run, args)
    extra: tuple[Access, ...] = ()
    if any(args[at].dynamic is not None for at in plan.tensors):
        args, extra, _ = resolve(run, plan, args)
    for at in plan.reads:
        if args[at].dynamic is None and not args[at].mem.is_written(args[at].region):
            run._unwritten(plan, at, args[at])
    call = Call(run, plan.opcode, run.site(2), plan.engine, plan.work, extra)
    ins.body(call, *args)
    return call.event


def _named(run: Run, name: Any, event: Event | None) -> None:
    """Remember the label of an instruction; `Kernel.with_schedule` refers to it."""
    if not isinstance(name, str):
        raise RuleViolation(
            f"name={name!r} at {where(run.kernel_site())}; an instruction's name is a string"
        )
    if event is not None:
        run.trace.names.setdefault((run.core, name), []).append(event)


def instruction(
    *,
    engines: tuple[Engine, ...],
    reads: tuple[str, ...],
    writes: tuple[str, ...],
    cost: Cost,
    source: str,
    rules: tuple[Rule, ...] = (),
    default: Callable[[Operands], Engine] | None = None,
    updates: tuple[str, ...] = (),
    unkeyed: tuple[str, ...] = (),
    lists: tuple[str, ...] = (),
    hidden: Callable[[Operands], tuple[tuple[str, ...], tuple[str, ...]]] | None = None,
    state: Callable[[Run, tuple[Any, ...]], Any] | None = None,
    handles_dynamic: bool = False,
    many: str = "",
) -> Callable[[Callable[P, None]], Callable[..., NkiInstruction]]:
    """Declare an instruction.

    Args:
        engines: the engines it can run on; the first is the default.
        reads: names of the operands read; those that hold no tensor in a call are skipped.
        writes: names of the operands written, skipped likewise.
        cost: builds the work record from the operands.
        source: the document that states the rules and the meaning.
        rules: operand rules beside the types.
        default: the engine for ``engine=unknown``, from the operands.
        updates: written operands that keep some old elements (part of `writes`); the body marks
            those it wrote with `Memory.mark_where`.
        unkeyed: arguments whose value no rule and no cost depends on (only their type counts).
        lists: arguments that may be lists; they are frozen to tuples.
        hidden: names of hidden state read and written.
        state: computed before the body even without values (accumulation groups).
        handles_dynamic: the body resolves run-time addresses itself (DMA).
        many: the operand that is a list of tensors, all read; rules and messages see each by its
            own name, ``srcs[0]``. The body gets a tuple.

    The decorated function becomes the body, called as ``body(context, *operands)``; the entry point
    has the published signature, that is the body's without `context`. A body that waits for other
    cores declares ``call: Call`` instead, moves the values itself and leaves its event there.
    """

    def declare(body: Callable[P, None]) -> Callable[..., NkiInstruction]:
        context, *params = inspect.signature(body).parameters.values()
        names = tuple(p.name for p in params if p.name not in ("name", many))
        ins = Instruction(
            name=body.__name__, names=names, engines=engines,
            default=default or (lambda ops: engines[0]), reads=reads, writes=writes,
            updates=updates, rules=rules, cost=cost, hidden=hidden, state=state, source=source,
            body=body, handles_dynamic=handles_dynamic, many=many,
            meets=context.annotation == "Call",
            parts=next((r.parts for r in rules if isinstance(r, PartlyRead)), None),
        )  # fmt: skip
        REGISTRY[ins.name] = ins
        return _entry(ins, params, unkeyed, lists)

    return declare


def _entry(
    ins: Instruction,
    params: list[inspect.Parameter],
    unkeyed: tuple[str, ...],
    lists: tuple[str, ...],
) -> Callable[..., NkiInstruction]:
    """Generate the entry point: Python binds the arguments, nothing is looked up by name."""
    space: dict[str, Any] = {
        "_current": core._CURRENT, "_no_run": core.current, "_ins": ins, "_T": NkiTensor,
        "_handle": NkiInstruction, "_frozen": _frozen, "_kinds": _kinds, "_listed": _listed,
        "_signatures": _signatures, "_meet": meet, "_named": _named,
    }  # fmt: skip
    signature, keys, args = [], [], []
    last: list[str] = []
    tensors = {*ins.reads, *ins.writes}
    for p in params:
        if p.default is inspect.Parameter.empty:
            signature.append(p.name)
        else:
            space[f"_d_{p.name}"] = p.default
            signature.append(f"{p.name}=_d_{p.name}")
        if p.name == "name":
            continue
        if p.name == ins.many:
            keys.append(f"_signatures({p.name})")
            last.append(f"*_listed({p.name})")
            continue
        value = f"_frozen({p.name})" if p.name in lists else p.name
        args.append(value)
        kind = f"_kinds({p.name})" if p.name in lists else f"{p.name}.__class__"
        plain = kind if p.name in unkeyed else f"{kind}, {value}"
        if p.name in tensors:
            keys.append(
                f"({p.name}._signature or {p.name}.signature) if {p.name}.__class__ is _T else "
                f"({plain},)"
            )
        else:
            keys.append(f"({plain},)" if p.name in unkeyed or p.name in lists else plain)
    code = _ENTRY.format(
        name=ins.name, signature=", ".join(signature), number=len(REGISTRY), key=", ".join(keys),
        args=", ".join(args + last), issue="_meet(run, _ins" if ins.meets else "run.issue(_ins",
    )  # fmt: skip
    # A generated entry point, not a wrapper taking *args: binding by inspect costs more than the
    # whole budget of an instruction.
    exec(compile(code, f"<nisa.{ins.name}>", "exec"), space)
    entry = cast(Callable[..., NkiInstruction], space[ins.name])
    entry.__doc__ = describe.docstring(ins)
    entry.__module__ = ins.body.__module__
    entry.__qualname__ = ins.name
    entry.__annotations__ = {
        k: v for k, v in ins.body.__annotations__.items() if k in {p.name for p in params}
    }
    return entry


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    return value


def _listed(value: Any) -> Any:
    """Return the elements of a list operand; anything but a list has none, which a rule refuses."""
    return value if isinstance(value, (list, tuple)) else ()


def _signatures(value: Any) -> Any:
    return tuple([v.signature if isinstance(v, NkiTensor) else v.__class__ for v in _listed(value)])


def _kinds(value: Any) -> Any:
    """Return the types in a list: [1] and [1.0] are equal, but no rule need treat them alike."""
    if isinstance(value, (list, tuple)):
        return tuple([_kinds(v) for v in value])
    return value.__class__
