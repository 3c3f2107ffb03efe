"""Makes tiny random models of every served family, with a tokenizer and a chat template, as a real model folder on disk.

For shapes, parity and speed of tests; never for claims about quality. The same arguments give the same bytes.
Usage from a shell: python -m tests.tiny OUT_DIR [--untied]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # ids 0, 1, 2
CORPUS = [
    "The quick brown fox jumps over the lazy dog while the old pirate counts his golden coins.",
    "A tenant pushes an adapter, the gate validates it, and a replica serves it beside the base model.",
    'user assistant system {"name": "Abel", "age": 42, "owns": "a map"} tell me about the heavy old chest',
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 今日は 😀 één café",
]


def make_tiny_model(
    out: Path,
    *,
    seed: int = 0,
    num_layers: int = 2,
    hidden_size: int = 64,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int | None = None,
    intermediate_size: int = 96,
    max_positions: int = 512,
    tied: bool = True,
    family: str = "llama",
    vector_noise: float = 0.0,
    **config: Any,
) -> Path:
    """Write config.json, model.safetensors (fp32), tokenizer.json, tokenizer_config.json and chat_template.jinja; returns `out`.

    Weights are drawn wide enough (std 0.15) that logits differ clearly and greedy decoding has no ties. `family` is a
    model_type; `vector_noise` (std) moves norms and biases off the ones and zeros that they start as.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer()
    settings = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=head_dim or hidden_size // num_heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **config,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(settings).float()
        for parameter in model.parameters():
            if vector_noise and parameter.ndim == 1:
                parameter.data += vector_noise * torch.randn_like(parameter)
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def make_tokenizer(*, vocab_size: int = 384) -> Any:
    """A byte-level BPE tokenizer (every string round-trips) with ChatML's special tokens and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--untied", action="store_true")
    arguments = parser.parse_args()
    make_tiny_model(arguments.out, tied=not arguments.untied)


if __name__ == "__main__":
    main()
