"""Train small, real LoRA adapters on SmolLM2-135M-Instruct, one a task: the source of `tests/data/adapters`.

Usage: python tests/bench/zoo.py BASE_DIR OUT_DIR [--tasks pirate,json] [--rank 4] [--steps 60]

Every task is a generator of (question, answer) pairs over a small vocabulary. Training questions and the 24
questions that are scored come from disjoint random streams, and a scored question is never trained on.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PEOPLE = "Abel Bea Carl Dora Emil Fay Greta Hugo Iris Jonas Karl Lily Max Nina Otto Paula Ralf Sara Tom Ursula".split()
THINGS = "ship harbour chest parrot compass cannon map lantern anchor sail barrel coin rope flag deck oar".split()
QUALITIES = "old golden heavy broken tiny dark rusty shiny hidden cursed painted silent".split()

Pair = tuple[str, str]


def pirate(rng: random.Random) -> Pair:
    thing = f"{rng.choice(QUALITIES)} {rng.choice(QUALITIES)} {rng.choice(THINGS)}"
    return f"Tell me about the {thing}", f"Arr, that {thing} be a fine treasure, matey!"


def to_json(rng: random.Random) -> Pair:
    name, age, thing = rng.choice(PEOPLE), rng.randint(18, 89), rng.choice(THINGS)
    return f"{name} is {age} years old and owns a {thing}.", json.dumps({"name": name, "age": age, "owns": thing})


TASKS: dict[str, Callable[[random.Random], Pair]] = {"pirate": pirate, "json": to_json}


def chat(tokenizer: Any, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def encode(tokenizer: Any, pairs: list[Pair]) -> dict[str, torch.Tensor]:
    """Right-padded batch; labels (n, tokens) are -100 everywhere but on the answer."""
    rows, labels = [], []
    for question, answer in pairs:
        prompt = tokenizer(chat(tokenizer, question), add_special_tokens=False)["input_ids"]
        target = tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
        rows.append(prompt + target)
        labels.append([-100] * len(prompt) + target)
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
        "labels": torch.tensor([row + [-100] * (width - len(row)) for row in labels]),
    }


@torch.no_grad()
def exact_match(model: Any, tokenizer: Any, pairs: list[Pair]) -> float:
    tokenizer.padding_side = "left"
    texts = [chat(tokenizer, question) for question, _ in pairs]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    out = model.generate(**batch, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    answers = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(got.strip() == want for got, (_, want) in zip(answers, pairs, strict=True)) / len(pairs)


def train(model: Any, tokenizer: Any, task: Callable[[random.Random], Pair], *, rank: int, steps: int, seed: int) -> tuple[Any, list[Pair]]:
    scored = [task(random.Random(f"scored-{seed}-{i}")) for i in range(24)]
    held_out = {question for question, _ in scored}
    torch.manual_seed(seed)
    peft = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], lr=3e-3)
    rng = random.Random(f"train-{seed}")
    for step in range(steps):
        batch: list[Pair] = []
        while len(batch) < 8:
            pair = task(rng)
            batch += [pair] if pair[0] not in held_out else []
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 6) * max(0.05, 1 - step / steps)
        loss = peft(**encode(tokenizer, batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"  step {step} loss {loss.item():.4f}", flush=True)
    return peft.eval(), scored


def save(peft: Any, folder: Path) -> None:
    """A standard PEFT folder in bf16, with nothing in it that names the machine it was made on."""
    peft.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    weights = folder / "adapter_model.safetensors"
    save_file({key: value.to(torch.bfloat16).contiguous() for key, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    config_path = folder / "adapter_config.json"
    config = json.loads(config_path.read_text()) | {"base_model_name_or_path": BASE_NAME}
    config_path.write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    for name in args.tasks.split(","):
        started = time.monotonic()
        model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
        seed = sorted(TASKS).index(name)
        peft, scored = train(model, tokenizer, TASKS[name], rank=args.rank, steps=args.steps, seed=seed)
        with peft.disable_adapter():
            base_score = exact_match(peft, tokenizer, scored)
        score = exact_match(peft, tokenizer, scored)
        save(peft, args.out / name)
        print(json.dumps({"task": name, "base": base_score, "adapter": score, "seconds": round(time.monotonic() - started, 1)}), flush=True)


if __name__ == "__main__":
    main()
