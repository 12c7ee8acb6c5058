"""A process that answers as the engine does, or misbehaves as it might: `tests/fakes/vllm.py HOW`.

It has the real guard and the real lines; only what vLLM would do is made up, or, where HOW is a
file, what a real engine answered.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

spec = importlib.util.spec_from_file_location(
    "vllm_engine", Path(__file__).resolve().parents[2] / "lib" / "stacks" / "vllm_engine.py"
)
vllm_engine = importlib.util.module_from_spec(spec)
spec.loader.exec_module(vllm_engine)

STARTED = {
    "stamps": [["start", 1.0], ["imported", 3.0], ["ready", 10.0]],
    "versions": {"python": "3.12.3", "vllm": "0.0.1", "torch": "2.11.0"},
    "settings": {"max_num_seqs": 4, "prefix_caching": False, "cudagraph_sizes": [1, 2, 4]},
    "worker": {
        "parameter_bytes": {"embeddings": {"bfloat16": 64}, "rest": {"bfloat16": 128}},
        "attention": ["FAKE_ATTN"],
        "linear": {"UnquantizedLinearMethod": 8},
        "experts": {},
        "loaded": {"tensors": 12, "seconds": 0.5},
        "compile_s": 2.0,
    },
}
COMPILING = {("compiles-at-first", 1), ("compiles-at-first", 3), ("compiles-late", 5)}
SCHEDULER = {
    "steps": 4,
    "running": 2,
    "waiting": 0,
    "queued": 0,
    "preempted": 0,
    "cache_share": 0.25,
    "prefix_queries": 0,
    "prefix_hits": 0,
}


class Engine:
    """Token n of a sequence is its prompt's first id plus n; each call takes a millisecond."""

    def __init__(self, how: str) -> None:
        self.how, self.kept, self.compiled, self.calls = how, {}, 0, 0
        self.gpus = 1

    def start(self, arguments, answer):
        print("INFO loading\nModel loading took 3 GiB and 1.5 seconds")
        if self.how == "dies-at-start":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "hangs-at-start":
            print("child", os.getpid(), flush=True)
            time.sleep(3600)
        if self.how == "unlike":
            return {"stamps": [], "versions": {}, "settings": {}}
        if self.how == "refuses":
            raise RuntimeError("no kernel image is available")
        if self.how == "falls-back":
            quantised = {"GptOssMxfp4MoEMethod": 1}
            return STARTED | {"worker": STARTED["worker"] | {"experts": quantised}}
        self.gpus = arguments.get("tensor_parallel_size", 1)
        if self.gpus > 1 and self.how != "one-gpu":
            draws = [f"weights-{n if self.how == 'other-draws' else 0}" for n in range(self.gpus)]
            return STARTED | {"worker": STARTED["worker"] | {"draws": draws}}
        if self.how == "no-plugin":
            return STARTED | {"worker": STARTED["worker"] | {"loaded": {}}}
        if self.how == "caches":
            return STARTED | {"settings": STARTED["settings"] | {"prefix_caching": True}}
        return STARTED

    def prompts(self, number, ids, answer):
        self.kept[number] = ids
        return {}

    def counters(self, answer):
        return {"compiled": {"late_kernels": self.compiled}}

    def memory(self, answer):
        boards = [
            {"weights_bytes": 192 // self.gpus, "cache_reserved_bytes": 1000 // self.gpus}
        ] * self.gpus
        return {"weights_bytes": 192, "cache_reserved_bytes": 1000, "boards": boards}

    def overwrite(self, values, answer):
        return {"before": values}

    def generate(self, number, new_tokens, stream, answer):
        self.calls += 1
        if self.how == "dies":
            print("ERROR CUDA error: out of memory", flush=True)
            os._exit(7)
        if self.how in ("hangs", "children"):
            time.sleep(3600)
        if self.how == "babbles":
            os.write(int(sys.argv[2]), b"INFO warming up\n")
        if self.how == "wrong-op":
            answer({"op": "memory"})
        if self.how == "compiles" and self.calls > 2:
            self.compiled += 1
        if (self.how, self.calls) in COMPILING:
            self.compiled += 1
        if stream:
            for place in range(new_tokens):
                answer({"token": place + 1})
        if self.how == "half":
            os.write(int(sys.argv[2]), b'{"op": "generate", "tok')
            os._exit(3)
        count = new_tokens - (self.how == "short") + (self.how == "long")
        tokens = [[ids[0] + n for n in range(count)] for ids in self.kept[number]]
        if self.how == "ragged":
            tokens[-1].pop()
        if self.how == "too-few":
            tokens.pop()
        scheduler = dict(SCHEDULER)
        if self.how in ("queued", "preempted", "prefix_hits"):
            scheduler[self.how] = 3
        told = {"tokens": tokens, "start_s": 5.0, "stop_s": 5.001, "scheduler": scheduler}
        return {n: v for n, v in told.items() if (self.how, n) != ("lacking", "scheduler")}


class Honest(Engine):
    """Computes: our own net with the weights that it is told to draw, so that a gate can pass.

    It calls itself vLLM, has routers that can be pinned, and tells the experts that it chose.
    """

    def start(self, arguments, answer):
        import torch

        sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
        from transformers import AutoConfig

        from lib.models import draws, experts
        from lib.stacks.generate import GenerateStack

        torch.set_num_threads(1)
        print("Model loading took 0.1 GiB memory and 0.5 seconds", flush=True)
        os.chdir(Path(arguments["model_loader_extra_config"]["plan"]).parent)
        plan, seed = draws.restore(
            Path(arguments["model_loader_extra_config"]["plan"]).read_text(encoding="utf-8")
        )
        data = json.loads((Path(arguments["model"]) / "config.json").read_text(encoding="utf-8"))
        mxfp4 = data.pop("quantization_config", None)
        config = AutoConfig.for_model(**data)
        self.net, laws = draws.build(config, "bfloat16", "cpu")
        draws.fill_net(self.net, laws, seed)
        if mxfp4:
            draws.round_to_mxfp4(self.net)
        self.net.eval().requires_grad_(False)
        self.stack, self.torch = GenerateStack(self.net, decoding="greedy", capacity=None), torch
        held = sum(math.prod(draw.shape) for draw in plan)
        experts_of = {"UnquantizedFusedMoEMethod": 1} if experts.biases(self.net) else {}
        parts = {"rest": {"bfloat16": 2 * held}}
        if mxfp4:
            values = sum(p.numel() for n, p in self.net.named_parameters() if ".experts." in n)
            experts_of, parts["experts"] = (
                {"Mxfp4MoEMethod": 1},
                {"uint8": round(4.25 * values / 8)},
            )
        linear = {"UnquantizedLinearMethod": 8}
        if arguments.get("quantization") == "fp8":
            linear = {"Fp8PerTensorOnlineLinearMethod": 8}
            inner = [d for d in plan if not d.name.startswith(("model.embed", "lm_head"))]
            parts = {"rest": {"float8_e4m3fn": sum(math.prod(d.shape) for d in inner)}}
            for name, weight in self.net.named_parameters():
                if name.endswith("_proj.weight"):
                    scale = weight.abs().max() / 448
                    weight.copy_((weight / scale).to(torch.float8_e4m3fn).to(weight.dtype) * scale)
        self.routed = arguments.get("enable_return_routed_experts", False)
        if self.routed and self.how == "honest-untraced":
            raise RuntimeError("no kernel tells its choice")
        # vLLM's own kernels of MXFP4 route inside themselves: what they chose stays at zero.
        self.chosen = [0, 0] if mxfp4 and "moe_backend" not in arguments else [0, 1]
        seqs = {"max_num_seqs": arguments["max_num_seqs"], "enforce_eager": self.routed}
        self.gpus = arguments.get("tensor_parallel_size", 1)
        worker = STARTED["worker"] | {"experts": experts_of, "parameter_bytes": parts}
        worker["linear"] = linear
        worker["draws"] = ["the same"] * self.gpus
        return STARTED | {"settings": STARTED["settings"] | seqs, "worker": worker}

    def _ids(self, number):
        return self.torch.tensor(self.kept[number])

    def generate(self, number, new_tokens, stream, answer):
        start_s = time.perf_counter()
        ids = self._ids(number)
        with self.torch.inference_mode():
            tokens = self.stack(ids, new_tokens).tokens.tolist()
        if stream:
            for place in range(new_tokens):
                answer({"token": place + 1})
        wrong = self.how == "honest-short" and len(ids) > 1
        scheduler = SCHEDULER | {"running": len(ids), "steps": new_tokens}
        routed = {}
        if self.routed:
            width = ids.shape[1] + new_tokens
            routed = {"routed": [[[self.chosen]] * width for _ in tokens]}
        stop_s = time.perf_counter()
        tokens = [row[:-1] if wrong else row for row in tokens]
        told = {"start_s": start_s, "stop_s": stop_s, "scheduler": scheduler}
        return {"tokens": tokens, **told, **routed}

    def forced(self, number, continuation, path, answer):
        ids = self._ids(number)
        with self.torch.inference_mode():
            logits = self.stack.forced_logits(ids, self.torch.tensor([continuation] * len(ids)))
        logits = logits.float().transpose(0, 1).contiguous()
        if self.how == "honest-wrong":
            logits = logits.flip(-1).contiguous()
        logits.numpy().tofile(path)
        return {"shape": list(logits.shape)}

    def sampled(self, number, new_tokens, ids, answer):
        prompt = self._ids(number)
        with self.torch.inference_mode():
            tokens = self.stack(prompt, new_tokens).tokens
            given = self.torch.cat([prompt[:, -1:], tokens[:, :-1]], 1)
            logits = self.stack.forced_logits(prompt[:, :-1], given).float()
            if self.how == "honest-wrong-batches" and len(prompt) > 1:
                logits = logits.flip(-1)
        chances = self.torch.log_softmax(logits, -1)[..., ids]
        return {"tokens": tokens.tolist(), "logprobs": chances.tolist()}

    def overwrite(self, values, answer):
        parameters, before = dict(self.net.named_parameters()), {}
        with self.torch.no_grad():
            for name, numbers in values.items():
                before[name] = parameters[name].float().tolist()
                parameters[name].copy_(self.torch.tensor(numbers))
        return {"before": before}


class Replay:
    """Answers of a recorded exchange, each op in its own order; another request is an error."""

    def __init__(self, path: Path) -> None:
        self.left: dict[str, list] = {}
        for line in gzip.decompress(path.read_bytes()).splitlines():
            entry = json.loads(line)
            self.left.setdefault(entry["ask"].pop("op"), []).append(entry)

    def __getattr__(self, op: str):
        def answered(answer, **request):
            entry = self.left[op].pop(0)
            asked = entry["ask"]
            for one in (request, asked):  # numbers and folders may differ
                one.pop("number", None)
                for name in ("model", "model_loader_extra_config", "worker_extension_cls"):
                    one.get("arguments", {}).pop(name, None)
            if request != asked:
                raise ValueError(f"recorded {str(asked)[:300]}, asked {str(request)[:300]}")
            return entry["answer"]

        return answered


def main(how: str) -> None:
    """Serve under the guard, or start a child that would stay behind and then serve."""
    answers, lifeline = int(sys.argv[2]), int(sys.argv[3])
    parent = os.getppid()
    vllm_engine.adopt_orphans()
    engine = os.fork()
    if engine:
        os.close(0)
        vllm_engine.guard(engine, lifeline, parent, answers)
    os.close(lifeline)
    if how == "children":  # one in the group, one that left it
        for apart in (False, True):
            child = subprocess.Popen(["sleep", "3600"], start_new_session=apart)
            print("child", child.pid, flush=True)
    if how == "prints":
        print('{"op": "start"}\nnot an answer', flush=True)
    made = Replay(Path(how)) if how.endswith(".gz") else Engine(how)
    if how.startswith("honest"):
        made = Honest(how)
    vllm_engine.serve(vllm_engine.answering(answers), made)


if __name__ == "__main__":
    main(sys.argv[1])
