"""Lorary through its engine API: the step loop in this thread, adapters from local folders, no HTTP."""

from __future__ import annotations

import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # both as `gpu_runtime.config.prepare_threads` does
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

from workbench import Work, parser, report, work_from

from gpu_runtime.adapters.local import LocalSource
from gpu_runtime.config import RuntimeConfig
from gpu_runtime.core import AdapterKey, Request, SamplingParams
from gpu_runtime.engine.build import build_engine
from gpu_runtime.engine.engine import Engine
from gpu_runtime.server.text import Text
from registry.artifact.base import compute_base_digest

POOL_BYTES = 1 << 30


def make_request(number: int, *, prompt: tuple[int, ...], work: Work, key: AdapterKey | None) -> Request:
    params = SamplingParams(max_tokens=work.tokens, temperature=0.0, ignore_eos=True)
    return Request(f"request-{number}", prompt, params, key, arrived_s=0.0)


def drive(engine: Engine, requests: list[Request], *, concurrent: int) -> int:
    """Keep `concurrent` requests in the engine until all are done; the tokens made."""
    waiting, running, made = list(reversed(requests)), 0, 0
    while waiting or running:
        while waiting and running < concurrent:
            engine.add_request(waiting.pop(), grant=None)
            running += 1
        outputs = engine.step()
        if not outputs and not engine.can_progress:
            time.sleep(0.001)  # every adapter is on its way
        for output in outputs:
            made += output.token_id is not None
            running -= output.finish_reason is not None
            if output.error:
                raise SystemExit(output.error)
    return made


def main() -> None:
    work = work_from(parser().parse_args())
    source = LocalSource(base_digest=compute_base_digest(work.model))
    keys = [source.add(folder, tenant="bench") for folder in work.adapter_dirs()]
    config = RuntimeConfig(model_dir=work.model, pool_bytes=POOL_BYTES, max_batch_requests=work.concurrent, max_model_len=512)
    engine = build_engine(config, source)
    text = Text(work.model)
    prompts = [text.encode(prompt) for prompt in work.prompts()]
    numbers = iter(range(10**9))

    def generate() -> int:
        requests = [
            make_request(next(numbers), prompt=prompt, work=work, key=keys[i % len(keys)] if keys else None)
            for i, prompt in enumerate(prompts)
        ]
        return drive(engine, requests, concurrent=work.concurrent)

    report("lorary", work, generate)


if __name__ == "__main__":
    main()
