"""Every causal model type of the installed transformers, tiny, against independent right values.

    make sweep [ARGS="--types gemma4,mamba"] [ARGS="--since 'transformers 5.17.0'"]

For each type a tiny net is made on the CPU (`tools.tiny`). Its card is held against what the net
itself does, by code that shares nothing with the card: the number of its parameters, the bytes of
all tensors in a cache that `generate()` filled, and the parameters that one decode step reads (by
gradients, and by the operations that got them). Each decode stack is held against the logits of
`generate()`. A verdict is

    exact    the right value
    refused  no value, and a reason in this project's words
    wrong    another value
    crash    an error of the library, of torch or of Python

A type is given 120 seconds and 6 GB in a process of its own, one after another.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import platform
import resource
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tools import tiny  # noqa: E402

SECONDS, MEMORY_BYTES = 120, 6 * 10**9
CARD = ("parameters", "active", "cache", "static cache", "limit")
STACKS = ("hf-eager", "hf-static", "graph", "graph-compiled")
VERDICTS = ("exact", "refused", "wrong", "crash")
PLACES = ((1, 3), (1, 8), (1, 9), (1, 33), (3, 20))  # sequences, tokens
CAPACITY = 40
NEAR = 1e-4  # of the norm of logits in float32
SAID_BY_US = str(ROOT / "lib")
Told = dict[str, tuple[str, str]]  # a verdict and its detail by column
Verdicts = dict[str, dict[str, str]]  # a verdict by type and column


def judged(work: Callable[[], tuple[Any, Any]]) -> tuple[str, str]:
    """A verdict and its detail; `work` returns what this project says, and what is right."""
    try:
        said, right = work()
    except Exception as error:
        return ("refused" if by_us(error) else "crash"), first_line(error)
    return ("exact", "") if said == right else ("wrong", f"{said} instead of {right}")


def by_us(error: BaseException) -> bool:
    """Whether it is a reason for the user: a ValueError that this project's own code raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = last.filename.startswith(SAID_BY_US) and (last.line or "").startswith("raise")
    return ours and isinstance(error, ValueError)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


# Right values, from a net that runs


def prompt(batch: int, tokens: int) -> Any:
    import torch

    return torch.randint(5, 90, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def tensors(value: Any, seen: set[int]) -> Iterator[Any]:
    """Every tensor that can be reached from a value, each once; lone numbers are counters."""
    import torch

    if id(value) in seen or isinstance(value, type | torch.nn.Module):
        return
    seen.add(id(value))
    if torch.is_tensor(value):
        if value.numel() > 1:
            yield value
        return
    parts = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list | tuple):
        parts = vars(value).values() if hasattr(value, "__dict__") else ()
        parts = () if hasattr(value, "model_type") else parts
    for part in parts:
        yield from tensors(part, seen)


def own_tensors(net: Any) -> dict[int, Any]:
    import torch

    return {id(t): t for m in net.modules() for t in vars(m).values() if torch.is_tensor(t)}


def generated(net: Any, ids: Any, new_tokens: int, **options: Any) -> Any:
    import torch
    from transformers import GenerationConfig

    net.generation_config = GenerationConfig()
    config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, pad_token_id=0, return_dict_in_generate=True,
        output_logits=True,
    )  # fmt: skip
    return net.generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=config, **options
    )


def cached_bytes(net: Any, batch: int, tokens: int) -> int:
    """Bytes that live on after `generate()` has read so many tokens; the last one is a step's."""
    before = own_tensors(net)
    out = generated(net, prompt(batch, tokens - 1), 2)
    held = [t for i, t in own_tensors(net).items() if i not in before]
    return sum(t.nbytes for t in tensors([out.get("past_key_values"), held], set()))


def static_bytes(net: Any, batch: int) -> int:
    """Bytes of a static cache that `generate()` has used; 0 where the library has none."""
    from transformers import StaticCache

    before = own_tensors(net)
    try:
        config = net.config.get_text_config(decoder=True)
        cache = StaticCache(config=config, max_cache_len=CAPACITY)
        generated(net, prompt(batch, 8), CAPACITY - 8 + 1, past_key_values=cache)
    except Exception:
        return 0
    if not (found := sum(t.nbytes for t in tensors(cache, set()))):
        return 0
    held = [t for i, t in own_tensors(net).items() if i not in before]
    return found + sum(t.nbytes for t in tensors(held, set()))


def read_params(net: Any) -> int:
    """Parameters in the arithmetic of one token, after the definition of the card.

    Counted are those that an operation of a decode step got. Tables of which rows are looked up do
    not count. Of experts those count whose gradients a token moves; where a router may choose
    nothing, their share of its choices.
    """
    import torch

    touched = touched_in_steps(net)
    move_by_one_token(net)
    output = net.get_output_embeddings()
    tables = {id(m.weight) for m in net.modules() if isinstance(m, torch.nn.Embedding)}
    tables -= {id(output.weight)} if output is not None else set()
    zaya = net.config.model_type == "zaya"
    empty = 1 if zaya else getattr(net.config, "zero_expert_num", 0) or 0
    total = by_chance = 0
    for path, parameter in net.named_parameters():
        if not is_of_experts(net, path, parameter):
            if id(parameter) in touched and id(parameter) not in tables:
                total += parameter.numel()
        elif empty:  # a token may choose nothing: its share of all choices
            held = min(len(parameter), tiny.EXPERTS) * parameter[0].numel()
            by_chance += held * (1 if zaya else 2)
        else:
            total += moved(parameter, is_stacked(net, path))
    net.requires_grad_(False)
    return total + by_chance // (tiny.EXPERTS + empty)


def move_by_one_token(net: Any) -> None:
    """Gradients of a decode step; of a sequence of one token where a cache stands in the way."""
    import torch

    calls: list[Any] = []
    hook = net.register_forward_pre_hook(lambda m, a, k: calls.append((a, k)), with_kwargs=True)
    generated(net, prompt(1, 5), 2)
    hook.remove()
    net.requires_grad_(True)
    args, kwargs = calls[-1]
    for attempt in (lambda: net(*args, **kwargs), lambda: net(prompt(1, 1), use_cache=False)):
        try:
            logits = attempt().logits.float()
            draw = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
            (logits * draw).sum().backward()
            return
        except (
            RuntimeError,
            AssertionError,
        ):  # states written in place; no gradient but in training
            net.zero_grad()


def touched_in_steps(net: Any) -> set[int]:
    """Parameters that an operation of the steps after a prompt got, other than to look up rows."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Touched(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            kwargs = kwargs or {}
            if func is not torch.ops.aten.embedding.default and len(passes) > 1:
                leaves = tree_leaves((args, kwargs))
                ids.update(id(x) for x in leaves if isinstance(x, torch.nn.Parameter))
            return func(*args, **kwargs)

    ids: set[int] = set()
    passes: list[int] = []
    hook = net.register_forward_pre_hook(lambda *_: passes.append(1))
    with Touched():
        generated(net, prompt(1, 5), 13)
    hook.remove()
    return ids


def is_of_experts(net: Any, path: str, parameter: Any) -> bool:
    """By name, JetMoe's too; routers are not."""
    import torch

    stack = path.endswith(("input_linear.weight", "output_linear.weight")) and parameter.ndim == 3
    router = isinstance(net.get_submodule(path.rpartition(".")[0]), torch.nn.Linear)
    inside = ".experts." in path and parameter.ndim > 1
    return (inside and not (router and is_stacked(net, path))) or stack


def moved(parameter: Any, stacked: bool) -> int:
    """Parameters of the experts that have a gradient."""
    if parameter.grad is None:
        return 0
    parts = parameter.grad.reshape(tiny.EXPERTS if stacked else 1, -1)
    return parameter.numel() // len(parts) * int((parts != 0).any(1).sum())


def is_stacked(net: Any, path: str) -> bool:
    """Whether a parameter holds its part of all experts."""
    import torch

    if ".experts." not in path:
        return True
    owner = path.split(".experts.")[0] + ".experts"
    return not isinstance(net.get_submodule(owner), torch.nn.ModuleList)


def works_at(net: Any, tokens: int) -> bool:
    import torch

    try:
        with torch.no_grad():
            net(prompt(1, tokens), use_cache=False)
    except (IndexError, RuntimeError, ValueError, AssertionError):
        return False
    return True


# What this project says


def net_of(config: dict[str, Any]) -> Any:
    import copy

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    made = AutoConfig.for_model(**copy.deepcopy(config))
    net = AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    for parameter in net.requires_grad_(False).parameters():
        if parameter.ndim > 1:
            parameter.mul_(3)  # logits far enough apart
        if not parameter.any():
            parameter.normal_(std=0.02)
    for path, buffer in net.named_buffers():
        if path.endswith("tid2eid"):  # experts by token, which a checkpoint would bring
            buffer.copy_(torch.arange(buffer.numel()).view_as(buffer) % tiny.EXPERTS)
    return net


def card_verdicts(config: dict[str, Any], net: Any, built: str) -> Told:
    from lib.models import load

    try:
        card = load.card(config, "float32")
    except Exception as error:
        told = ("refused" if by_us(error) else "crash"), first_line(error)
        return dict.fromkeys(CARD, told)
    if net is None:
        return {"parameters": ("wrong", f"{card.total_params}, but the library says {built}")}
    found = {
        "parameters": judged(lambda: (card.total_params, sum(p.numel() for p in net.parameters())))
    }
    if broken := runs(net):  # then nothing can be known but how many parameters there are
        found["cache"] = judged(lambda: (card.kv_bytes(8), f"nothing: {broken}"))
        return found
    found["active"] = judged(lambda: (card.active_params, read_params(net)))
    found["cache"] = judged(
        lambda: (
            {p: card.kv_bytes(p[1], p[0]) for p in PLACES},
            {p: cached_bytes(net, *p) for p in PLACES},
        )
    )
    if right := static_bytes(net, 2):
        found["static cache"] = judged(lambda: (card.kv_bytes(CAPACITY, 2, "static"), right))
    found["limit"] = judged(lambda: (limit(card, net), None))
    return found


def limit(card: Any, net: Any) -> str | None:
    """What is wrong with the stated limit: the net has to run as far, and a table no further."""
    if card.context_limit is None:
        return None if works_at(net, 200) else "none stated, and 200 tokens fail"
    tokens = min(card.context_limit, 512)
    return None if works_at(net, tokens) else f"{tokens} tokens fail"


def runs(net: Any) -> str:
    """Why `generate()` of the library cannot run this net, or nothing."""
    try:
        generated(net, prompt(1, 4), 2)
    except Exception as error:
        return first_line(error)
    return ""


def stack_verdict(stack: str, config: dict[str, Any]) -> tuple[str, str]:
    """Logits along the continuation that `generate()` chose, and the tokens that it chose."""
    import torch

    from lib.stacks import registry

    ids, new_tokens = prompt(1, 9), 6
    net = net_of(config)
    right = generated(net, ids, new_tokens)
    expected = torch.stack(right.logits, 1)[:, 1:]

    def work() -> tuple[Any, Any]:
        tokens = right.sequences[:, ids.shape[1] :]
        forced = registry.open_stack(stack, net).forced_logits(ids, tokens[:, :-1])
        error = ((forced - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
        if not error < NEAR:
            return f"logits off by {error:.1e} of their norm", 0
        called = registry.open_stack(stack, net)(ids, new_tokens).tokens
        return called.tolist(), tokens.tolist()

    return judged(work)


def verdicts(model_type: str, stacks: Sequence[str] = STACKS) -> Told:
    """Every verdict on a model type, by its column."""
    net, built, config = None, "", tiny.fields(model_type)
    try:
        net = net_of(config)
    except Exception as error:
        built = first_line(error)
    found = card_verdicts(config, net, built)
    if net is not None and not runs(net):
        found |= {stack: stack_verdict(stack, config) for stack in stacks}
    return found


# One type after another


def guarded(model_type: str, stacks: Sequence[str] = STACKS) -> Told:
    """`verdicts` in a process of its own, with limits on time and memory."""
    ours, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1)
        os.dup2(devnull, 2)
        try:
            theirs.send(verdicts(model_type, stacks))
        except BaseException as error:
            theirs.send(dict.fromkeys((*CARD, *stacks), ("crash", first_line(error))))

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    theirs.close()
    try:
        late = not ours.poll(SECONDS)
        found = None if late else ours.recv()
    except EOFError:
        late, found = False, None
    child.kill()
    child.join()
    why = f"not done in {SECONDS} s" if late else f"the process ended with {child.exitcode}"
    return found or dict.fromkeys((*CARD, *stacks), ("crash", why))


@dataclass(frozen=True)
class Kept:
    """docs/models.csv: verdicts of each type by column, now and in an earlier sweep.

    The columns of the earlier one carry its label, as in `cache: transformers 5.17.0`.
    """

    now: Verdicts = field(default_factory=dict)
    before: Verdicts = field(default_factory=dict)
    label: str = ""

    def since(self, label: str) -> Kept:
        """What is now becomes the earlier sweep, under this label."""
        return Kept(before=self.now, label=label)


def read(path: Path) -> Kept:
    """The file of an earlier sweep; nothing where there is none."""
    if not path.is_file():
        return Kept()
    with path.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    columns = (*CARD, *STACKS)
    label = next((name.partition(": ")[2] for name in lines[0] if ": " in name), "")

    def verdicts_in(name: str) -> Verdicts:
        rows = {line["type"]: {c: line[name.format(c)] for c in columns} for line in lines}
        return {
            t: given for t, row in rows.items() if (given := {c: v for c, v in row.items() if v})
        }

    return Kept(verdicts_in("{}"), verdicts_in(f"{{}}: {label}") if label else {}, label)


def write(path: Path, kept: Kept) -> None:
    """A line a type; empty where a column says nothing of it."""
    columns = (*CARD, *STACKS)
    names = ["type", *columns, *(f"{c}: {kept.label}" for c in columns if kept.label)]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for model_type in dict.fromkeys((*kept.now, *kept.before)):
            both = [kept.now, kept.before] if kept.label else [kept.now]
            cells = [rows.get(model_type, {}).get(c, "") for rows in both for c in columns]
            writer.writerow([model_type, *cells])


def counts(rows: Verdicts) -> dict[str, Counter[str]]:
    """Verdicts of each column, counted."""
    return {c: Counter(row[c] for row in rows.values() if c in row) for c in (*CARD, *STACKS)}


def table(kept: Kept) -> list[str]:
    """A line for each column; beside each count what it was before."""
    ours, theirs = counts(kept.now), counts(kept.before)
    lines = ["| | " + " | ".join(VERDICTS) + " |", "|:--|" + "--:|" * len(VERDICTS)]
    for column, own in ours.items():
        earlier = theirs[column] if kept.label else None
        cells = [
            f"{own[v]} ({earlier[v]})" if earlier is not None else str(own[v]) for v in VERDICTS
        ]
        lines.append(f"| {column} | " + " | ".join(cells) + " |")
    return lines


def page(rows: dict[str, Told], kept: Kept, versions: str) -> str:
    """docs/models.md: the counts, now and before, and everything that is not exact."""
    what = (__doc__ or "").split("\n\n")[2].removesuffix(" A verdict is").splitlines()
    legend = (__doc__ or "").split("A verdict is\n")[1].rstrip().rsplit("\n\n", 1)[0]
    parts = [
        "# Which models are understood",
        "",
        f"Written by `make sweep`, with {versions}: {len(rows)} causal model types.",
        "Edit `tools/sweep.py` or `tools/tiny.py` instead. `models.csv` has a line for each type.",
        "",
        *what,
        "",
        "A verdict is",
        legend,
        "",
        "A type that the library itself cannot build or run small is refused by the card, and has "
        "no line for stacks. A stack that is `wrong` fails its gate in float32; in bfloat16 the "
        "gate allows several per cent of the norm, so that it may let the smallest of these pass.",
        "",
        "## Counts",
        "",
    ]
    if kept.label:
        parts += [
            f"In brackets: {kept.label}. To see what a newer library changes, name the one of this "
            "page: `make sweep ARGS=\"--since 'transformers 5.17.0'\"`.",
            "",
        ]
    parts += [*table(kept), ""]
    for column in (*CARD, *STACKS):
        parts += _not_exact(column, rows)
    return "\n".join(parts).rstrip() + "\n"


def _not_exact(column: str, rows: dict[str, Told]) -> list[str]:
    """Types of one column by verdict and reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, row in rows.items():
        verdict, detail = row.get(column, ("exact", ""))
        if verdict != "exact":
            reason = detail.partition(": ")[2] or detail
            groups.setdefault((verdict, reason.replace(name, "...")), []).append(name)
    if not groups:
        return []
    lines = [f"## {column[0].upper()}{column[1:]}: what is not exact", ""]
    for (verdict, reason), names in sorted(groups.items(), key=lambda g: (g[0][0], g[1])):
        lines.append(f"- {verdict}: {', '.join(names)}. {reason}")
    return [*lines, ""]


def installed() -> str:
    """Names and versions, the machine's build of torch left out."""
    import tokenizers
    import torch
    import transformers

    named = [
        (m.__name__, m.__version__.partition("+")[0]) for m in (transformers, torch, tokenizers)
    ]
    return ", ".join(f"{name} {v}" for name, v in [*named, ("Python", platform.python_version())])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/sweep.py", description=__doc__.split("\n")[0])
    parser.add_argument("--types", help="only these, comma-separated")
    parser.add_argument("--stacks", default=",".join(STACKS), help="only these, or none")
    parser.add_argument("--out", type=Path, help="folder that gets models.md and models.csv")
    parser.add_argument(
        "--since", help="what is in models.csv becomes the earlier sweep, so called"
    )
    args = parser.parse_args(argv)

    warnings.filterwarnings("ignore")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    from lib.stacks import fused, logits_check  # noqa: F401  (once, before the processes part)

    rows = {}
    for name in args.types.split(",") if args.types else tiny.types():
        rows[name] = guarded(name, [s for s in STACKS if s in args.stacks.split(",")])
        said = [f"{c}: {v}" + (f" ({d})" if d else "") for c, (v, d) in rows[name].items()]
        sys.stdout.write(f"{name}: " + "; ".join(said) + "\n")
        sys.stdout.flush()
    kept = Kept(now={t: {c: verdict for c, (verdict, _) in row.items()} for t, row in rows.items()})
    if args.out:
        earlier = read(args.out / "models.csv")
        earlier = earlier.since(args.since) if args.since else earlier
        kept = replace(earlier, now=kept.now)
        write(args.out / "models.csv", kept)
        (args.out / "models.md").write_text(page(rows, kept, installed()), encoding="utf-8")
    sys.stdout.write("\n".join(table(kept)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
