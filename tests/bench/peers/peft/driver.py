"""PEFT's mixed batch: `generate(..., adapter_names=[...])`, one adapter a row; plain `generate` without adapters."""

from __future__ import annotations

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from workbench import parser, report, work_from


def main() -> None:
    work = work_from(parser().parse_args())
    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(work.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32).eval()
    names = []
    for folder in work.adapter_dirs():
        if not names:
            model = PeftModel.from_pretrained(model, folder, adapter_name=folder.name).eval()
        else:
            model.load_adapter(folder, adapter_name=folder.name)
        names.append(folder.name)
    prompts = work.prompts()

    @torch.no_grad()
    def generate() -> int:
        made = 0
        for start in range(0, work.requests, work.concurrent):
            batch = tokenizer(prompts[start : start + work.concurrent], return_tensors="pt", padding=True)
            rows = batch["input_ids"].shape[0]
            extra = {"adapter_names": [names[(start + i) % len(names)] for i in range(rows)]} if names else {}
            out = model.generate(
                **batch,
                **extra,
                do_sample=False,
                min_new_tokens=work.tokens,
                max_new_tokens=work.tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
            made += rows * (out.shape[1] - batch["input_ids"].shape[1])
        return made

    report("peft", work, generate)


if __name__ == "__main__":
    main()
